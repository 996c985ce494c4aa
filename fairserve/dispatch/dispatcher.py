"""The Dispatcher: backlog + policy + capacity + ledger -> grants. The cluster's one authority, as plain code.

It is the only writer of counters, backlog, leases and capacity. Every method takes the time; none blocks. Each event
goes to one part, and then as much is granted as fits:

- ``state.py``: everything that is known, snapshots of it, and what must hold between two events;
- ``intake.py``: what routers send;
- ``merging.py``: what replicas and other clusters report;
- ``granting.py``: who goes next, and where to;
- ``losses.py``: time, silence and death;
- ``stages.py``: what one request passes through, whichever part moves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairserve.dispatch.budgets import BudgetSettings
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.controls import Control, Controls
from fairserve.dispatch.cut import Cutter
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.events import Events
from fairserve.dispatch.granting import Granting
from fairserve.dispatch.intake import Intake
from fairserve.dispatch.ledger import CLUSTER, MODEL
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.losses import Losses
from fairserve.dispatch.merging import Merging
from fairserve.dispatch.messages import Grant, Refusal, ReportReply, RouterCall, RouterReply, StepReport, Totals
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.recent import Recent
from fairserve.dispatch.sessions import RouterSession
from fairserve.dispatch.stages import Stages
from fairserve.dispatch.standing import standing_of
from fairserve.dispatch.state import State
from fairserve.dispatch.usage import UsageBook
from fairserve.fairness.accounts import client_of
from fairserve.fairness.bounds import BoundTracker, GapMonitor
from fairserve.fairness.cost import CostFunction
from fairserve.fairness.hierarchy import TOP, path_of
from fairserve.fairness.policy import Policy
from fairserve.fairness.prediction import NoPrediction, Predictor
from fairserve.fairness.throttle import ThrottleSettings

__all__ = ["DispatchLimits", "Dispatcher"]


class Dispatcher:
    """``epoch`` names this life of the authority: positive, and greater than that of every earlier life.

    ``predictor`` foretells output lengths, ``throttle`` refuses interactions under overload, ``group_weights`` weighs
    organisations and teams, ``capacity`` and ``log`` may be handed in by a simulation and by whoever records decisions.
    ``controls``: what is set live, which outlives this object; from now on only :meth:`control` may write it.
    ``notes``: what is told for people's sake; it goes from one dispatcher to the next, as does ``usage``, what clients
    received by day. ``budgets``: of groups.
    """

    def __init__(
        self,
        policy: Policy,
        cost: CostFunction,
        limits: DispatchLimits,
        *,
        epoch: int,
        predictor: Predictor | None = None,
        throttle: ThrottleSettings | None = None,
        group_weights: Mapping[str, float] | None = None,
        capacity: Capacity | None = None,
        log: DecisionLog | None = None,
        controls: Controls | None = None,
        notes: Notes | None = None,
        usage: UsageBook | None = None,
        budgets: BudgetSettings | None = None,
    ) -> None:
        assert epoch > 0
        self.epoch = epoch
        self.state = state = State(
            policy,
            cost,
            limits,
            predictor=predictor or NoPrediction(),
            throttle=throttle or ThrottleSettings(),
            group_weights=group_weights,
            capacity=Capacity(limits.lookahead, limits.replica_stale_s) if capacity is None else capacity,
            log=log,
            controls=Controls() if controls is None else controls,
            notes=notes or Notes(),
            usage=usage or UsageBook(),
            budgets=budgets or BudgetSettings(),
        )
        self.cost, self.limits = cost, limits
        self.queue, self.room, self.leases, self.capacity = state.queue, state.room, state.leases, state.capacity
        self.ledger, self.watch, self.notes = state.ledger, state.watch, state.notes
        self.interactions, self.throttle = state.interactions, state.throttle
        self.controls, self.weights = state.controls, state.weights
        self.usage, self.budgets = state.usage, state.budgets
        self.cutter = Cutter(self.queue, self.watch, self.weights, self.ledger, self.usage)
        self._stages = Stages(state)
        self._granting = Granting(state, self._stages)
        self._losses = Losses(state, self._stages)
        self._intake = Intake(state, self._stages, self._granting, self._losses)
        self._merging = Merging(state, self._stages, self._losses)
        for client in self.controls:
            self.weights.control(client)
        self.notes.begins(self.queue.is_waiting)

    @property
    def bounds(self) -> BoundTracker:
        """U and S among the nodes of the top level: among all clients where names are flat."""
        return self.watch.bounds[TOP]

    @property
    def gaps(self) -> GapMonitor:
        """The gaps among them."""
        return self.watch.gaps[TOP]

    @property
    def events(self) -> Events:
        return self.notes.events

    @property
    def recent(self) -> Recent:
        return self.notes.recent

    @property
    def sessions(self) -> tuple[RouterSession, ...]:
        """Of the routers that are known; to look at."""
        return tuple(self.state.sessions)

    @property
    def num_routers(self) -> int:
        return len(self.state.sessions)

    @property
    def num_lifts(self) -> int:
        return self.state.counts.num_lifts

    @property
    def num_granted(self) -> int:
        return self.state.counts.num_granted

    @property
    def num_granted_over(self) -> int:
        """Although there was no room: somebody gave way."""
        return self.state.counts.num_granted_over

    @property
    def num_lapsed(self) -> int:
        return self.state.counts.num_lapsed

    @property
    def num_refused(self) -> int:
        return self.state.counts.num_refused

    @property
    def num_forgotten(self) -> int:
        return self.state.counts.num_forgotten

    @property
    def most_forgiven(self) -> float:
        """By how much a client that was forgotten was ahead of a newcomer."""
        return self.state.counts.most_forgiven

    # -- events -----------------------------------------------------------------------------------------------------

    def route(self, call: RouterCall, now_s: float) -> RouterReply:
        """A router's submits, cancels and declined grants, then as many grants as fit anywhere."""
        session = self._intake.session(call, self.epoch, now_s)
        if session is None:
            return RouterReply(self.epoch)
        if not session.is_repeat(call):
            self._intake.take(call, session, now_s)
            self.dispatch(now_s)
            self.state.forget_idle()
        return self._reply(session, session.last_refusals, now_s)

    def poll(self, call: RouterCall, now_s: float) -> RouterReply:
        """Grants that wait for this router; ``call`` carries no events, and its ``seq`` is not looked at."""
        session = self._intake.session(call, self.epoch, now_s)
        return RouterReply(self.epoch) if session is None else self._reply(session, (), now_s)

    def _reply(self, session: RouterSession, refusals: tuple[Refusal, ...], now_s: float) -> RouterReply:
        refusals = (*refusals, *session.late_refusals)
        grants = tuple([self._with_standing(grant, now_s) for grant in session.grants])
        return RouterReply(self.epoch, grants, refusals, resubmit=not session.is_complete)

    def _with_standing(self, grant: Grant, now_s: float) -> Grant:
        lease = self.leases.get(grant.request_id)
        if lease is None:
            return grant
        return grant._replace(standing=tuple(standing_of(self.state, lease.waiting.submit, now_s)))

    def take_routers_to_wake(self) -> set[str]:
        """Routers that have something to be told since the last call: their long polls should answer now."""
        return self.state.sessions.take_to_wake()

    def report(self, report: StepReport, now_s: float, saved: int | None = None) -> ReportReply:
        """A replica's totals and what became of its requests; then as many grants as fit anywhere. ``saved``: the
        newest report of this life of the replica that a snapshot holds; None where nobody keeps any."""
        if self._merging.report(report, self.epoch, now_s):
            self.dispatch(now_s)
            self.state.forget_idle()
        room = self.capacity.get(report.replica)
        ack = self.ledger.ack(report.replica, report.incarnation)
        return ReportReply(
            epoch=self.epoch,
            ack=ack,
            saved=ack if saved is None else min(ack, saved),
            counters=self._counters(report),
            need_full=not report.is_full and report.epoch not in (0, self.epoch),
            is_draining=room is not None and room.is_draining,
        )

    def _counters(self, report: StepReport) -> dict[str, float]:
        """Of the clients that it names, and of the groups above them."""
        table = self.queue.table
        clients = set(report.clients)
        clients.update([client_of(account) for account in report.totals if account not in clients])
        counters = {}
        for client in clients:
            if client in table:
                counters[client] = table.counter(client)
                if "/" in client:
                    for node in path_of(client):
                        counters[node] = table.counter(node)
        return counters

    def merge_cluster(
        self,
        cluster: str,
        incarnation: int,
        totals: Mapping[str, Totals],
        weights: Mapping[str, float],
        seq: int,
        *,
        as_baseline: bool = False,
    ) -> None:
        """Part of what another cluster's replicas have served since its counting began: charged here like a replica's
        report, once however often it comes. ``weights``: by account, for clients that were never seen here.
        ``as_baseline``: it is noted and charged to nobody. See :meth:`Ledger.merge_cluster`."""
        if as_baseline:
            self.ledger.merge_cluster(cluster, incarnation, totals, seq)
            return
        self._merging.cluster(cluster, incarnation, totals, weights, seq)
        self.state.forget_idle()

    def merge_model(
        self, slot: str, incarnation: int, service: Mapping[str, float], weights: Mapping[str, float], *, is_first: bool
    ) -> None:
        """Part of what another model of the same service has served since its counting began, by account, in units of
        this model's: charged like another cluster's, but usage and budgets have it from there. ``is_first``: nothing of
        it was ever told here; what was served until now is charged to nobody."""
        name, totals = MODEL.removeprefix(CLUSTER) + slot, {one: Totals(service=sum_) for one, sum_ in service.items()}
        if is_first:
            self.ledger.merge_cluster(name, incarnation, totals, 0)
            return
        self._merging.cluster(name, incarnation, totals, weights, 0, is_usage=False)
        self.state.forget_idle()

    def knows_model(self, slot: str, incarnation: int) -> bool:
        """Whether :meth:`merge_model` was ever told of it."""
        return self.ledger.knows(MODEL.removeprefix(CLUSTER) + slot, incarnation)

    def control(self, client: str, control: Control, now_s: float) -> None:
        """Set what holds for a client from the next pick on; makes the client known. A client that is paused keeps
        what runs, and its requests wait aside; on resume it is lifted like any newcomer. What a change of weight means
        for counters and bounds: :class:`~fairserve.dispatch.weights.Weights`."""
        self.controls.put(client, control)
        self.weights.control(client)
        self.budgets.control(client)
        self.state.counts.num_lifts += self.room.regroup(client) > 0
        self.watch.observe_one(client)
        self.notes.moved(client, now_s)
        self.state.idlers.look_at(client)
        if self.state.log is not None:
            self.state.log.changed(client, control, now_s)
        self.dispatch(now_s)

    def tick(self, now_s: float) -> None:
        """Let leases lapse, routers and replicas die, and overload show; call it a few times a second."""
        self._losses.tick(now_s)
        if self.throttle.is_on:
            head = self.queue.peek()
            head_wait_s = now_s - head.arrived_s if head is not None else 0.0
            self.throttle.overload.observe(head_wait_s, self.capacity.pressure(now_s), now_s)
        for client in self.interactions.expire(now_s):
            self.state.mark(client)
        for node, factor in self.budgets.take_to_weigh():
            self.weights.hold_back(node, factor)
        self.notes.tick(self.throttle.overload.is_on, now_s)
        self.dispatch(now_s)
        self.state.forget_idle()

    def dispatch(self, now_s: float) -> None:
        """Grant as much as fits anywhere; see :meth:`Granting.dispatch`."""
        self._granting.dispatch(now_s)

    # -- what others may see ----------------------------------------------------------------------------------------

    def holds(self, request_id: str) -> bool:
        """Whether it waits, or is granted and not finished."""
        return self.state.holds(request_id)

    @property
    def is_idle(self) -> bool:
        """No router and no replica is known."""
        return not len(self.state.sessions) and not len(self.capacity)

    def dump(self) -> dict[str, Any]:
        """A snapshot, as plain values; see :meth:`State.dump`."""
        return self.state.dump()

    def load(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; only into a dispatcher that has seen nothing yet.

        Raises:
            ValueError: when the snapshot is of another version.
        """
        self.state.load(data)

    def check(self) -> None:
        """Invariants that hold between any two events."""
        self.state.check()
