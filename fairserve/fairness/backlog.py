"""The backlog: every waiting request, first in first out per client."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from fairserve.fairness.heaps import in_order

Item = TypeVar("Item")


class _Line:
    """Of one client: a heap of (place, number, request id), and how many of them still wait."""

    __slots__ = ("heap", "num_waiting")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, str]] = []
        self.num_waiting = 0


class Backlog(Generic[Item]):
    """Per-client queues ordered by ``place`` (usually the arrival time), so that a request which comes back takes
    its old place. Push, pop and remove cost O(log n), amortised: a removed request is skipped when it surfaces, and a
    queue that holds mostly removed ones is rebuilt."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._items: dict[str, tuple[str, int, Item]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._items

    def __iter__(self) -> Iterator[Item]:
        return (item for _, _, item in self._items.values())

    def clients(self) -> Iterator[str]:
        """Clients with at least one waiting request."""
        return iter(self._lines)

    @property
    def num_clients(self) -> int:
        return len(self._lines)

    def has(self, client: str) -> bool:
        """The client has at least one waiting request."""
        return client in self._lines

    def num_waiting(self, client: str) -> int:
        line = self._lines.get(client)
        return 0 if line is None else line.num_waiting

    def push(self, client: str, request_id: str, item: Item, place: float) -> None:
        assert request_id not in self._items, f"{request_id} waits already"
        self._num_pushed += 1
        self._items[request_id] = (client, self._num_pushed, item)
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line()
        heapq.heappush(line.heap, (place, self._num_pushed, request_id))
        line.num_waiting += 1

    def head(self, client: str) -> tuple[float, Item]:
        """Place and item of the client's first request. The client must wait."""
        queue, items = self._lines[client].heap, self._items
        while True:
            place, number, request_id = queue[0]
            entry = items.get(request_id)
            if entry is not None and entry[1] == number:
                return place, entry[2]
            heapq.heappop(queue)

    def first_of(self, client: str) -> Iterator[Item]:
        """The client's requests in order; the queue must not change meanwhile."""
        for _, _, request_id in in_order(self._lines[client].heap if client in self._lines else [], self._is_live):
            yield self._items[request_id][2]

    def entries(self) -> Iterator[tuple[str, str, float, Item]]:
        """Client, request id, place and item of every request, in no order; the queue must not change meanwhile."""
        for client, line in self._lines.items():
            for entry in filter(self._is_live, line.heap):
                yield client, entry[2], entry[0], self._items[entry[2]][2]

    def pop(self, client: str) -> Item:
        """Take out the client's first request. The client must wait."""
        self.head(client)
        return self._leave(self._lines[client].heap[0][2])

    def remove(self, request_id: str) -> Item | None:
        """Take out a request wherever it stands; None when it does not wait."""
        return self._leave(request_id) if request_id in self._items else None

    def client_of(self, request_id: str) -> str | None:
        entry = self._items.get(request_id)
        return entry[0] if entry else None

    def _is_live(self, entry: tuple[float, int, str]) -> bool:
        item = self._items.get(entry[2])
        return item is not None and item[1] == entry[1]

    def _leave(self, request_id: str) -> Item:
        client, number, item = self._items.pop(request_id)
        line = self._lines[client]
        line.num_waiting -= 1
        if not line.num_waiting:
            del self._lines[client]
        elif line.heap[0][1] == number:
            heapq.heappop(line.heap)
        elif len(line.heap) > 2 * line.num_waiting + 64:
            line.heap = [entry for entry in line.heap if self._is_live(entry)]
            heapq.heapify(line.heap)
        return item

    def check(self) -> None:
        assert sum(line.num_waiting for line in self._lines.values()) == len(self._items)
        for line in self._lines.values():
            assert sum(map(self._is_live, line.heap)) == line.num_waiting > 0
