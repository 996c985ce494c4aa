"""The trunk: what one engine step made for all requests of one ingress, as one message over one long-lived stream.

A message between two processes costs about the same whether it carries one token or a hundred. So a replica sends each
ingress one message per step. Every request keeps a call of its own beside it: cancelling that call aborts the request,
it fails at once when the replica dies, it is what Serve counts, and its last item says how the request ended, with all
that went over the trunk until then. The trunk only makes tokens cheap and early: whatever happens to it, no request
waits for it, and none loses or repeats a token.

Outputs of a request are numbered from 0, one per step. Those between two numbers come once, over the trunk or over the
request's own call; ``arrivals.py`` puts them in order.

This is the replica's side, plain objects on one event loop. Without a trunk everything goes over the own calls. A
replica asks for one when an ingress has two requests there, and ends it when the ingress has had none for ``IDLE_S``,
at once when it drains: Serve counts the stream like a request, and waits for it before it stops a replica.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fairserve.engine.request import RequestOutput, TokenLogprob, joined

IDLE_S = 2.0
MIN_SHARED = 2
"""Requests of one ingress from which on a trunk pays."""

Piece = tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]]
"""Text, token ids and log probabilities of one output."""


class Part(NamedTuple):
    """Outputs ``first`` to ``first + num - 1`` of one request as one. A tuple, because there is one for every token."""

    request_id: str
    first: int
    num: int
    text: str
    token_ids: tuple[int, ...]
    usage: tuple[int, int, int]
    logprobs: tuple[TokenLogprob, ...]
    waited_s: float | None


class Message(NamedTuple):
    """One item of a trunk. The first, number 0, is empty and says that the trunk is up."""

    trunk: int
    """Which one of this replica, from 1."""
    number: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class NoTrunk:
    """The replica wants a trunk: of the first ``num_before`` that it had, none leads to this ingress any more."""

    replica: str
    num_before: int


@dataclass(frozen=True, slots=True)
class Own:
    """One item of a request's own call: outputs ``first`` to ``first + num - 1`` as one (none with ``num`` 0)."""

    first: int
    num: int
    output: RequestOutput | None
    earlier: tuple[Piece, ...] = ()
    """The outputs just before ``first``, which went over a trunk, and may have got lost there."""
    waited_s: float | None = None
    """Of the first of ``earlier``."""
    no_trunk: NoTrunk | None = None


class Outlet:
    """The outputs of one request; an async iterator of the items of its own call. Ends after a finish reason.

    It keeps what went over a trunk until it is sent over the own call, too: about 200 bytes per token.
    """

    def __init__(
        self, line: Line, request_id: str, waited_s: float | None, saw: Callable[[RequestOutput], None] | None
    ) -> None:
        self.request_id = request_id
        self._line = line
        self._waited_s = waited_s
        self._saw = saw
        self._items: deque[Own] = deque()
        self._kept: list[Piece] = []
        self._kept_waited_s: float | None = None
        self._newest: RequestOutput | None = None
        """The last of those kept."""
        self._num = 0
        self._event = asyncio.Event()
        self._is_over = False

    def put(self, output: RequestOutput) -> None:
        if self._waited_s is not None:
            output, self._waited_s = replace(output, waited_s=self._waited_s), None
        if self._saw is not None:
            self._saw(output)
        first = self._num
        self._num += 1
        trunk = self._line.trunk
        if trunk is not None and output.finish_reason is None:
            if not self._kept:
                self._kept_waited_s = output.waited_s
            self._kept.append((output.text, output.token_ids, output.logprobs))
            self._newest = output
            trunk.put(self.request_id, first, output)
            return
        last = self._items[-1] if self._items else None
        if last is not None and last.output is not None and not last.earlier and not self._kept:
            assert last.first + last.num == first, "nothing lies between"
            self._items[-1] = replace(last, num=last.num + 1, output=joined((last.output, output)))
        else:
            self._items.append(Own(first, 1, output, tuple(self._kept), self._kept_waited_s))
            self._kept.clear()
            self._kept_waited_s = None
        self._event.set()

    def ask(self, no_trunk: NoTrunk) -> None:
        self._items.append(Own(self._num, 0, None, no_trunk=no_trunk))
        self._event.set()

    def trunk_lost(self) -> None:
        """Send what went over the trunk over the own call: nobody knows how much of it arrived."""
        if self._kept:
            self._kept.pop()
            self._items.append(Own(self._num - 1, 1, self._newest, tuple(self._kept), self._kept_waited_s))
            self._kept.clear()
            self._kept_waited_s = None
            self._event.set()

    def __aiter__(self) -> Outlet:
        return self

    async def __anext__(self) -> Own:
        if self._is_over:
            raise StopAsyncIteration
        while not self._items:
            self._event.clear()
            await self._event.wait()
        item = self._items.popleft()
        self._is_over = item.output is not None and item.output.finish_reason is not None
        return item


