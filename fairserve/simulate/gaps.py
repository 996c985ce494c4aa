"""``GapMonitor`` of ``fairness/bounds.py`` on arrays: all pairs at once, for runs in which many clients always wait.

With 64 clients watched, 20 of which received something, it takes an eighth of the monitor's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

NOBODY = np.nan


class PairGaps:
    """The worst difference of service / weight of two nodes over intervals in which both are watched throughout."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._service = np.empty(0)
        """By slot; ``NOBODY`` where there is none."""
        self._lead = np.empty((0, 0))
        """[a, b]: the most that service of a minus service of b has been since both are watched; else -inf."""
        self.worst = 0.0

    def __contains__(self, node: str) -> bool:
        return node in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    @property
    def is_full(self) -> bool:
        return len(self._slots) >= self._max_nodes

    def join(self, node: str, service: float) -> None:
        """The node is watched from now on. There must be room."""
        assert node not in self._slots and not self.is_full
        if not self._free:
            self._grow()
        slot = self._slots[node] = self._free.pop()
        self._service[slot] = service
        since = service - self._service
        self._lead[slot] = np.where(np.isnan(since), -np.inf, since)
        self._lead[:, slot] = np.where(np.isnan(since), -np.inf, -since)

    def leave(self, node: str) -> None:
        """Its intervals end."""
        slot = self._slots.pop(node)
        self._free.append(slot)
        self._service[slot] = NOBODY
        self._lead[slot] = self._lead[:, slot] = -np.inf

    def move(self, service: Mapping[str, float]) -> None:
        """Some nodes' service has risen; those that are not watched are passed over."""
        changed = False
        for node, value in service.items():
            slot = self._slots.get(node)
            if slot is not None:
                self._service[slot] = value
                changed = True
        if changed:
            now = self._service
            np.fmax(self._lead, now[:, None] - now, out=self._lead)  # fmax: what is compared with nobody stays
            self.worst = max(self.worst, float((self._lead + self._lead.T).max()))

    def _grow(self) -> None:
        had = len(self._service)
        size = min(self._max_nodes, max(8, 2 * had))
        service, lead = np.full(size, NOBODY), np.full((size, size), -np.inf)
        service[:had], lead[:had, :had] = self._service, self._lead
        self._service, self._lead = service, lead
        self._free = list(range(size - 1, had - 1, -1))
