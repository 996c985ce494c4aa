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
more, the client may be picked again, and what had been served is merged afterwards. The same happens when a replica
begins anew and takes a request that was granted to its former life, before the authority has heard of the new one. C,
the most of that for one client, comes on top: U + D + C. C was served since the last merge, so S holds it (below), and
the bounds in U and S stand.

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

Where a weight changes, service / weight is the sum of each piece of service by the weight at which it was merged, and
U covers what the client may still receive (``dispatch/weights.py``).

Assumed: weights of groups do not change, no request makes more than its max_output, and all service follows a grant of
this authority. What runs without one (degraded mode, grants of an authority before this one) is merged and charged, but
nobody could know that it was owed. What a replica served and did not report before it died is in no counter; it widens
the bounds by the most that each death cost one client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import inf
from operator import itemgetter, sub

BATCH = 32
"""Observations of gaps that are looked at together."""


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

    def saw_grant(self, charge: float, owed: float, in_flight: float = 0.0) -> None:
        """``owed``: output service that the client's granted, unfinished requests may still make, this one included;
        ``in_flight``: as for :meth:`saw_in_flight`."""
        if charge + owed > self._unit:
            self._unit = charge + owed
        if in_flight > self._in_flight:
            self._in_flight = in_flight

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
    sub-interval is the sum of the two. At most ``max_clients`` are watched; further clients once there is room, and
    :attr:`num_unwatched` counts the observations that were passed over.

    An observation writes down where everybody stands, no more. After ``BATCH`` of them, or when somebody asks, leads
    are brought up to date: service rises, so that meanwhile no lead was more than what the one had in the end minus
    what the other had in the beginning, and only where that is a new most the moments are gone through, those at which
    the one was served. A service that falls (a refund) ends the batch.
    """

    def __init__(self, max_clients: int = 64) -> None:
        self._max_clients = max_clients
        self._watched: dict[str, int] = {}
        """Client -> its place in the lists below."""
        self._names: list[str] = []
        self._free: list[int] = []
        self._service: list[float] = []
        """Infinite where nobody is: so nobody is ahead of it."""
        self._base: list[float] = []
        """Service when the batch began, or when the client joined."""
        self._lead: list[list[float]] = []
        """``_lead[a][b]``: the most that service of a minus service of b has been."""
        self._moments: list[list[float]] = []
        """Service of all, after each observation of the batch."""
        self._served: list[list[int]] = []
        """Moments at which the client's service rose."""
        self._since: list[int] = []
        """The first moment at which the client was watched."""
        self._worst = 0.0
        self._worst_pair: tuple[str, str] | None = None
        self.num_unwatched = 0

    @property
    def num_watched(self) -> int:
        return len(self._watched)

    @property
    def worst(self) -> float:
        self._settle()
        return self._worst

    @property
    def worst_pair(self) -> tuple[str, str] | None:
        """By name."""
        self._settle()
        return self._worst_pair

    def current(self) -> tuple[float, tuple[str, str] | None]:
        """The widest gap of any interval that ends now, and its pair: who is ahead, who is behind. Costs a look at
        every pair."""
        self._settle()
        widest, pair, service = 0.0, None, self._service
        for ahead, a in self._watched.items():
            mine = service[a]
            for behind, b in self._watched.items():
                gap = mine - service[b] + self._lead[b][a]
                if gap > widest and a != b:
                    widest, pair = gap, (ahead, behind)
        return widest, pair

    def observe(self, service: Mapping[str, float], is_waiting: Callable[[str], bool]) -> None:
        """``service``: service / weight so far of the clients whose value or waiting state may have changed."""
        watched, values = self._watched, self._service
        joined, changed, has_fallen = [], [], False
        for client, value in service.items():
            place = watched.get(client)
            if not is_waiting(client):
                if place is not None:
                    self._leave(client, place)
            elif place is None:
                joined.append(client)
            elif value != values[place]:
                changed.append((place, value))
                has_fallen = has_fallen or value < values[place]
        if has_fallen:
            self._settle()
        now = len(self._moments)
        for place, value in changed:
            values[place] = value
            self._served[place].append(now)
        for client in joined:
            if len(watched) < self._max_clients:
                self._join(client, service[client])
            else:
                self.num_unwatched += 1
        if has_fallen:
            self._compare([place for place, _ in changed])
        elif changed:
            self._moments.append(values.copy())
            if len(self._moments) >= BATCH:
                self._settle()

    def _join(self, client: str, value: float) -> None:
        if not self._free:
            self._grow()
        place = self._free.pop()
        service, lead = self._service, self._lead
        lead[place] = [value - theirs for theirs in service]
        for other in self._watched.values():
            lead[other][place] = service[other] - value
        self._watched[client], self._names[place] = place, client
        service[place] = self._base[place] = value
        self._served[place], self._since[place] = [], len(self._moments)
        lead[place][place] = inf

    def _grow(self) -> None:
        self._free.append(len(self._names))
        self._names.append("")
        for values in (self._service, self._base, *self._lead, *self._moments):
            values.append(inf)
        self._lead.append([])
        self._served.append([])
        self._since.append(0)

    def _leave(self, client: str, place: int) -> None:
        """The client stopped waiting: its intervals end. Its leads go with it, so that only a new worst gap matters."""
        if self._moments:
            service, base, worst = self._service, self._base, self._worst
            mine, before = service[place], base[place]
            ours = self._lead[place]
            for other in self._watched.values():
                theirs = self._lead[other][place]
                most, least = mine - base[other], service[other] - before
                most, least = (most if most > ours[other] else ours[other]), (least if least > theirs else theirs)
                if most + least > worst and other != place:
                    self._settle_pair(place, other)
                    self._settle_pair(other, place)
        del self._watched[client]
        self._service[place] = self._base[place] = inf
        self._free.append(place)

    def _settle(self) -> None:
        """Bring all leads up to date; a batch ends."""
        if not self._moments:
            return
        service, base, columns = self._service, self._base, tuple(zip(*self._moments, strict=True))
        for ahead in self._watched.values():
            mine = service[ahead]
            if mine == base[ahead]:  # only its own service makes its leads grow
                continue
            pairs = zip(self._lead[ahead], base, strict=True)
            grown = [behind for behind, (most, theirs) in enumerate(pairs) if mine - theirs > most]
            if grown:
                at = itemgetter(*self._served[ahead], self._served[ahead][-1])  # two at least: a tuple
                highs = at(columns[ahead])
                for behind in grown:
                    if self._since[behind] > self._served[ahead][0]:
                        self._settle_pair(ahead, behind)
                    elif (lead := max(map(sub, highs, at(columns[behind])))) > self._lead[ahead][behind]:
                        self._widen(ahead, behind, lead)
        self._begin_batch()

    def _settle_pair(self, ahead: int, behind: int) -> None:
        since = self._since[behind]
        moments = [self._moments[moment] for moment in self._served[ahead] if moment >= since]
        lead = max([moment[ahead] - moment[behind] for moment in moments], default=-inf)
        if lead > self._lead[ahead][behind]:
            self._widen(ahead, behind, lead)

    def _compare(self, places: Collection[int]) -> None:
        """Some of their services fell, which makes the leads of others over them grow."""
        service, lead = self._service, self._lead
        for place in places:
            mine = service[place]
            for other in self._watched.values():
                if mine - service[other] > lead[place][other]:
                    self._widen(place, other, mine - service[other])
                if service[other] - mine > lead[other][place]:
                    self._widen(other, place, service[other] - mine)
        self._begin_batch()

    def _begin_batch(self) -> None:
        self._base = self._service.copy()
        self._since = [0] * len(self._since)
        self._served = [[] for _ in self._served]
        self._moments.clear()

    def _widen(self, ahead: int, behind: int, lead: float) -> None:
        self._lead[ahead][behind] = lead
        gap = lead + self._lead[behind][ahead]
        if gap > self._worst:
            self._worst = gap
            one, two = self._names[ahead], self._names[behind]
            self._worst_pair = (one, two) if one < two else (two, one)


def jain(values: Collection[float]) -> float:
    """Jain's index of non-negative values: 1 when all are equal, 1/n when one has everything; 1 for none."""
    total = sum(values)
    squares = sum(value * value for value in values)
    return 1.0 if squares == 0 else total * total / (len(values) * squares)