class Trunk:
    """One stream to one ingress; what piled up since the last read comes as one message."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_over = False
        self._parts: dict[str, tuple[int, int, RequestOutput]] = {}
        self._news = asyncio.Event()

    def put(self, request_id: str, first: int, output: RequestOutput) -> None:
        if (waiting := self._parts.get(request_id)) is None:
            self._parts[request_id] = (first, 1, output)
        else:
            begin, num, before = waiting
            assert begin + num == first, "nothing lies between"
            self._parts[request_id] = (begin, num + 1, joined((before, output)))
        self._news.set()

    def wake(self) -> None:
        """Look again whether there is anything to wait for."""
        self._news.set()

    def forget(self, request_id: str) -> None:
        self._parts.pop(request_id, None)

    async def messages(self, idle_s: Callable[[], float | None]) -> AsyncGenerator[Message, None]:
        """Until it is over, or nothing comes for ``idle_s()`` seconds (asked anew with each wake; None: for ever)."""
        yield Message(self.number, 0, ())
        number = 1
        while not self.is_over:
            self._news.clear()
            if not self._parts:
                try:
                    async with asyncio.timeout(idle_s()):
                        await self._news.wait()
                except TimeoutError:
                    if idle_s() is not None:
                        return
                continue
            parts, self._parts = self._parts, {}
            yield Message(self.number, number, tuple(_part(request_id, *one) for request_id, one in parts.items()))
            number += 1


def _part(request_id: str, first: int, num: int, output: RequestOutput) -> Part:
    usage = output.usage
    return Part(
        request_id,
        first,
        num,
        output.text,
        output.token_ids,
        (usage.num_input, usage.num_cached, usage.num_output),
        output.logprobs,
        output.waited_s,
    )


@dataclass(slots=True)
class Line:
    """What a replica has for one ingress."""

    trunk: Trunk | None = None
    outlets: dict[str, Outlet] = field(default_factory=dict)


class Trunks:
    """All that goes from one replica to its ingresses. ``name``: the replica's, in its router."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_trunks = 0
        """That there have been."""
        self._lines: dict[str, Line] = {}
        self._is_draining = False

    @property
    def num_lines(self) -> int:
        """Ingresses that have a request or a trunk here."""
        return len(self._lines)

    def open(
        self,
        ingress: str,
        request_id: str,
        waited_s: float | None = None,
        saw: Callable[[RequestOutput], None] | None = None,
    ) -> Outlet:
        """The way of a new request's outputs to its ingress; :meth:`close` it in the end. ``saw`` is told each."""
        line = self._lines.setdefault(ingress, Line())
        outlet = line.outlets[request_id] = Outlet(line, request_id, waited_s, saw)
        self._ask(line, outlet)
        return outlet

    def close(self, ingress: str, request_id: str) -> None:
        line = self._lines[ingress]
        del line.outlets[request_id]
        if line.trunk is not None:
            line.trunk.forget(request_id)
            if not line.outlets:
                line.trunk.wake()
        elif not line.outlets:
            del self._lines[ingress]

    async def attach(self, ingress: str) -> AsyncGenerator[Message, None]:
        """A trunk to this ingress, in place of the one there was."""
        line = self._lines.setdefault(ingress, Line())
        self._lose(line)
        self.num_trunks += 1
        trunk = line.trunk = Trunk(self.num_trunks)
        try:
            async with aclosing(trunk.messages(lambda: self._idle_s(line))) as messages:
                async for message in messages:
                    yield message
        finally:
            if line.trunk is trunk:
                self._lose(line)
                if line.outlets:
                    self._ask(line, next(iter(line.outlets.values())))
                else:
                    del self._lines[ingress]

    def drain(self) -> None:
        """Trunks end as soon as nothing runs for them."""
        self._is_draining = True
        for line in self._lines.values():
            if line.trunk is not None:
                line.trunk.wake()

    def _ask(self, line: Line, outlet: Outlet) -> None:
        if line.trunk is None and len(line.outlets) >= MIN_SHARED and not self._is_draining:
            outlet.ask(NoTrunk(self._name, self.num_trunks))

    def _idle_s(self, line: Line) -> float | None:
        if line.outlets:
            return None
        return 0.0 if self._is_draining else IDLE_S

    def _lose(self, line: Line) -> None:
        trunk, line.trunk = line.trunk, None
        if trunk is not None:
            trunk.is_over = True
            trunk.wake()
            for outlet in line.outlets.values():
                outlet.trunk_lost()
