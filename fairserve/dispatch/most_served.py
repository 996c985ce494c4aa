"""Who among the clients with a granted request has been served most: the one that would give way."""

from __future__ import annotations

import heapq
from typing import Any

from fairserve.dispatch.leases import Leases
from fairserve.dispatch.watch import Watch
from fairserve.fairness.hierarchy import path_of
from fairserve.fairness.queue import Amounts, FairQueue


class MostServed:
    """By counters without what was charged and is not served yet: output that was only predicted makes nobody ahead.

    Where names are flat, a heap with an entry for each client that is at least what it has been served, put right when
    it surfaces: O(log n) for each counter that moved. In a hierarchy every client is looked at.
    """

    def __init__(self, queue: FairQueue[Any], leases: Leases, watch: Watch) -> None:
        self._queue = queue
        self._leases = leases
        self._unserved = watch.unserved
        self._moved = queue.tell_moves()
        self._heap: list[tuple[float, str]] = []

    def lead(self, ahead: str, behind: str) -> float:
        """How much more the first client has been served than the second was charged, where their paths part: what was
        granted to the second already, be it over the top, closes the gap that let it in."""
        for one, other in zip(path_of(ahead), path_of(behind), strict=False):
            if one != other:
                return self._served(one) - self._queue.counter(other)
        return 0.0

    def first(self) -> str | None:
        """The client that has been served most; None when nothing is granted."""
        if len(self._queue.groups) > 1:
            self._moved.clear()
            return max(self._leases.clients(), key=self._standing, default=None)
        heap, is_running = self._heap, self._leases.num_of
        for client in self._moved:
            if is_running(client):
                heapq.heappush(heap, (-self._served(client), client))
        self._moved.clear()
        while heap:
            key, client = heap[0]
            if not is_running(client):
                heapq.heappop(heap)
            elif (true := -self._served(client)) == key:
                self._shrink()
                return client
            else:
                heapq.heapreplace(heap, (true, client))
        return None

    def _served(self, node: str) -> float:
        return self._queue.counter(node) - self._unserved.get(node, 0.0)

    def _standing(self, client: str) -> Amounts:
        return tuple(map(self._served, path_of(client)))

    def _shrink(self) -> None:
        """Many entries are of the past."""
        if len(self._heap) > 4 * self._leases.num_clients + 64:
            self._heap = [(-self._served(client), client) for client in self._leases.clients()]
            heapq.heapify(self._heap)
