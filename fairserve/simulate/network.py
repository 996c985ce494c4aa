"""Messages on virtual time: delays, losses, partitions; and what routers and replicas make of calls that fail.

Only calls to the authority may be lost: a lost one is found out by its time-out. What a router sends to a replica goes
over a connection that either works or says at once that the replica is gone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from fairserve.simulate.timeline import Act, Timeline

RETRY_S = 0.1
"""Pause between two tries while the authority does not answer, as in ``cluster/counter_client.py``."""

Reply = TypeVar("Reply")


class Network:
    """``delay_s`` is one way. ``loss``: chance that a call, or its reply, is lost (each on its own)."""

    def __init__(self, timeline: Timeline, delay_s: float, loss: float, rng: random.Random) -> None:
        self.timeline = timeline
        self._delay_s = delay_s
        self._loss = loss
        self._rng = rng
        self._cut_off: set[str] = set()

    def carry(self, arrives: Act, num_ways: int = 1) -> None:
        """A message that arrives for certain; ``num_ways`` 2: and what it moves the other side to send back."""
        self.timeline.after(num_ways * self._delay_s, arrives)

    def cut_off(self, name: str) -> None:
        """Between ``name`` and the authority nothing passes any more, until :meth:`heal`."""
        self._cut_off.add(name)

    def heal(self, name: str) -> None:
        self._cut_off.discard(name)

    def passes(self, name: str) -> bool:
        """Whether one message between ``name`` and the authority gets through."""
        return name not in self._cut_off and not (self._loss and self._rng.random() < self._loss)


class Call(Generic[Reply]):
    """One call to the authority, which answers it once or fails it once, now or later; or nothing is heard of it."""

    __slots__ = ("_network", "_on_over", "_sender", "_until_s")

    def __init__(
        self, network: Network, sender: str, timeout_s: float, on_over: Callable[[Reply | None, bool], None]
    ) -> None:
        """``on_over``: gets the reply or None, and whether the call was failed rather than too late."""
        self._network = network
        self._sender = sender
        self._until_s = network.timeline.now_s + timeout_s
        self._on_over = on_over

    def send(self, deliver: Callable[[Call[Reply]], None]) -> None:
        self._network.carry(partial(self._arrived, deliver))

    def answer(self, reply: Reply) -> None:
        self._network.carry(partial(self._answered, reply))

    def fail(self) -> None:
        """There is no authority (any more) where the call went."""
        self._network.carry(partial(self._answered, None))

    def _arrived(self, deliver: Callable[[Call[Reply]], None]) -> None:
        if self._network.passes(self._sender):
            deliver(self)
        else:
            self._is_lost()

    def _answered(self, reply: Reply | None) -> None:
        if self._network.passes(self._sender):
            self._on_over(reply, reply is None)
        else:
            self._is_lost()

    def _is_lost(self) -> None:
        """Nothing else can end the call: a reply in time needs no timer."""
        timeline = self._network.timeline
        timeline.at(max(self._until_s, timeline.now_s), partial(self._on_over, None, False))


class Link:
    """One side's connection to the authority: ``CounterLink`` of ``cluster/counter_client.py`` on virtual time.

    The authority counts as unreachable once no call has succeeded for ``timeout_s`` and one has just failed.
    """

    def __init__(self, network: Network, name: str, timeout_s: float) -> None:
        self._network = network
        self._name = name
        self._timeout_s = timeout_s
        self._last_success_s = network.timeline.now_s
        self.is_down = False

    def call(self, deliver: Callable[[Call[Reply]], None], took: Callable[[Reply | None], None]) -> None:
        """``took`` gets the reply, or None when it did not come in time or the call failed."""
        timeline = self._network.timeline
        began_s = timeline.now_s

        def over(reply: Reply | None, has_failed: bool) -> None:
            if reply is not None:
                self.is_down = False
                self._last_success_s = timeline.now_s
            else:
                silent_s = timeline.now_s - max(self._last_success_s, began_s)
                self.is_down = self.is_down or has_failed or silent_s >= self._timeout_s - 1e-9
            took(reply)

        call: Call[Reply] = Call(self._network, self._name, self._timeout_s, over)
        call.send(deliver)
