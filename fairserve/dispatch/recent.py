"""The last minute in numbers: who was served how fast, who waited how long, which replica brought how many tokens.

A decision pays a few dictionary entries per event; sums are made when a second is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import exp

from fairserve.fairness.bounds import jain
from fairserve.fairness.hierarchy import path_of

RATE_S = 10
"""Seconds over which rates are taken."""
SHARE_S = 60
"""Seconds over which shares of service are compared."""
WAIT_TAU_S = 30.0
MOST_SEEN = 100_000
LONGEST_S = 100 * WAIT_TAU_S
"""From the origin of weights on: no weight comes near the largest float."""
LEAST_WEIGHT = 0.01
"""A mean wait whose newest grant weighs less (about 140 s ago) is no longer of late."""


class WindowSums:
    """Sums per key over the last ``num_seconds`` whole seconds; the second under way is not in them."""

    def __init__(self, num_seconds: int) -> None:
        self._num_seconds = num_seconds
        self._seconds: deque[tuple[int, dict[str, float]]] = deque()
        self._sums: dict[str, float] = {}
        self._newest: dict[str, int] = {}
        """The last second in which the key stands."""
        self.current: dict[str, float] = {}
        """The second under way: whoever counts, adds here."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def sum_of(self, key: str) -> float:
        return self._sums.get(key, 0.0)

    @property
    def total(self) -> float:
        return sum(self._sums.values())

    def close(self, second: int) -> dict[str, float]:
        """``current`` was the second of that number, and a new one begins. Returns what it held."""
        closed, self.current = self.current, {}
        if closed:
            self._seconds.append((second, closed))
            for key, amount in closed.items():
                self._sums[key] = self._sums.get(key, 0.0) + amount
                self._newest[key] = second
        while self._seconds and self._seconds[0][0] <= second - self._num_seconds:
            old, amounts = self._seconds.popleft()
            for key, amount in amounts.items():
                if self._newest[key] == old:  # not subtracted: what rounding leaves would stay for ever
                    del self._sums[key], self._newest[key]
                else:
                    self._sums[key] -= amount
        return closed


@dataclass(slots=True)
class _Waits:
    """Waits of one client, each weighing exp((time - origin) / ``WAIT_TAU_S``): less by 1/e for every ``WAIT_TAU_S``
    that it lies further back."""

    sum_s: float
    weight: float


