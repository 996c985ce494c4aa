"""The virtual counters: service per unit of weight, per client (VTC's c_i)."""

from __future__ import annotations

import math
from collections.abc import Iterator


class CounterTable:
    """Plain arithmetic on counters and weights; who may call it, and when, is the owner's business.

    A counter is service / weight, summed charge by charge, plus lifts. Only differences between counters mean
    anything: :meth:`rebase` moves all of them by the same amount.
    """

    def __init__(self) -> None:
        self._counter: dict[str, float] = {}
        self._weight: dict[str, float] = {}

    def register(self, client: str, weight: float = 1.0) -> None:
        """Make the client known at counter 0, or change its weight; charges made so far stay as they were.

        Raises:
            ValueError: when ``weight`` is not a positive, finite number.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight of client {client!r} must be positive and finite, not {weight}")
        self._counter.setdefault(client, 0.0)
        self._weight[client] = weight

    def __contains__(self, client: str) -> bool:
        return client in self._counter

    def __len__(self) -> int:
        return len(self._counter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counter)

    def remove(self, client: str) -> None:
        """The client is not known any more."""
        del self._counter[client], self._weight[client]

    def counter(self, client: str) -> float:
        return self._counter.get(client, 0.0)

    def weight(self, client: str) -> float:
        return self._weight.get(client, 1.0)

    def add(self, client: str, amount: float) -> None:
        """Add service / weight; negative gives a charge back."""
        self._counter[client] += amount

    def set(self, client: str, counter: float) -> None:
        """Take a counter over from elsewhere: a snapshot, or the authority's reply."""
        if not math.isfinite(counter):
            raise ValueError(f"counter of client {client!r} must be finite, not {counter}")
        self._counter[client] = counter
        self._weight.setdefault(client, 1.0)

    def lift(self, client: str, to: float) -> float:
        """Raise the counter to ``to`` if it is below; a debt is never forgiven. Returns the rise (>= 0)."""
        rise = max(0.0, to - self._counter[client])
        if rise:
            self._counter[client] = to
        return rise

    def rebase(self) -> float:
        """Subtract the least counter from all, so that floats keep their precision. Returns what it took."""
        base = min(self._counter.values(), default=0.0)
        if base:
            for client in self._counter:
                self._counter[client] -= base
        return base

    def check(self) -> None:
        assert self._counter.keys() == self._weight.keys()
        assert all(math.isfinite(value) for value in self._counter.values())
        assert all(weight > 0 for weight in self._weight.values())
