"""Everything that the authority knows, in one place: the parts of the dispatcher work on it, one event at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairserve.dispatch.budgets import Budgets, BudgetSettings
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.controls import NO_CONTROL, Controls
from fairserve.dispatch.cut import SNAPSHOT_VERSION
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.door import Door
from fairserve.dispatch.forgetting import Idlers
from fairserve.dispatch.leases import Leases, Waiting
from fairserve.dispatch.ledger import Ledger
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.placement import Placement
from fairserve.dispatch.sessions import Sessions
from fairserve.dispatch.usage import UsageBook
from fairserve.dispatch.waiting_room import WaitingRoom
from fairserve.dispatch.watch import Watch
from fairserve.dispatch.weights import Weights
from fairserve.fairness.cost import CostFunction
from fairserve.fairness.hierarchy import is_group
from fairserve.fairness.interactions import Interactions
from fairserve.fairness.policy import Policy
from fairserve.fairness.prediction import Predictor
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.throttle import Throttle, ThrottleSettings


@dataclass(slots=True)
class Counts:
    """Of one life of the authority."""

    num_lifts: int = 0
    num_sent: int = 0
    """Grants and late refusals: each takes the next number."""
    num_granted: int = 0
    num_granted_over: int = 0
    num_lapsed: int = 0
    num_refused: int = 0
    num_forgotten: int = 0
    most_forgiven: float = 0.0
    """By how much a client that was forgotten was ahead of a newcomer."""


class State:
    """Parameters: as :class:`~fairserve.dispatch.dispatcher.Dispatcher`'s."""

    def __init__(
        self,
        policy: Policy,
        cost: CostFunction,
        limits: DispatchLimits,
        *,
        predictor: Predictor,
        throttle: ThrottleSettings,
        group_weights: Mapping[str, float] | None,
        capacity: Capacity,
        log: DecisionLog | None,
        controls: Controls,
        notes: Notes,
        usage: UsageBook,
        budgets: BudgetSettings,
    ) -> None:
        self.cost = cost
        self.limits = limits
        self.predictor = predictor
        self.capacity = capacity
        self.controls = controls
        self.log = log
        self.notes = notes
        self.queue: FairQueue[Waiting] = FairQueue(policy, group_weights)
        self.ledger = Ledger()
        self.interactions = Interactions()
        self.throttle = Throttle(throttle)
        self.leases = Leases()
        self.sessions = Sessions()
        self.watch = Watch(self.queue)
        self.weights = Weights(self.queue, controls, self.leases, self.watch)
        self.room = WaitingRoom(self.queue, controls)
        self.usage = usage
        self.budgets = Budgets(usage, controls, predictor, budgets)
        self.door = Door(self.queue, self.room, limits, self.throttle, controls, self.budgets)
        self.idlers = Idlers(self.queue, self._is_busy)
        self.placement = Placement(self.queue, capacity, self.leases, limits, self.watch)
        self.counts = Counts()
        self.knows_the_past = False
        """It goes on from a snapshot."""
        self.gone: dict[str, float] = {}
        """Replicas that a router knows to have ended -> until when a report of theirs may only be a late one."""

    def holds(self, request_id: str) -> bool:
        """Whether it waits, or is granted and not finished."""
        return request_id in self.room or request_id in self.leases

    # -- names --------------------------------------------------------------------------------------------------------

    def _is_busy(self, client: str) -> bool:
        """Something of it waits or is granted, or an operator has set something for it."""
        is_controlled = self.controls.of(client) is not NO_CONTROL
        return is_controlled or self.leases.num_of(client) > 0 or self.room.num_waiting(client) > 0

    def mark(self, client: str) -> None:
        """Tell the queue whether the client has an interaction under way."""
        is_under_way = self.interactions.is_under_way(client)
        if is_under_way != self.queue.is_under_way(client):
            self.queue.set_under_way(client, is_under_way)
            self.idlers.look_at(client)

    def forget_idle(self) -> None:
        """Too many clients are idle: those whose forgetting forgives least go (``dispatch/forgetting.py``)."""
        idlers, counts = self.idlers, self.counts
        while len(idlers) > self.limits.max_clients and (first := idlers.first()) is not None:
            client, lead = first
            counts.num_forgotten += 1
            counts.most_forgiven = max(counts.most_forgiven, lead)
            for node in self.queue.forget(client):
                self.watch.forget(node)
            idlers.forgotten(client)
            self.ledger.forget(client)
            self.door.forget(client)
            self.budgets.forget(client)
            self.predictor.forget(client)
            self.notes.forgot(client)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Everything that must outlive the authority, as plain values. Provisional charges are left out: the requests
        behind them are settled by their replica's report, or come again."""
        queue, unserved, carried = self.queue, self.watch.unserved, self.weights.carried
        return {
            "version": SNAPSHOT_VERSION,
            "counters": {node: [queue.counter(node) - unserved.get(node, 0.0), carried(node)] for node in queue.table},
            # The next life begins with nobody waiting: the lift's reference is then whoever is least served now.
            "last_to_leave": {
                group: siblings.least_served() or siblings.last_to_leave for group, siblings in queue.groups.items()
            },
            "ledger": self.ledger.dump(),
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; only into a state that has seen nothing yet. Weights of groups are this one's.

        Raises:
            ValueError: when the snapshot is of another version.
        """
        assert not len(self.room) and not self.leases
        if data.get("version") != SNAPSHOT_VERSION:
            raise ValueError(f"snapshot version {data.get('version')!r}, this fairserve reads {SNAPSHOT_VERSION}")
        for client, (_, weight) in data["counters"].items():
            if not is_group(client):
                self.weights.carry(client, weight)
        for node, (counter, _) in data["counters"].items():
            self.queue.set_counter(node, counter)
        self.queue.table.rebase()
        for group, member in data["last_to_leave"].items():
            self.queue.restore_last_to_leave(group, member)
        self.ledger.load(data["ledger"])
        self.knows_the_past = True
        for client in data["counters"]:
            self.idlers.look_at(client)
        self.forget_idle()

    def check(self) -> None:
        """Invariants that hold between any two events."""
        parts = (self.queue, self.ledger, self.capacity, self.leases, self.interactions)
        for part in (*parts, self.placement, self.room, self.weights, self.idlers, self.budgets):
            part.check()
        assert all(request_id not in self.room for request_id in self.leases)
        unconfirmed = {request_id for request_id, lease in self.leases.items() if not lease.confirmed}
        reserved = {request_id for room in self.capacity for request_id in room.unconfirmed}
        assert reserved <= unconfirmed, "room is reserved for a request that is gone"
        self.watch.check(list(self.leases.values()))
