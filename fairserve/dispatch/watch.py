"""The bound and the gap, watched while the cluster runs: one pair of instruments per group of siblings.

Siblings are compared with each other, so each group of the hierarchy has its own U, S and worst gap; a flat system has
one group. The derivation is at the top of ``fairness/bounds.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fairserve.dispatch.leases import Lease, scaled
from fairserve.fairness.bounds import BoundTracker, GapMonitor
from fairserve.fairness.hierarchy import TOP, group_of, path_of
from fairserve.fairness.queue import Amounts, FairQueue


class Watch:
    """Amounts are service / weight at each node of a client's path."""

    def __init__(self, queue: FairQueue[Any]) -> None:
        self._queue = queue
        self.bounds: dict[str, BoundTracker] = {TOP: BoundTracker()}
        self.gaps: dict[str, GapMonitor] = {TOP: GapMonitor()}
        self.service: dict[str, float] = {}
        """Merged service / weight by node."""
        self.unserved: dict[str, float] = {}
        """Charged when a request was picked, and not served yet, by node."""
        self.owed: dict[str, float] = {}
        """Service / weight that granted requests may still receive beyond what they were charged, by node."""

    def granted(self, client: str, charge: Amounts, owed: Amounts) -> None:
        unserved, all_owed = self.unserved, self.owed
        for node, charged, owes in zip(path_of(client), charge, owed, strict=True):
            held = unserved[node] = unserved.get(node, 0.0) + charged
            owing = all_owed[node] = all_owed.get(node, 0.0) + owes
            bounds = self.bounds.get(group_of(node)) or self._bounds(group_of(node))
            bounds.saw_grant(charged, owing, held)

    def gave_back(self, client: str, charge: Amounts) -> None:
        """Served, so that the replicas' totals hold it from now on, or returned."""
        for node, amount in zip(path_of(client), charge, strict=True):
            _subtract(self.unserved, node, amount)

    def ended(self, client: str, owed: Amounts) -> None:
        for node, amount in zip(path_of(client), owed, strict=True):
            _subtract(self.owed, node, amount)

    def reweighed(self, client: str, held: float, owed: float) -> None:
        """The weight of the client, or group, changed: granted requests hold and owe so much more (or less) there."""
        _subtract(self.unserved, client, -held)
        _subtract(self.owed, client, -owed)
        group, bounds = group_of(client), self._bounds(group_of(client))
        bounds.saw_in_flight(self.unserved.get(client, 0.0))
        ceiling = self._queue.counter(client) + self.owed.get(client, 0.0)
        bounds.saw_grant(ceiling - self._queue.level(group) - bounds.returned, 0.0)  # as if picked at that height

    def served(self, client: str, service: float, rates: Amounts) -> None:
        mine = self.service
        for node, rate in zip(path_of(client), rates, strict=True):
            mine[node] = mine.get(node, 0.0) + service * rate

    @contextmanager
    def returning(self, clients: Iterable[str]) -> Iterator[None]:
        """Charges of these clients may return meanwhile, and lower the level of a group."""
        level = self._queue.level
        before = {group: level(group) for group in {group_of(node) for client in clients for node in path_of(client)}}
        yield
        for group, was in before.items():
            self._bounds(group).saw_return(was, level(group))

    @contextmanager
    def merging(self, source: str, clients: Iterable[str]) -> Iterator[None]:
        """What ``source``, a replica or another cluster, served these clients is merged meanwhile."""
        counter = self._queue.table.counter
        before = {node: counter(node) for client in clients for node in path_of(client)}
        yield
        most: dict[str, float] = {}
        for node, was in before.items():
            group, amount = group_of(node), counter(node) - was
            if amount > most.get(group, 0.0):
                most[group] = amount
        for group, amount in most.items():
            self._bounds(group).saw_merge(source, amount)

    def lost_replica(self, replica: str) -> None:
        for bounds in self.bounds.values():
            bounds.lost_replica(replica)

    def observe(self, clients: Iterable[str]) -> None:
        """Service or backlog of these clients may have changed."""
        top: dict[str, float] = {}
        changed, service_of = {TOP: top}, self.service.get
        for client in clients:
            if "/" not in client:
                top[client] = service_of(client, 0.0)
                continue
            for node in path_of(client):
                changed.setdefault(group_of(node), {})[node] = service_of(node, 0.0)
        for group, service in changed.items():
            self._gaps(group).observe(service, self._queue.is_waiting)

    def observe_one(self, client: str) -> None:
        """The same for one client: its nodes are of different groups."""
        for node in path_of(client):
            self._gaps(group_of(node)).observe({node: self.service.get(node, 0.0)}, self._queue.is_waiting)

    def _gaps(self, group: str) -> GapMonitor:
        gaps = self.gaps.get(group)
        if gaps is None:
            gaps = self.gaps[group] = GapMonitor()
        return gaps

    def _bounds(self, group: str) -> BoundTracker:
        bounds = self.bounds.get(group)
        if bounds is None:
            bounds = self.bounds[group] = BoundTracker()
        return bounds

    def forget(self, node: str) -> None:
        """A client or a group that is not known any more; nothing of it is granted."""
        for amounts in (self.service, self.unserved, self.owed):
            amounts.pop(node, None)
        self.bounds.pop(node, None)
        self.gaps.pop(node, None)

    def check(self, leases: Collection[Lease]) -> None:
        """``leases``: all that there are."""
        for name, mine in (("held", self.unserved), ("owed", self.owed)):
            sums: dict[str, float] = {}
            for lease in leases:
                path = path_of(lease.waiting.submit.client)
                for node, amount in zip(path, scaled(getattr(lease, name), lease.rates), strict=True):
                    sums[node] = sums.get(node, 0.0) + amount
            for node in sums.keys() | mine.keys():
                total, amount = sums.get(node, 0.0), mine.get(node, 0.0)
                assert abs(total - amount) <= 1e-6 * (1 + abs(total)), (name, node, total, amount)


def _subtract(amounts: dict[str, float], node: str, amount: float) -> None:
    """Keep only what is more than rounding."""
    amounts[node] = amounts.get(node, 0.0) - amount
    if abs(amounts[node]) < 1e-6:
        del amounts[node]
