"""The backlog: every waiting request, first in first out per client."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from fairserve.fairness.heaps import in_order

Item = TypeVar("Item")


class Backlog(Generic[Item]):
    """Per-client queues ordered by ``place`` (usually the arrival time), so that a request which comes back takes
    its old place. Push, pop and remove cost O(log n), amortised: a removed request is skipped when it surfaces, and a
    queue that holds mostly removed ones is rebuilt."""

    def __init__(self) -> None:
        self._queues: dict[str, list[tuple[float, int, str]]] = {}
        self._waiting: dict[str, int] = {}
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
        return iter(self._waiting)

    @property
    def num_clients(self) -> int:
        return len(self._waiting)

    def has(self, client: str) -> bool:
        """The client has at least one waiting request."""
        return client in self._waiting

    def num_waiting(self, client: str) -> int:
        return self._waiting.get(client, 0)

    def push(self, client: str, request_id: str, item: Item, place: float) -> None:
        assert request_id not in self._items, f"{request_id} waits already"
        self._num_pushed += 1
        self._items[request_id] = (client, self._num_pushed, item)
        heapq.heappush(self._queues.setdefault(client, []), (place, self._num_pushed, request_id))
        self._waiting[client] = self._waiting.get(client, 0) + 1

    def head(self, client: str) -> tuple[float, Item]:
        """Place and item of the client's first request. The client must wait."""
        queue = self._queues[client]
        while not self._is_live(queue[0]):
            heapq.heappop(queue)
        place, _, request_id = queue[0]
        return place, self._items[request_id][2]

    def first_of(self, client: str) -> Iterator[Item]:
        """The client's requests in order; the queue must not change meanwhile."""
        for _, _, request_id in in_order(self._queues.get(client, []), self._is_live):
            yield self._items[request_id][2]

    def pop(self, client: str) -> Item:
        """Take out the client's first request. The client must wait."""
        self.head(client)
        _, _, request_id = heapq.heappop(self._queues[client])
        return self._leave(request_id)

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
        client, _, item = self._items.pop(request_id)
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client], self._queues[client]
        elif len(self._queues[client]) > 2 * self._waiting[client] + 64:
            self._queues[client] = [entry for entry in self._queues[client] if self._is_live(entry)]
            heapq.heapify(self._queues[client])
        return item

    def check(self) -> None:
        assert sum(self._waiting.values()) == len(self._items)
        assert self._waiting.keys() == self._queues.keys()
        for client, queue in self._queues.items():
            assert sum(self._is_live(entry) for entry in queue) == self._waiting[client]
