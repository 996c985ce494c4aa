"""The Dispatcher: backlog + policy + capacity + ledger -> grants. The cluster's one authority, as plain code.

It is the only writer of counters, backlog, leases and capacity. Every method takes the time; none blocks.

A request's life here: *waiting* (submitted) -> *leased* (granted: its input is charged, provisionally, in the same
step as the pick) -> *confirmed* (the replica reported it received) -> *started* (the provisional charge is replaced by
what the replica reports) -> *finished*. It may leave from every stage; whatever was charged and not served returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairserve.dispatch.capacity import Capacity, ReplicaRoom
from fairserve.dispatch.controls import NO_CONTROL, Control, Controls
from fairserve.dispatch.cut import SNAPSHOT_VERSION, Cutter
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.door import Door
from fairserve.dispatch.events import Events
from fairserve.dispatch.forgetting import Idlers
from fairserve.dispatch.leases import Lease, Leases, Waiting, scaled
from fairserve.dispatch.ledger import CLUSTER, Ledger
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import (
    Grant,
    Refusal,
    ReportReply,
    RouterCall,
    RouterReply,
    StepReport,
    Submit,
    Totals,
)
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.placement import Placement
from fairserve.dispatch.recent import Recent
from fairserve.dispatch.sessions import RouterSession
from fairserve.dispatch.waiting_room import WaitingRoom
from fairserve.dispatch.watch import Watch
from fairserve.dispatch.weights import Weights
from fairserve.errors import ClientQueueFull, ClusterQueueFull, InteractionThrottled, Refused
from fairserve.fairness.accounts import application_of, client_of
from fairserve.fairness.bounds import BoundTracker, GapMonitor
from fairserve.fairness.cost import CostFunction
from fairserve.fairness.hierarchy import TOP, is_group, path_of
from fairserve.fairness.interactions import Interactions
from fairserve.fairness.policy import Policy
from fairserve.fairness.prediction import NoPrediction, Predictor
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.throttle import Throttle, ThrottleSettings

__all__ = ["DispatchLimits", "Dispatcher"]

UNREACHABLE_PAUSE_S = 1.0
MOST_REFUSED = 32
"""Interactions that are throttled in one go: no call takes long, and the next goes on."""


class Dispatcher:
    """``epoch`` names this life of the authority: positive, and greater than that of every earlier life.

    ``predictor`` foretells output lengths, ``throttle`` refuses interactions under overload, ``group_weights`` weighs
    organisations and teams, ``capacity`` and ``log`` may be handed in by a simulation and by whoever records decisions.
    ``controls``: what is set live, which outlives this object; from now on only :meth:`control` may write it.
    ``notes``: what is told for people's sake; it goes from one dispatcher to the next.
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
    ) -> None:
        assert epoch > 0
        self.epoch = epoch
        self.cost = cost
        self.limits = limits
        self.queue: FairQueue[Waiting] = FairQueue(policy, group_weights)
        self.ledger = Ledger()
        self.capacity = Capacity(limits.lookahead, limits.replica_stale_s) if capacity is None else capacity
        self.interactions = Interactions()
        self.throttle = Throttle(throttle or ThrottleSettings())
        self.leases = Leases()
        self.watch = Watch(self.queue)
        self._predictor: Predictor = predictor or NoPrediction()
        self.controls = Controls() if controls is None else controls
        self.weights = Weights(self.queue, self.controls, self.leases, self.watch)
        for client in self.controls:
            self.weights.control(client)
        self.cutter = Cutter(self.queue, self.watch, self.weights, self.ledger)
        self.room = WaitingRoom(self.queue, self.controls)
        self.door = Door(self.queue, self.room, limits, self.throttle, self.controls)
        self._idlers = Idlers(self.queue, self._is_busy)
        self._placement = Placement(self.queue, self.capacity, self.leases, limits, self.watch)
        self._log = log
        self.notes = notes or Notes()
        self.notes.begins(self.queue.is_waiting)
        self._sessions: dict[str, RouterSession] = {}
        self._to_wake: set[str] = set()
        self._knows_the_past = False
        self._gone: dict[str, float] = {}
        """Replicas that a router knows to have ended -> until when a report of theirs may only be a late one."""
        self.num_lifts = 0
        self.num_sent = 0
        """Grants and late refusals: each takes the next number."""
        self.num_granted = 0
        self.num_granted_over = 0
        self.num_lapsed = 0
        self.num_refused = 0
        self.num_forgotten = 0
        self.most_forgiven = 0.0
        """By how much a client that was forgotten was ahead of a newcomer."""

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
        return tuple(self._sessions.values())

    @property
    def num_routers(self) -> int:
        return len(self._sessions)

    # -- events from routers ----------------------------------------------------------------------------------------

    def route(self, call: RouterCall, now_s: float) -> RouterReply:
        """A router's submits, cancels and declined grants, then as many grants as fit anywhere."""
        session = self._session(call, now_s)
        if session is None:
            return RouterReply(self.epoch)
        if not session.is_repeat(call):
            session.last_seq = call.seq
            session.is_complete = session.is_complete or call.is_full
            for replica in call.gone:
                self._bury(replica, now_s)
            for replica in call.draining:
                self._drain(replica, now_s)
            for replica in call.unreachable:
                self.capacity.suspend(replica, now_s + UNREACHABLE_PAUSE_S)
            for request_id in call.cancels:
                self._cancel(request_id, now_s)
            for request_id in call.declined:
                self._drop(request_id, now_s)
            submits = call.submits
            if call.is_full:  # the least served first, or a client that is ahead would lift those behind it
                submits = tuple(sorted(submits, key=lambda submit: self.queue.standing(submit.client)))
            refusals = (self._submit(submit, session, now_s) for submit in submits)
            session.last_refusals = tuple(refusal for refusal in refusals if refusal is not None)
            self.dispatch(now_s)
            self._forget_idle()
        return self._reply(session, session.last_refusals)

    def poll(self, call: RouterCall, now_s: float) -> RouterReply:
        """Grants that wait for this router; ``call`` carries no events, and its ``seq`` is not looked at."""
        session = self._session(call, now_s)
        return RouterReply(self.epoch) if session is None else self._reply(session, ())

    def take_routers_to_wake(self) -> set[str]:
        """Routers that have something to be told since the last call: their long polls should answer now."""
        routers, self._to_wake = self._to_wake, set()
        return routers

    def _session(self, call: RouterCall, now_s: float) -> RouterSession | None:
        """The caller's session; None for a call of an earlier life that arrives late."""
        session = self._sessions.get(call.router)
        if session is not None and session.incarnation == call.incarnation:
            session.heard_s = now_s
            if call.epoch == self.epoch:
                session.acknowledge(call.grants_ack)
            return session
        if session is not None and session.incarnation > call.incarnation:
            return None
        if session is not None:
            self._end_session(session, now_s)
        is_first_call = call.epoch == 0
        self._sessions[call.router] = RouterSession(call.router, call.incarnation, now_s, is_complete=is_first_call)
        return self._sessions[call.router]

    def _reply(self, session: RouterSession, refusals: tuple[Refusal, ...]) -> RouterReply:
        refusals = (*refusals, *session.late_refusals)
        return RouterReply(self.epoch, session.grants, refusals, resubmit=not session.is_complete)

    def _submit(self, submit: Submit, session: RouterSession, now_s: float) -> Refusal | None:
        request_id = submit.request_id
        if self.holds(request_id) or session.is_refused(request_id):
            return None
        client = submit.client
        self.weights.carry(client, submit.weight)
        waiting = Waiting(submit, session.router, now_s - submit.waited_s)
        if not submit.is_retry:
            is_first = self.interactions.is_first(client, submit.interaction, submit.call_index, now_s)
            error = self.door.refuse(submit, is_first, now_s)
            if isinstance(error, ClientQueueFull | ClusterQueueFull):
                self.dispatch(now_s)  # earlier ones of the same call may only look as if they had to wait
                error = self.door.refuse(submit, is_first, now_s)
            if error is not None:
                self.interactions.cut(client, submit.interaction)
                self._refused(submit, error, now_s)
                return Refusal(submit.request_id, error)
            self.door.accepted(submit, now_s)
            waiting.accepted_s, waiting.is_first = now_s, is_first
            self.interactions.accepted(client, submit.interaction, submit.request_id, now_s, is_first=is_first)
            self._mark(client)
        else:
            self._waits_again(submit, now_s)
        session.requests.add(submit.request_id)
        rise = self.room.enter(waiting)
        self._idlers.look_at(client)
        self.num_lifts += rise > 0
        self.notes.entered(client, rise, now_s)
        if self._log is not None:
            self._log.submitted(submit, rise, now_s)
        self.watch.observe_one(client)
        return None

    def _refused(self, submit: Submit, error: Refused, now_s: float) -> None:
        """Tell whoever counts."""
        self.num_refused += 1
        self.notes.refused(submit.client, error, now_s)
        self.throttle.num_throttled += isinstance(error, InteractionThrottled)
        self._mark(submit.client)
        self._idlers.look_at(submit.client)
        if self._log is not None:
            self._log.refused(submit, error, now_s)

    def _waits_again(self, submit: Submit, now_s: float) -> None:
        """Its interaction, which may be known from here or only to a predecessor, goes on."""
        self.interactions.waits_again(submit.client, submit.interaction, submit.request_id, now_s)
        self._mark(submit.client)

    def _mark(self, client: str) -> None:
        """Tell the queue whether the client has an interaction under way."""
        is_under_way = self.interactions.is_under_way(client)
        if is_under_way != self.queue.is_under_way(client):
            self.queue.set_under_way(client, is_under_way)
            self._idlers.look_at(client)

    # -- events from replicas ---------------------------------------------------------------------------------------

    def report(self, report: StepReport, now_s: float) -> ReportReply:
        """A replica's totals and what became of its requests; then as many grants as fit anywhere."""
        is_old_acquaintance = report.is_full or report.epoch not in (0, self.epoch)
        added = self.ledger.merge(report, as_baseline=is_old_acquaintance and not self._knows_the_past)
        if added is not None:
            self._merge(report, added, now_s)
            if report.is_draining:
                self._drain(report.replica, now_s)
            self.dispatch(now_s)
            self._forget_idle()
        table, room = self.queue.table, self.capacity.get(report.replica)
        ack = self.ledger.ack(report.replica, report.incarnation)
        clients = {*map(client_of, report.totals), *report.clients}
        return ReportReply(
            epoch=self.epoch,
            ack=ack,
            saved=ack,
            counters={node: table.counter(node) for client in clients if client in table for node in path_of(client)},
            need_full=not report.is_full and report.epoch not in (0, self.epoch),
            is_draining=room is not None and room.is_draining,
        )

    def _merge(self, report: StepReport, added: Mapping[str, Totals], now_s: float) -> None:
        watch, table, notes = self.watch, self.queue.table, self.notes
        owners = {account: client_of(account) for account in report.totals}
        clients = {owners[account] for account in added}
        given_back = {owners[account] for account, difference in added.items() if difference.service < 0}
        levels = watch.levels(self._clients_of(report) | given_back)
        room = self.capacity.get(report.replica)
        is_current = room is None or room.incarnation <= report.incarnation
        if room is None and self._gone.get(report.replica, now_s) > now_s:
            is_current = False  # its last words: they count, and offer no room
        elif room is None:
            notes.joined(report.replica, now_s)
        elif room.incarnation < report.incarnation:
            self._lose_replica(report.replica, now_s)
            self.ledger.lost_replica(report.replica, room.incarnation)
            notes.restarted(report.replica, now_s)
        for client in owners.values():
            if client not in table:
                self.weights.carry(client, report.weights.get(client, 1.0))
                if client in clients:  # forgotten, or unknown to this life: what it is charged now is on top of that
                    self.queue.begin_level(client)
        before = {node: table.counter(node) for client in clients for node in path_of(client)}
        for request_id in (*report.received, *report.held):
            self._confirm(request_id, report, now_s)
        for request_id in report.started:
            self._start(request_id, report, now_s)
        for account, difference in added.items():
            share = self._charge(account, difference.service)
            notes.served(report.replica, owners[account], difference, share)
        for request_id, num_output in report.outputs.items():
            self._progress(request_id, num_output, report)
        for request_id in report.finished:
            self._finish(request_id, report, now_s)
        watch.returned(levels)
        watch.merged(report.replica, before)
        if is_current:
            self.capacity.report(report, now_s)
        watch.observe(clients)
        for client in owners.values():
            self._idlers.look_at(client)

    def _charge(self, account: str, service: float) -> float:
        """It was served; returns what it adds to the client's counter at the top level."""
        client, queue = client_of(account), self.queue
        rates = queue.rates(client, queue.policy.price(client, application_of(account)))
        queue.charge(client, service, rates)
        self.watch.served(client, service, rates)
        return service * rates[0]

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
        watch, table = self.watch, self.queue.table
        added = self.ledger.merge_cluster(cluster, incarnation, totals, seq)
        if as_baseline:
            return
        clients = {client_of(account) for account in added}
        levels = watch.levels(clients)
        before = {node: table.counter(node) for client in clients for node in path_of(client)}
        for account, difference in added.items():
            if (client := client_of(account)) not in table:
                self.weights.carry(client, weights.get(account, 1.0))
            self._charge(account, difference.service)
        watch.returned(levels)
        watch.merged(CLUSTER + cluster, before)
        watch.observe(clients)
        for client in clients:
            self._idlers.look_at(client)
        self._forget_idle()

    def _clients_of(self, report: StepReport) -> set[str]:
        """Clients whose grants the report may settle."""
        leases = map(
            self.leases.get, (*report.received, *report.held, *report.started, *report.outputs, *report.finished)
        )
        return {lease.waiting.submit.client for lease in leases if lease is not None}

    def _is_on(self, lease: Lease, report: StepReport) -> bool:
        return (lease.replica, lease.incarnation) == (report.replica, report.incarnation)

    def _confirm(self, request_id: str, report: StepReport, now_s: float) -> Lease | None:
        lease = self.leases.get(request_id)
        if lease is None or not self._is_on(lease, report):
            self._void(request_id, now_s)
            return None
        if not lease.confirmed:
            self.leases.confirm(request_id)
            self.capacity.release(lease.replica, request_id)
            session = self._sessions.get(lease.waiting.router)
            if session is not None:  # the router had the grant, though it may have no reason to call again
                session.withdraw(request_id)
        return lease

    def _void(self, request_id: str, now_s: float) -> None:
        """It is on a replica already: whatever else was planned for it is void. A router that wants it all the same
        (it could not reach that replica) is asked to submit again."""
        waiting = self._drop(request_id, now_s)
        session = self._sessions.get(waiting.router) if waiting is not None else None
        if session is not None:
            session.is_complete = False

    def _start(self, request_id: str, report: StepReport, now_s: float) -> None:
        """The replica's totals include this request's input from now on."""
        lease = self._confirm(request_id, report, now_s)
        if lease is not None:
            lease.has_started = True
            self._settle(lease)
            self._no_longer_over(request_id, lease)

    def _progress(self, request_id: str, num_output: int, report: StepReport) -> None:
        """The replica's totals include this many output tokens of the request."""
        lease = self.leases.get(request_id)
        if lease is not None and self._is_on(lease, report):
            lease.num_output = max(lease.num_output, num_output)
            self._settle(lease)

    def _settle(self, lease: Lease) -> None:
        """What the replica has reported is no longer held: input once it started, output token by token."""
        submit = lease.waiting.submit
        if lease.has_started and lease.held:
            made = self.cost.service(submit.num_input, lease.num_output)
            expected = self.cost.service(submit.num_input, lease.predicted)
            self._release(lease, lease.held - max(0.0, expected - made))

    def _finish(self, request_id: str, report: StepReport, now_s: float) -> None:
        lease = self.leases.get(request_id)
        if lease is None or not self._is_on(lease, report):
            return
        submit = lease.waiting.submit
        if lease.has_started:
            client, application = submit.client, submit.application
            self._predictor.learn(client, application, lease.num_output)
            service = self.cost.service(submit.num_input, lease.num_output)
            input_service = self.cost.service(submit.num_input, 0)
            self.queue.policy.finished(client, application, lease.replica, input_service, service)
        if self._log is not None:
            self._log.finished(request_id, lease, now_s)
        self._drop(request_id, now_s)

    # -- grants -----------------------------------------------------------------------------------------------------

    def dispatch(self, now_s: float) -> None:
        """Grant while the head of the policy's order fits somewhere; the first that does not stops all (no skipping:
        the bound needs it), unless it is throttled: that is as if its caller had gone."""
        placement = self._placement
        num_refused = 0
        if placement.is_full(now_s) and not self.throttle.looks_at_picks:
            return
        while (waiting := placement.next()) is not None:
            submit = waiting.submit
            need = self.limits.need_tokens(submit)
            room = placement.room_for(submit, need, now_s)
            if room is None:
                room = placement.room_over(submit.client, now_s)
                if room is None:
                    if num_refused < MOST_REFUSED and self._turned_away(waiting, now_s):
                        num_refused += 1
                        continue
                    return
                room.granted_over = submit.request_id
                self.num_granted_over += 1
            self.queue.take(submit.client, submit.request_id)
            self._grant(waiting, room, need, now_s)

    def _turned_away(self, waiting: Waiting, now_s: float) -> bool:
        """Refuse what was picked and fits nowhere, with all that waits for the same interaction, if that may not begin
        now (FairServe, section 4.1)."""
        submit = waiting.submit
        if self.interactions.has_begun(submit.client, submit.interaction, submit.request_id):
            return False
        error = self.door.refuse_late(waiting, now_s)
        if error is None:
            return False
        for request_id in self.interactions.turned_away(submit.client, submit.interaction, submit.request_id):
            refused = self._drop(request_id, now_s)
            if refused is not None:
                self.num_sent += 1
                self.door.refused_late(refused)
                self._refused(refused.submit, error, now_s)
                self._sessions[refused.router].put(Refusal(request_id, error, self.num_sent), now_s)
                self._to_wake.add(refused.router)
        return True

    def _no_longer_over(self, request_id: str, lease: Lease) -> None:
        room = self.capacity.get(lease.replica)
        if room is not None and room.granted_over == request_id:
            room.granted_over = None

    def _grant(self, waiting: Waiting, room: ReplicaRoom, need: int, now_s: float) -> None:
        """Charge and lease what was picked: one step, nobody can come between."""
        submit = waiting.submit
        client, request_id = submit.client, submit.request_id
        policy, cost = self.queue.policy, self.cost
        foretold = self._predictor.predict(client, submit.application, submit.predicted_output)
        predicted = min(max(0.0, foretold), submit.max_output)
        input_service = cost.service(submit.num_input, 0)
        service = cost.service(submit.num_input, predicted) if predicted else input_service
        rates = self.queue.rates(client, policy.price(client, submit.application))
        owed = cost.service(submit.num_input, submit.max_output) - service
        self.num_granted += 1
        self.num_sent += 1
        deadline_s = now_s + self.limits.lease_s
        lease = Lease(waiting, room.name, room.incarnation, predicted, service, rates, owed, deadline_s, self.num_sent)
        self.leases.add(request_id, lease)
        self.queue.charge(client, service, rates)
        self.watch.granted(client, scaled(service, rates), scaled(owed, rates))
        waiting.is_first = False
        self.interactions.granted(client, submit.interaction, request_id)
        self.capacity.reserve(room.name, request_id, need)
        self._placement.placed(submit, room, input_service)
        waited_s = now_s - waiting.arrived_s
        self.door.granted(client, waited_s, now_s)
        self.watch.observe_one(client)
        self.notes.granted(client, room.name, waited_s, now_s, is_over=room.granted_over == request_id)
        if self._log is not None:
            self._log.granted(lease, self.queue.counter(client), waited_s, now_s)
        self._sessions[waiting.router].put(Grant(request_id, room.name, waited_s, self.num_sent), now_s)
        self._to_wake.add(waiting.router)

    def _release(self, lease: Lease, service: float) -> None:
        """Give back what was charged at the grant: the replica's totals hold it now, or it will not be served."""
        if not lease.held:
            return
        client = lease.waiting.submit.client
        self.queue.charge(client, -service, lease.rates)
        self.watch.gave_back(client, scaled(service, lease.rates))
        lease.held = lease.held - service if service < lease.held else 0.0

    def _drop(self, request_id: str, now_s: float) -> Waiting | None:
        """The request leaves, from whatever stage; an unserved charge returns."""
        waiting = self.room.remove(request_id)
        lease = self.leases.pop(request_id)
        if lease is not None:
            waiting = lease.waiting
            client = waiting.submit.client
            levels = self.watch.levels((client,))
            self._release(lease, lease.held)
            self.watch.ended(client, scaled(lease.owed, lease.rates))
            self.capacity.release(lease.replica, request_id)
            self._no_longer_over(request_id, lease)
            self.watch.returned(levels)
        if waiting is not None:
            submit = waiting.submit
            session = self._sessions.get(waiting.router)
            if session is not None:
                session.requests.discard(request_id)
                session.withdraw(request_id)
            if submit.interaction:
                num_tokens = submit.num_input + lease.num_output if lease is not None and lease.has_started else 0
                self.interactions.ended(submit.client, submit.interaction, request_id, num_tokens, now_s)
            self.watch.observe_one(submit.client)
            self.notes.moved(submit.client, now_s)
            self._idlers.look_at(submit.client)
        return waiting

    def _cancel(self, request_id: str, now_s: float) -> None:
        """Whoever wanted it went away."""
        if self._drop(request_id, now_s) is not None and self._log is not None:
            self._log.cancelled(request_id, now_s)

    # -- what an operator changes -------------------------------------------------------------------------------------

    def control(self, client: str, control: Control, now_s: float) -> None:
        """Set what holds for a client from the next pick on; makes the client known. A client that is paused keeps
        what runs, and its requests wait aside; on resume it is lifted like any newcomer. What a change of weight means
        for counters and bounds: :class:`~fairserve.dispatch.weights.Weights`."""
        self.controls.put(client, control)
        self.weights.control(client)
        self.num_lifts += self.room.regroup(client) > 0
        self.watch.observe_one(client)
        self.notes.moved(client, now_s)
        self._idlers.look_at(client)
        if self._log is not None:
            self._log.changed(client, control, now_s)
        self.dispatch(now_s)

    # -- time -------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let leases lapse, routers and replicas die, and overload show; call it a few times a second."""
        limits = self.limits
        for session in [s for s in self._sessions.values() if s.is_dead(now_s, limits.router_dead_s)]:
            self.notes.lost_router(session.router, now_s - session.heard_s, now_s)
            self._end_session(session, now_s)
        for room in [r for r in self.capacity if now_s - r.heard_s > limits.replica_stale_s]:
            if room.is_draining and not self.leases.on(room.name):
                self.notes.drained(room.name, now_s)
                self._forget_replica(room.name, now_s)
            elif now_s - room.heard_s > limits.replica_dead_s:
                self.notes.lost_replica(room.name, now_s - room.heard_s, now_s)
                self._forget_replica(room.name, now_s)
        self._gone = {replica: until_s for replica, until_s in self._gone.items() if until_s > now_s}
        while (request_id := self.leases.first_lapsed(now_s)) is not None:
            self.num_lapsed += 1
            lease = self.leases.get(request_id)
            assert lease is not None
            self.notes.lapsed(lease.waiting.submit.client, lease.replica, now_s)
            self._requeue(request_id, now_s)
        if self.throttle.is_on:
            head = self.queue.peek()
            head_wait_s = now_s - head.arrived_s if head is not None else 0.0
            self.throttle.overload.observe(head_wait_s, self.capacity.pressure(now_s), now_s)
        for client in self.interactions.expire(now_s):
            self._mark(client)
        self.notes.tick(self.throttle.overload.is_on, now_s)
        self.dispatch(now_s)
        self._forget_idle()

    def _requeue(self, request_id: str, now_s: float) -> None:
        """Charge returned, request back at its place in the queue. If nothing else of its client waits, the client is
        lifted like any other that becomes active: what the others received meanwhile is no credit."""
        waiting = self._drop(request_id, now_s)
        assert waiting is not None
        session = self._sessions.get(waiting.router)
        if session is not None:
            session.requests.add(request_id)
            self._waits_again(waiting.submit, now_s)
            rise = self.room.enter(waiting)
            self._idlers.look_at(waiting.submit.client)
            self.num_lifts += rise > 0
            self.notes.entered(waiting.submit.client, rise, now_s)
            self.watch.observe_one(waiting.submit.client)

    def _lose_replica(self, replica: str, now_s: float, *, routers_know: bool = False) -> None:
        """It died or began anew: what it never confirmed waits again; the rest is over, the router will say more.
        What its cache held is gone, too. ``routers_know``: they notice with every request that they sent there, so
        only grants that no router has taken yet wait again."""
        self._placement.forget(replica)
        for request_id in self.leases.on(replica):
            lease = self.leases.get(request_id)
            assert lease is not None
            if lease.confirmed or (routers_know and not self._is_in_outbox(request_id, lease)):
                self._drop(request_id, now_s)
            else:
                self._requeue(request_id, now_s)
        self.leases.lost_replica(replica)

    def _forget_replica(self, replica: str, now_s: float, *, routers_know: bool = False) -> None:
        self._lose_replica(replica, now_s, routers_know=routers_know)
        room = self.capacity.get(replica)
        if room is not None:
            self.ledger.lost_replica(replica, room.incarnation)
        self.capacity.forget(replica)
        self.watch.lost_replica(replica)

    def _bury(self, replica: str, now_s: float) -> None:
        """Its process has ended: unserved charges return at once, not after ``replica_dead_s`` of silence."""
        self._gone[replica] = now_s + self.limits.replica_stale_s
        if self.capacity.get(replica) is not None:
            self.notes.died(replica, now_s)
            self._forget_replica(replica, now_s, routers_know=True)

    def _drain(self, replica: str, now_s: float) -> None:
        """It is being stopped: grants that no router has taken yet wait again; what it has not begun it gives back."""
        room = self.capacity.get(replica)
        if room is None or room.is_draining:
            return
        self.capacity.drain(replica)
        self.notes.draining(replica, now_s)
        self._placement.forget(replica)
        for request_id in self.leases.on(replica):
            lease = self.leases.get(request_id)
            assert lease is not None
            if not lease.confirmed and self._is_in_outbox(request_id, lease):
                self._requeue(request_id, now_s)

    def _is_in_outbox(self, request_id: str, lease: Lease) -> bool:
        session = self._sessions.get(lease.waiting.router)
        return session is not None and request_id in session.outbox

    def _end_session(self, session: RouterSession, now_s: float) -> None:
        del self._sessions[session.router]
        for request_id in sorted(session.requests):
            lease = self.leases.get(request_id)
            if lease is None or not lease.confirmed:
                self._cancel(request_id, now_s)

    # -- names --------------------------------------------------------------------------------------------------------

    def _is_busy(self, client: str) -> bool:
        """Something of it waits or is granted, or an operator has set something for it."""
        is_controlled = self.controls.of(client) is not NO_CONTROL
        return is_controlled or self.leases.num_of(client) > 0 or self.room.num_waiting(client) > 0

    def _forget_idle(self) -> None:
        """Too many clients are idle: those whose forgetting forgives least go (``dispatch/forgetting.py``)."""
        while len(self._idlers) > self.limits.max_clients and (first := self._idlers.first()) is not None:
            client, lead = first
            self.num_forgotten += 1
            self.most_forgiven = max(self.most_forgiven, lead)
            for node in self.queue.forget(client):
                self.watch.forget(node)
            self._idlers.forgotten(client)
            self.ledger.forget(client)
            self.door.forget(client)
            self._predictor.forget(client)
            self.notes.forgot(client)

    # -- what others may see ----------------------------------------------------------------------------------------

    def holds(self, request_id: str) -> bool:
        """Whether it waits, or is granted and not finished."""
        return request_id in self.room or request_id in self.leases

    @property
    def is_idle(self) -> bool:
        """No router and no replica is known."""
        return not self._sessions and not len(self.capacity)

    # -- snapshots --------------------------------------------------------------------------------------------------

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
        """Take over a snapshot; only into a dispatcher that has seen nothing yet. Weights of groups are this one's.

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
        self._knows_the_past = True
        for client in data["counters"]:
            self._idlers.look_at(client)
        self._forget_idle()

    def check(self) -> None:
        """Invariants that hold between any two events."""
        self.queue.check()
        self.ledger.check()
        self.capacity.check()
        self.leases.check()
        self.interactions.check()
        self._placement.check()
        self.room.check()
        self.weights.check()
        self._idlers.check()
        assert all(request_id not in self.room for request_id in self.leases)
        unconfirmed = {request_id for request_id, lease in self.leases.items() if not lease.confirmed}
        reserved = {request_id for room in self.capacity for request_id in room.unconfirmed}
        assert reserved <= unconfirmed, "room is reserved for a request that is gone"
        self.watch.check(list(self.leases.values()))
