"""How unfair the cluster can get, and how unfair it has been.

VTC (arXiv 2401.00588, lemma 4.3 and theorem 4.4): the counters of waiting clients lie within U of each other, and two
clients that wait throughout an interval receive service that differs by at most 2U, with U = max(w_p * L, w_q * M).
A client that waits and any other client: at most 4U (derived).

Ours is the same argument with what the authority itself can observe, so that it holds for any cost function, for
weights and for many replicas. All amounts are service / weight. After client g is picked for the last time before t,
its counter can still rise by the input charge of that pick and the output that its granted, unfinished requests may
still make; therefore

    U = the most, over all grants, of  charge of the grant + output still owed to the client's granted requests.

Service that was delivered differs from the counters by what is not yet merged and by input charged but not started:

    S = sum over replicas of the largest net amount one report merged + the most input charge in flight of one client.

Bound for two clients that wait throughout: 2 * (U + S). With one replica, no lookahead and immediate reports, U is at
most the paper's and S is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping


class BoundTracker:
    """Collects U and S as the run goes; every ``saw_`` method is O(1). Amounts are service / weight."""

    def __init__(self) -> None:
        self._unit = 0.0
        self._unmerged: dict[str, float] = {}
        self._in_flight = 0.0

    def saw_grant(self, charge: float, owed: float) -> None:
        """``owed``: output service that the client's granted, unfinished requests may still make, this one included."""
        self._unit = max(self._unit, charge + owed)

    def saw_in_flight(self, charge: float) -> None:
        """Input charges of one client that no replica has started yet."""
        self._in_flight = max(self._in_flight, charge)

    def saw_merge(self, replica: str, amount: float) -> None:
        """Net amount that one report of ``replica`` added to the counters of one client or more."""
        if amount > self._unmerged.get(replica, 0.0):
            self._unmerged[replica] = amount

    @property
    def unit(self) -> float:
        """U."""
        return self._unit

    @property
    def staleness(self) -> float:
        """S."""
        return sum(self._unmerged.values()) + self._in_flight

    @property
    def bound(self) -> float:
        """Largest service / weight difference that two clients which both wait throughout an interval may show."""
        return 2.0 * (self.unit + self.staleness)


class GapMonitor:
    """The worst service gap among pairs of clients, over intervals in which both wait throughout.

    For each pair it keeps the least and the greatest difference of their service / weight since both wait; the worst
    gap of any sub-interval is greatest - least. Cost per observation: (clients that changed) x (clients waiting), the
    latter at most ``max_clients``; further clients are not watched, and :attr:`num_unwatched` counts them.
    """

    def __init__(self, max_clients: int = 64) -> None:
        self._max_clients = max_clients
        self._watched: dict[str, float] = {}
        self._range: dict[tuple[str, str], tuple[float, float]] = {}
        self.worst = 0.0
        self.worst_pair: tuple[str, str] | None = None
        self.num_unwatched = 0

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        """``service``: service / weight so far of the clients whose value or waiting state may have changed."""
        for client, value in service.items():
            if not is_waiting(client):
                self._left(client)
                continue
            if client not in self._watched and len(self._watched) >= self._max_clients:
                self.num_unwatched += 1
                continue
            self._watched[client] = value
        for client in service:
            if client in self._watched:
                self._compare(client)

    def _left(self, client: str) -> None:
        """The client stopped waiting: its intervals end."""
        if self._watched.pop(client, None) is not None:
            for pair in [pair for pair in self._range if client in pair]:
                del self._range[pair]

    def _compare(self, client: str) -> None:
        for other in self._watched:
            if other == client:
                continue
            pair = (client, other) if client < other else (other, client)
            difference = self._watched[pair[0]] - self._watched[pair[1]]
            low, high = self._range.get(pair, (difference, difference))
            low, high = min(low, difference), max(high, difference)
            self._range[pair] = (low, high)
            if high - low > self.worst:
                self.worst, self.worst_pair = high - low, pair


def jain(values: Collection[float]) -> float:
    """Jain's index of non-negative values: 1 when all are equal, 1/n when one has everything; 1 for none."""
    total = sum(values)
    squares = sum(value * value for value in values)
    return 1.0 if squares == 0 else total * total / (len(values) * squares)
