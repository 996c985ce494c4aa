"""FairQueue: backlog + counters + policy behind one mutating door. The cluster's dispatcher and every replica's local
queue are each one of these."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from fairserve.fairness.backlog import Backlog
from fairserve.fairness.counters import CounterTable
from fairserve.fairness.policy import Policy

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Waiting requests in the policy's order. Every operation costs O(log n) in clients and waiting requests.

    The order is a heap of (order, client) with stale entries skipped: a client's newest entry counts.
    """

    def __init__(self, policy: Policy, table: CounterTable | None = None) -> None:
        self.policy = policy
        self.table = table if table is not None else CounterTable()
        self._backlog: Backlog[Item] = Backlog()
        self._heap: list[tuple[float, str]] = []
        self._order: dict[str, float] = {}

    # -- questions ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._backlog)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._backlog

    @property
    def backlog(self) -> Backlog[Item]:
        """To look at; only this class writes it."""
        return self._backlog

    @property
    def last_to_leave(self) -> str | None:
        return self._backlog.last_to_leave

    def counter(self, client: str) -> float:
        return self.table.counter(client)

    def place(self, client: str) -> float:
        return self._backlog.head(client)[0]

    def is_waiting(self, client: str) -> bool:
        return self._backlog.num_waiting(client) > 0

    def least_served(self) -> str | None:
        """The waiting client that goes next, or None."""
        while self._heap:
            order, client = self._heap[0]
            if self._order.get(client) == order:
                return client
            heapq.heappop(self._heap)
        return None

    def peek(self) -> Item | None:
        """The request that goes next, or None."""
        client = self.least_served()
        return None if client is None else self._backlog.head(client)[1]

    # -- events ---------------------------------------------------------------------------------------------------

    def arrive(self, client: str, request_id: str, item: Item, place: float, *, lift: bool = True) -> float:
        """A request waits at ``place`` in its client's queue. Returns by how much the counter was lifted.

        ``lift`` False is for a request that was running here and comes back (a preemption): its client never left.
        """
        if client not in self.table:
            self.table.register(client)
        rise = 0.0
        if lift and not self.is_waiting(client):
            target = self.policy.lift(client, self)
            if target is not None:
                rise = self.table.lift(client, target)
        self._backlog.push(client, request_id, item, place)
        self._reorder(client)
        return rise

    def pop(self) -> Item:
        """Take out what :meth:`peek` names. There must be one."""
        client = self.least_served()
        assert client is not None, "pop from an empty queue"
        item = self._backlog.pop(client)
        self._reorder(client)
        return item

    def remove(self, request_id: str) -> Item | None:
        """Take out one request wherever it stands; None when it does not wait."""
        client = self._backlog.client_of(request_id)
        if client is None:
            return None
        item = self._backlog.remove(request_id)
        self._reorder(client)
        return item

    def charge(self, client: str, service: float) -> float:
        amount = self.table.charge(client, service)
        self._reorder(client)
        return amount

    def give_back(self, client: str, amount: float) -> None:
        self.table.give_back(client, amount)
        self._reorder(client)

    def set_counter(self, client: str, counter: float) -> None:
        self.table.set(client, counter)
        self._reorder(client)

    def restore_last_to_leave(self, client: str | None) -> None:
        """After a restart: the second branch of the lift needs it."""
        self._backlog.last_to_leave = client

    def _reorder(self, client: str) -> None:
        if not self.is_waiting(client):
            self._order.pop(client, None)
            return
        order = self.policy.order(client, self)
        if self._order.get(client) != order:
            self._order[client] = order
            heapq.heappush(self._heap, (order, client))
            if len(self._heap) > 4 * len(self._order) + 64:
                self._heap = [(order, client) for client, order in self._order.items()]
                heapq.heapify(self._heap)

    def check(self) -> None:
        self.table.check()
        self._backlog.check()
        assert self._order.keys() == set(self._backlog.clients())
        for client, order in self._order.items():
            assert order == self.policy.order(client, self), client
        first = self.least_served()
        if first is not None:
            assert (self._order[first], first) == min((order, name) for name, order in self._order.items())