class Recent:
    """Fed by the dispatcher, read by whoever shows it. It goes from one dispatcher to its successor."""

    def __init__(self) -> None:
        self._service = WindowSums(RATE_S)
        self._shares = WindowSums(SHARE_S)
        """Service / weight of the members of the top level."""
        self._tokens = WindowSums(RATE_S)
        self._waits: dict[str, _Waits] = {}
        self._origin_s = 0.0
        """Of their weights."""
        self._waiting_since: dict[str, float] = {}
        """Members of the top level that wait."""
        self._seen_s: dict[str, float] = {}
        """When each client last had a request, the longest ago first."""
        self.num_refused: dict[str, int] = {}
        """By client, since the authority began."""
        self.num_all_refused = 0
        self._forgotten: set[str] = set()
        """In the second under way."""
        self._second: int | None = None
        self._began_s = 0.0

    # -- events -------------------------------------------------------------------------------------------------------

    def begins(self) -> None:
        """A new life of the authority: nobody waits yet."""
        self._waiting_since.clear()

    def moved(self, client: str, is_waiting: Callable[[str], bool], now_s: float) -> None:
        """The client may have begun or ceased to wait."""
        top = path_of(client)[0]
        if not is_waiting(top):
            self._waiting_since.pop(top, None)
        elif top not in self._waiting_since:
            self._waiting_since[top] = now_s

    def seen(self, client: str, now_s: float) -> None:
        """It has a request."""
        self._seen_s.pop(client, None)
        self._seen_s[client] = now_s
        if len(self._seen_s) > MOST_SEEN:
            del self._seen_s[next(iter(self._seen_s))]

    def forget(self, client: str) -> None:
        for table in (self._waits, self._seen_s, self.num_refused):
            table.pop(client, None)
        self._forgotten.add(client)

    def granted(self, granted: Iterable[tuple[str, float]], now_s: float) -> None:
        """Of which clients, after how many seconds."""
        if now_s - self._origin_s > LONGEST_S:
            self._forget(now_s)
        weight, of = exp((now_s - self._origin_s) / WAIT_TAU_S), self._waits
        for client, waited_s in granted:
            waits = of.get(client)
            if waits is None:
                of[client] = _Waits(waited_s * weight, weight)
            else:
                waits.sum_s += waited_s * weight
                waits.weight += weight

    def refused(self, client: str, now_s: float) -> None:
        self.num_refused[client] = self.num_refused.get(client, 0) + 1
        self.num_all_refused += 1
        self.seen(client, now_s)

    def served(self, replica: str, shares: Iterable[tuple[str, float, float]], num_tokens: int) -> None:
        """A report of ``replica`` brought so many tokens more. ``shares``: client, its service, and that / weight at
        the top level."""
        services, tops, tokens = self._service.current, self._shares.current, self._tokens.current
        tokens[replica] = tokens.get(replica, 0) + num_tokens
        for client, service, share in shares:
            services[client] = services.get(client, 0.0) + service
            top = client if "/" not in client else path_of(client)[0]
            tops[top] = tops.get(top, 0.0) + share

    def tick(self, now_s: float) -> None:
        """Call it a few times a second."""
        second = int(now_s)
        if self._second is None:
            self._second, self._began_s = second, now_s
        elif second > self._second:
            for client in self._service.close(self._second):
                if client not in self._forgotten:
                    self.seen(client, now_s)
            self._forgotten.clear()
            self._shares.close(self._second)
            self._tokens.close(self._second)
            if second // SHARE_S > self._second // SHARE_S:
                self._forget(now_s)
            self._second = second

    # -- questions ----------------------------------------------------------------------------------------------------

    def service_per_s(self, client: str, now_s: float) -> float:
        return self._service.sum_of(client) / self._rate_s(now_s)

    def all_service_per_s(self, now_s: float) -> float:
        return self._service.total / self._rate_s(now_s)

    def tokens_per_s(self, replica: str, now_s: float) -> float:
        return self._tokens.sum_of(replica) / self._rate_s(now_s)

    def all_tokens_per_s(self, now_s: float) -> float:
        return self._tokens.total / self._rate_s(now_s)

    def mean_wait_s(self, client: str, now_s: float) -> float:
        """0 when nothing of it was granted of late."""
        waits = self._waits.get(client)
        if waits is None:
            return 0.0
        weight = waits.weight * exp((self._origin_s - now_s) / WAIT_TAU_S)
        return waits.sum_s / waits.weight if weight >= LEAST_WEIGHT else 0.0

    def seen_s(self, client: str) -> float | None:
        """When it last had a request, to the second; by the authority's clock."""
        return self._seen_s.get(client)

    def active_since(self, since_s: float) -> Iterator[str]:
        """Clients with a request since then, the latest first."""
        for client, seen_s in reversed(self._seen_s.items()):
            if seen_s < since_s:
                return
            yield client

    def jain(self, is_waiting: Callable[[str], bool]) -> float:
        """Jain's index of service / weight over the last ``SHARE_S`` whole seconds, among the members of the top level
        that waited throughout; 1 for fewer than two."""
        if self._second is None:
            return 1.0
        since = self._second - SHARE_S
        waiting = (node for node, since_s in self._waiting_since.items() if since_s <= since and is_waiting(node))
        return jain([max(0.0, self._shares.sum_of(node)) for node in waiting])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _rate_s(self, now_s: float) -> float:
        return min(float(RATE_S), max(1.0, now_s - self._began_s))

    def _forget(self, now_s: float) -> None:
        """Waits that weigh next to nothing; the others weigh what they do now."""
        left, self._origin_s = exp((self._origin_s - now_s) / WAIT_TAU_S), now_s
        for waits in self._waits.values():
            waits.sum_s, waits.weight = waits.sum_s * left, waits.weight * left
        self._waits = {client: waits for client, waits in self._waits.items() if waits.weight >= LEAST_WEIGHT}
