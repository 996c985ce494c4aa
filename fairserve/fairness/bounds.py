"""How unfair the cluster can get, and how unfair it has been.

VTC (arXiv 2401.00588, lemma 4.3 and theorem 4.4): the counters of waiting clients lie within U of each other, and two
clients that wait throughout an interval receive service that differs by at most 2U, with U = max(w_p * L, w_q * M).

Ours is the same argument with what the authority itself can observe, so that it holds for any cost function, for
weights and for many replicas. All amounts are service / weight.

**The level.** The level is the least counter among waiting clients or, when nobody waits, the counter of the client
that was the last to leave: what the lift raises to. Picks, charges, merges and lifts only raise it. The one thing that
lowers it is a charge that returns: a lapsed, declined or cancelled grant, or a prompt that was partly cached. D is the
most by which returns have held the level below an earlier one.

**Ceilings.** A client's ceiling is its counter plus the output that its granted, unfinished requests may still make
(what they *owe*). Only a pick raises it, and the client that is picked stands at the level. So no ceiling, of a client
that waits or of one that does not, is ever more than U + D above the level, with

    U = the most, over all grants, of  charge of the grant + output owed by the client's granted requests.

A waiting client is never below the level (the lift sees to it when it arrives). Counters of waiting clients therefore
differ by at most U + D, and those of two that wait throughout change by at most 2 (U + D) relative to each other.

A caller may cancel what runs. The router's word can overtake the replica's report: the grant ends and owes nothing any
more, the client may be picked again, and what had been served is merged afterwards. C, the most of that for one client,
comes on top: U + D + C. C was served since the last merge, so S holds it (below), and the bounds in U and S stand.

**Service.** Delivered service differs from the counter, lifts aside, by what is not merged yet (at most the sum over
replicas of the largest net amount that one report merged) and by input charged but not started (at most the most in
flight of one client); each counts at both ends of an interval. With S = that sum + that most + D:

- two clients that wait throughout an interval differ by at most 2 (U + S);
- a client that waits throughout receives at most 3 (U + S) less than any other client. (The other may rise from the
  level to U above it, the waiting one may fall from U above it to the level, and what the other owed when the interval
  began may come on top, once.)

With one replica, lookahead 0, a report after every step and all of max_tokens reserved, the requests of an instant
share the KV cache, so U and input in flight together are at most the paper's max(w_p * L, w_q * M) where w_p <= w_q,
M being KV tokens: the paper's 2U holds as it stands.

Assumed: weights do not change, no request makes more than its max_output, and all service follows a grant of this
authority. What runs without one (degraded mode, grants of an authority before this one) is merged and charged, but
nobody could know that it was owed. What a replica served and did not report before it died is in no counter; it widens
the bounds by the most that each death cost one client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import inf


class BoundTracker:
    """Collects U and S as the run goes; every ``saw_`` method is cheap. Amounts are service / weight."""

    def __init__(self) -> None:
        self._unit = 0.0
        self._unmerged: dict[str, float] = {}
        self._most_unmerged = 0.0
        self._in_flight = 0.0
        self._returned = 0.0
        self._below = 0.0
        self._level = 0.0

    def saw_grant(self, charge: float, owed: float) -> None:
        """``owed``: output service that the client's granted, unfinished requests may still make, this one included."""
        if charge + owed > self._unit:
            self._unit = charge + owed

    def saw_in_flight(self, charge: float) -> None:
        """Input charges of one client that no replica has started yet."""
        if charge > self._in_flight:
            self._in_flight = charge

    def saw_merge(self, replica: str, amount: float) -> None:
        """Net amount that one report of ``replica`` added to the counters of one client or more."""
        if amount > self._unmerged.get(replica, 0.0):
            self._unmerged[replica] = amount
            self._most_unmerged = max(self._most_unmerged, sum(self._unmerged.values()))

    def lost_replica(self, replica: str) -> None:
        """Nothing more will be merged from it."""
        self._unmerged.pop(replica, None)

    def saw_return(self, before: float, after: float) -> None:
        """Charges returned, and the level went from ``before`` to ``after``. What it fell on any other occasion is not
        excused: a lift that is missing must not widen the bound."""
        risen_since = max(0.0, before - self._level)
        self._below = max(0.0, max(0.0, self._below - risen_since) + before - after)
        self._level = after
        self._returned = max(self._returned, self._below)

    @property
    def unit(self) -> float:
        """U."""
        return self._unit

    @property
    def returned(self) -> float:
        """D."""
        return self._returned

    @property
    def staleness(self) -> float:
        """S."""
        return self._most_unmerged + self._in_flight + self._returned

    @property
    def bound(self) -> float:
        """Largest service / weight difference that two clients which both wait throughout an interval may show."""
        return 2.0 * (self.unit + self.staleness)


