"""Every request that waits: in the policy's order or, while its client is paused, aside."""

from __future__ import annotations

from collections.abc import Iterator

from fairserve.dispatch.controls import Controls
from fairserve.dispatch.leases import Waiting
from fairserve.fairness.queue import FairQueue


class WaitingRoom:
    """A paused client is not backlogged: no policy sees it, gap and level leave it out. Its requests keep the time of
    their arrival, count towards the limits, and come back as arrivals when it is resumed: in their old order, and the
    client is lifted like any that becomes active."""

    def __init__(self, queue: FairQueue[Waiting], controls: Controls) -> None:
        self._queue = queue
        self._controls = controls
        self._aside: dict[str, dict[str, Waiting]] = {}
        self._client: dict[str, str] = {}
        """Of each request that is aside."""

    def __len__(self) -> int:
        return len(self._queue) + len(self._client)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queue or request_id in self._client

    @property
    def num_clients(self) -> int:
        """With a waiting request."""
        return self._queue.backlog.num_clients + len(self._aside)

    def num_waiting(self, client: str) -> int:
        return self._queue.backlog.num_waiting(client) + len(self._aside.get(client, ()))

    def paused(self) -> Iterator[str]:
        """Clients whose requests are aside."""
        return iter(self._aside)

    def first(self, client: str) -> Waiting | None:
        """The request of this client that has waited longest, or None. O(its requests) while it is paused."""
        if self._queue.backlog.has(client):
            return self._queue.backlog.head(client)[1]
        return min(self._aside.get(client, {}).values(), key=_arrival, default=None)

    # -- events -----------------------------------------------------------------------------------------------------

    def enter(self, waiting: Waiting) -> float:
        """A request waits, new or again. Returns by how much counters were lifted."""
        client, request_id = waiting.submit.client, waiting.submit.request_id
        if not self._controls.is_paused(client):
            return self._queue.arrive(client, request_id, waiting, waiting.arrived_s)
        assert request_id not in self, f"{request_id} waits already"
        self._client[request_id] = client
        self._aside.setdefault(client, {})[request_id] = waiting
        return 0.0

    def remove(self, request_id: str) -> Waiting | None:
        """Take out one request wherever it stands; None when it does not wait."""
        client = self._client.pop(request_id, None)
        if client is None:
            return self._queue.remove(request_id)
        waiting = self._aside[client].pop(request_id)
        if not self._aside[client]:
            del self._aside[client]
        return waiting

    def regroup(self, client: str) -> float:
        """The client may have been paused or resumed: its requests go where they belong. Returns the lift."""
        if self._controls.is_paused(client):
            moved = list(self._queue.backlog.first_of(client))
        else:
            moved = sorted(self._aside.get(client, {}).values(), key=_arrival)
        rise = 0.0
        for waiting in moved:
            self.remove(waiting.submit.request_id)
            rise += self.enter(waiting)
        return rise

    def check(self) -> None:
        assert all(self._aside.values()), "an empty client is aside"
        assert {r: client for client, requests in self._aside.items() for r in requests} == self._client
        assert all(map(self._controls.is_paused, self._aside)), "a client that is not paused is aside"
        assert not any(map(self._controls.is_paused, self._queue.backlog.clients())), "a paused client is in the order"


def _arrival(waiting: Waiting) -> float:
    return waiting.arrived_s
