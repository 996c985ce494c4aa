"""The virtual counters: service per unit of weight, per client (VTC's c_i)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fairserve.fairness.nodes import Node


class CounterTable:
    """Plain arithmetic on counters and weights; who may call it, and when, is the owner's business.

    A counter is service / weight, summed charge by charge, plus lifts. Only differences between counters mean
    anything: :meth:`rebase` moves all of them by the same amount.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def register(self, client: str, weight: float = 1.0) -> Node:
        """Make the client known at counter 0, or change its weight; charges made so far stay as they were.

        Raises:
            ValueError: when ``weight`` is not a positive, finite number.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight of client {client!r} must be positive and finite, not {weight}")
        node = self._nodes.get(client)
        if node is None:
            node = self._nodes[client] = Node(client, weight)
        node.weight = weight
        return node

    def __contains__(self, client: str) -> bool:
        return client in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def node(self, client: str) -> Node:
        """Of a client or group that is known."""
        return self._nodes[client]

    def remove(self, client: str) -> None:
        """The client is not known any more."""
        del self._nodes[client]

    def counter(self, client: str) -> float:
        node = self._nodes.get(client)
        return 0.0 if node is None else node.counter

    def weight(self, client: str) -> float:
        node = self._nodes.get(client)
        return 1.0 if node is None else node.weight

    def add(self, client: str, amount: float) -> None:
        """Add service / weight; negative gives a charge back."""
        self._nodes[client].counter += amount

    def set(self, client: str, counter: float) -> None:
        """Take a counter over from elsewhere: a snapshot, or the authority's reply."""
        if not math.isfinite(counter):
            raise ValueError(f"counter of client {client!r} must be finite, not {counter}")
        node = self._nodes.get(client) or self.register(client)
        node.counter = counter

    def lift(self, client: str, to: float) -> float:
        """Raise the counter to ``to`` if it is below; a debt is never forgiven. Returns the rise (>= 0)."""
        node = self._nodes[client]
        rise = max(0.0, to - node.counter)
        if rise:
            node.counter = to
        return rise

    def rebase(self) -> float:
        """Subtract the least counter from all, so that floats keep their precision. Returns what it took."""
        base = min((node.counter for node in self._nodes.values()), default=0.0)
        if base:
            for node in self._nodes.values():
                node.counter -= base
        return base

    def check(self) -> None:
        assert all(node.name == name and math.isfinite(node.counter) for name, node in self._nodes.items())
        assert all(node.weight > 0 for node in self._nodes.values())