class GapMonitor:
    """The worst service gap among pairs of clients, over intervals in which both wait throughout.

    For each pair it keeps the greatest lead of either over the other since both wait; the worst gap of any
    sub-interval is the sum of the two. Cost per observation: at most (clients that changed) x (clients watched), the
    latter at most ``max_clients``; a client that is still below where its service last could not set a record costs
    nothing. Further clients are watched once there is room, and :attr:`num_unwatched` counts the observations that were
    passed over.
    """

    def __init__(self, max_clients: int = 64) -> None:
        self._max_clients = max_clients
        self._watched: dict[str, float] = {}
        self._lead: dict[str, dict[str, float]] = {}
        """``_lead[a][b]``: the most that service of a minus service of b has been; ``_lead[b]`` has the same keys."""
        self._safe: dict[str, float] = {}
        """Up to this service, no lead of the client over anybody can be a new most."""
        self.worst = 0.0
        self.worst_pair: tuple[str, str] | None = None
        self.num_unwatched = 0

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        """``service``: service / weight so far of the clients whose value or waiting state may have changed."""
        joined, changed = [], []
        watched = self._watched
        for client, value in service.items():
            if not is_waiting(client):
                self._left(client)
            elif client in watched:
                if watched[client] != value:
                    changed.append((client, value < watched[client]))
                    watched[client] = value
            elif len(watched) < self._max_clients:
                watched[client] = value
                joined.append(client)
            else:
                self.num_unwatched += 1
        for client in joined:
            self._join(client)
        for client, has_fallen in changed:
            self._compare(client, has_fallen)

    def _join(self, client: str) -> None:
        mine, leads = self._watched[client], dict[str, float]()
        for other in self._lead:
            leads[other] = mine - self._watched[other]
            self._lead[other][client] = -leads[other]
            self._safe[other] = -inf
        self._lead[client], self._safe[client] = leads, -inf

    def _left(self, client: str) -> None:
        """The client stopped waiting: its intervals end."""
        if self._watched.pop(client, None) is not None:
            del self._safe[client]
            for other in self._lead.pop(client):
                del self._lead[other][client]

    def _compare(self, client: str, has_fallen: bool) -> None:
        """Its own leads may have grown; those of the others over it only if its service fell (a refund)."""
        watched, leads, safe = self._watched, self._lead[client], inf
        mine = watched[client]
        if mine <= self._safe[client] and not has_fallen:
            return
        for other, most in leads.items():
            theirs = watched[other]
            if mine - theirs > most:
                most = mine - theirs
                self._widen(client, other, most)
            if has_fallen:
                self._safe[other] = -inf
                if theirs - mine > self._lead[other][client]:
                    self._widen(other, client, theirs - mine)
            if theirs + most < safe:
                safe = theirs + most
        self._safe[client] = safe

    def _widen(self, ahead: str, behind: str, lead: float) -> None:
        self._lead[ahead][behind] = lead
        gap = lead + self._lead[behind][ahead]
        if gap > self.worst:
            self.worst = gap
            self.worst_pair = (ahead, behind) if ahead < behind else (behind, ahead)


def jain(values: Collection[float]) -> float:
    """Jain's index of non-negative values: 1 when all are equal, 1/n when one has everything; 1 for none."""
    total = sum(values)
    squares = sum(value * value for value in values)
    return 1.0 if squares == 0 else total * total / (len(values) * squares)
