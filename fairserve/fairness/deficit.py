"""Deficit round robin over clients, plain and with locality.

DRR: Shreedhar and Varghese, SIGCOMM'95, with debt as in VTC (arXiv 2401.00588, appendix): a request's cost is not known
when it starts, so a client may fall into debt and sits rounds out until its quanta have paid it.

DLPM and D2LPM: arXiv 2501.14312, algorithms 1 and 2. A round gives every waiting client ``quantum`` of service; among
clients with some left, the request with the longest cached prefix goes first; when nobody has any left, the next round
begins.

In counters: a client with counter c has deficit left in round r exactly while c < (r + 1) * quantum. So its round is
floor(c / quantum), the least round goes first, and "everybody's deficit <= 0, add a quantum to all" is the moment when
the least round rises. One notion, the counter, serves VTC (quantum to 0) and these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from fairserve.fairness.policy import Order, Place, Policy
from fairserve.fairness.waiting import WaitingClients


class Drr(Policy):
    """Clients of the present round one after the other (by name), each until its quantum is used up.

    ``quantum``: service / weight per round; the paper's comparison uses M / 20.
    """

    name = "drr"

    def __init__(self, quantum: float = 500.0) -> None:
        if not quantum > 0:
            raise ValueError(f"quantum must be above 0, not {quantum}")
        self.quantum = quantum

    def order(self, client: str, waiting: WaitingClients) -> Order:
        return floor(waiting.counter(client) / self.quantum)

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        """To the beginning of the present round: whoever comes gets one quantum, and debts stay."""
        reference = waiting.least_served() or waiting.last_to_leave
        return None if reference is None else floor(waiting.counter(reference) / self.quantum) * self.quantum


class Dlpm(Drr):
    """Deficit longest prefix match: within a round the longest cached prefix goes first.

    Only the first requests of at most ``window`` clients are matched: the authors' central variant matched the whole
    queue against every replica and lost 40 % of a decode step to it at 8 replicas.
    """

    name = "dlpm"

    def __init__(self, quantum: float = 500.0, window: int = 32) -> None:
        super().__init__(quantum)
        self.window = window


class D2lpm(Dlpm):
    """DLPM with a deficit per client and replica: a client stays with the replica that knows its prefixes until it has
    used up ``replica_quantum`` there, then goes wherever fewest requests are."""

    name = "d2lpm"
    looks_everywhere = True

    def __init__(self, quantum: float = 500.0, window: int = 32, replica_quantum: float = 2_000.0) -> None:
        super().__init__(quantum, window)
        if not replica_quantum > 0:
            raise ValueError(f"replica_quantum must be above 0, not {replica_quantum}")
        self.replica_quantum = replica_quantum
        self._spent: dict[str, dict[str, float]] = {}
        """Service by client and replica."""

    def choose_replica(self, client: str, places: Sequence[Place]) -> str | None:
        """Among the longest matches with deficit left the shortest queue; among all with deficit left otherwise; when
        none has any, every replica gets a quantum more."""
        spent = self._spent.get(client, {})
        # Quanta go to all of a client's replicas at once: what is added can be counted instead of written down.
        rounds = min(floor(spent.get(place.replica, 0.0) / self.replica_quantum) for place in places)
        credit = (rounds + 1) * self.replica_quantum
        with_credit = [place for place in places if spent.get(place.replica, 0.0) < credit]
        longest = max(place.num_matched for place in with_credit)
        best = [place for place in with_credit if place.num_matched == longest]
        return min(best, key=lambda place: (place.num_requests, place.replica)).replica

    def placed(self, client: str, replica: str, service: float) -> None:
        spent = self._spent.setdefault(client, {})
        spent[replica] = spent.get(replica, 0.0) + service

    def lost_replica(self, replica: str) -> None:
        for spent in self._spent.values():
            spent.pop(replica, None)

    def forget(self, client: str) -> None:
        self._spent.pop(client, None)

    def finished(self, client: str, application: str, replica: str, input_service: float, service: float) -> None:
        self.placed(client, replica, service - input_service)
