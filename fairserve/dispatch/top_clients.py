"""Which clients get a label of their own in metrics: the busiest few, while they stay busy; all others are "other".

A label costs a series in every store that scrapes us, for ever, and beyond 2,000 label sets per metric and node Ray
loses whose is whose. So names are rationed twice: at most ``size`` have a label at a time, at most ``max_names`` ever
in one process. Full numbers of every client come from the counter actor's own answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nlargest
from math import exp

RIVAL = 1.5
"""Somebody without a label takes one over when it is this many times as busy as the least busy one with a label."""
TENURE_S = 30.0
"""For how long nobody takes a new label away: until then nothing but chance says who is busier."""
MEMORY_S = 30.0
"""Time constant of how busy a client counts as."""
NAMES_PER_LABEL = 5
MOST_NAMES = 200
"""Counters of three kinds or five outcomes, by several processes on one node, stay below 2,000 label sets."""
REMEMBERED = 50
"""Clients without a label whose activity is remembered, for each label that there may be."""


class TopClients:
    """``other``: the label of everybody else; a client of that very name has no label of its own."""

    def __init__(self, size: int, other: str, max_names: int | None = None) -> None:
        assert size > 0
        self._size = size
        self._other = other
        self._max_names = max_names or max(size, min(size * NAMES_PER_LABEL, MOST_NAMES))
        self._busy: dict[str, float] = {}
        self._labels: dict[str, float] = {}
        """Since when."""
        self._names: set[str] = set()
        self._last_s: float | None = None

    @property
    def labelled(self) -> tuple[str, ...]:
        return tuple(self._labels)

    @property
    def has_room(self) -> bool:
        """Somebody may have a label and take it from nobody."""
        return len(self._labels) < self._size and len(self._names) < self._max_names

    def label(self, client: str) -> str:
        """What to write for this client."""
        return client if client in self._labels else self._other

    def update(self, activity: Mapping[str, float], now_s: float) -> set[str]:
        """``activity``: how busy clients were since the last call, in any one unit. Returns who lost its label."""
        elapsed_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        decay = exp(-elapsed_s / MEMORY_S)
        total = sum(activity.values()) or 1.0
        busy = {client: amount * decay for client, amount in self._busy.items()}
        for client, amount in activity.items():
            busy[client] = busy.get(client, 0.0) + amount / total
        kept = nlargest(REMEMBERED * self._size, busy, key=lambda client: (busy[client], client))
        self._busy = {client: busy[client] for client in (*kept, *self._labels) if client in busy}
        rivals = [client for client in kept if self._may_have(client)][: 2 * self._size]
        left = set()
        for rival in rivals:
            if len(self._labels) >= self._size:
                tenured = [client for client, since_s in self._labels.items() if now_s - since_s >= TENURE_S]
                weakest = min(tenured, key=self._rank, default=None)
                if weakest is None or self._busy[rival] <= RIVAL * self._busy.get(weakest, 0.0):
                    break
                del self._labels[weakest]
                left.add(weakest)
            if rival in self._names or len(self._names) < self._max_names:
                self._names.add(rival)
                self._labels[rival] = now_s
        return left - self._labels.keys()

    def _may_have(self, client: str) -> bool:
        is_affordable = client in self._names or len(self._names) < self._max_names
        return is_affordable and client not in self._labels and client != self._other

    def _rank(self, client: str) -> tuple[float, str]:
        return self._busy.get(client, 0.0), client
