"""The backlog: every waiting request, first in first out per client."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from fairserve.fairness.heaps import in_order

Item = TypeVar("Item")


class _Ticket(Generic[Item]):
    """Of one request, in its client's line; in none once it has left."""

    __slots__ = ("client", "item", "line", "request_id")

    def __init__(self, client: str, request_id: str, item: Item, line: _Line[Item]) -> None:
        self.client = client
        self.request_id = request_id
        self.item = item
        self.line: _Line[Item] | None = line


class _Line(Generic[Item]):
    """Of one client: a heap of (place, number, ticket), and how many of them still wait."""

    __slots__ = ("heap", "num_waiting")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, _Ticket[Item]]] = []
        self.num_waiting = 0


class Backlog(Generic[Item]):
    """Per-client queues ordered by ``place`` (usually the arrival time), so that a request which comes back takes
    its old place. Push, pop and remove cost O(log n), amortised: a removed request is skipped when it surfaces, and a
    queue that holds mostly removed ones is rebuilt."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[Item]] = {}
        self._tickets: dict[str, _Ticket[Item]] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tickets

    def __iter__(self) -> Iterator[Item]:
        return (ticket.item for ticket in self._tickets.values())

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
        assert request_id not in self._tickets, f"{request_id} waits already"
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = _Line()
        ticket = self._tickets[request_id] = _Ticket(client, request_id, item, line)
        self._num_pushed += 1
        heapq.heappush(line.heap, (place, self._num_pushed, ticket))
        line.num_waiting += 1

    def head(self, client: str) -> tuple[float, Item]:
        """Place and item of the client's first request. The client must wait."""
        heap = self._lines[client].heap
        while True:
            place, _, ticket = heap[0]
            if ticket.line is not None:
                return place, ticket.item
            heapq.heappop(heap)

    def first_of(self, client: str) -> Iterator[Item]:
        """The client's requests in order; the queue must not change meanwhile."""
        for _, _, ticket in in_order(self._lines[client].heap if client in self._lines else [], _waits):
            yield ticket.item

    def entries(self) -> Iterator[tuple[str, str, float, Item]]:
        """Client, request id, place and item of every request, in no order; the queue must not change meanwhile."""
        for client, line in self._lines.items():
            for place, _, ticket in filter(_waits, line.heap):
                yield client, ticket.request_id, place, ticket.item

    def pop(self, client: str) -> Item:
        """Take out the client's first request. The client must wait."""
        self.head(client)
        ticket = self._lines[client].heap[0][2]
        self._leave(ticket)
        return ticket.item

    def remove(self, request_id: str) -> Item | None:
        """Take out a request wherever it stands; None when it does not wait."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return None
        self._leave(ticket)
        return ticket.item

    def client_of(self, request_id: str) -> str | None:
        ticket = self._tickets.get(request_id)
        return None if ticket is None else ticket.client

    def _leave(self, ticket: _Ticket[Item]) -> None:
        line = ticket.line
        assert line is not None
        del self._tickets[ticket.request_id]
        ticket.line = None
        line.num_waiting -= 1
        if not line.num_waiting:
            del self._lines[ticket.client]
        elif line.heap[0][2] is ticket:
            heapq.heappop(line.heap)
        elif len(line.heap) > 2 * line.num_waiting + 64:
            line.heap = list(filter(_waits, line.heap))
            heapq.heapify(line.heap)

    def check(self) -> None:
        assert sum(line.num_waiting for line in self._lines.values()) == len(self._tickets)
        assert all(self._lines[ticket.client] is ticket.line for ticket in self._tickets.values())
        for line in self._lines.values():
            assert sum(map(_waits, line.heap)) == line.num_waiting > 0


def _waits(entry: tuple[float, int, _Ticket[Any]]) -> bool:
    return entry[2].line is not None
