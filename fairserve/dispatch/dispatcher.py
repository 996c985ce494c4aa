"""The Dispatcher: backlog + policy + capacity + ledger -> grants. The cluster's one authority, as plain code.

It is the only writer of counters, backlog, leases and capacity. Every method takes the time; none blocks.

A request's life here: *waiting* (submitted) -> *leased* (granted: its input is charged, provisionally, in the same
step as the pick) -> *confirmed* (the replica reported it received) -> *started* (the provisional charge is replaced by
what the replica reports) -> *finished*. It may leave from every stage; whatever was charged and not served returns.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from fairserve.dispatch.capacity import Capacity, ReplicaRoom
from fairserve.dispatch.drain import DrainRate, retry_after_s
from fairserve.dispatch.ledger import Ledger
from fairserve.dispatch.messages import (
    Grant,
    Refusal,
    ReportReply,
    RouterCall,
    RouterReply,
    StepReport,
    Submit,
)
from fairserve.dispatch.sessions import RouterSession
from fairserve.errors import ClientQueueFull, ClusterQueueFull, RateLimited, Refused
from fairserve.fairness.bounds import BoundTracker, GapMonitor, jain
from fairserve.fairness.cost import CostFunction
from fairserve.fairness.policy import Policy
from fairserve.fairness.queue import FairQueue

SNAPSHOT_VERSION = 1
UNREACHABLE_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Numbers of the dispatcher; ``DispatchConfig`` documents each."""

    lookahead: int = 1
    reserve_output_tokens: int | None = None
    max_waiting: int = 10_000
    max_waiting_per_client: int = 2_000
    lease_s: float = 5.0
    replica_stale_s: float = 5.0
    replica_dead_s: float = 20.0
    router_dead_s: float = 20.0


@dataclass(slots=True)
class Waiting:
    submit: Submit
    router: str
    arrived_s: float


@dataclass(slots=True)
class Lease:
    """A granted request. ``charge`` is what the counter rose by, until the replica's own report replaces it."""

    waiting: Waiting
    replica: str
    incarnation: int
    charge: float
    owed: float
    """Output service / weight it may still make: part of the bound."""
    deadline_s: float
    confirmed: bool = False


class Dispatcher:
    """``epoch`` names this life of the authority: positive, and greater than that of every earlier life."""

    def __init__(self, policy: Policy, cost: CostFunction, limits: DispatchLimits, *, epoch: int) -> None:
        assert epoch > 0
        self.epoch = epoch
        self.cost = cost
        self.limits = limits
        self.queue: FairQueue[Waiting] = FairQueue(policy)
        self.ledger = Ledger()
        self.capacity = Capacity(limits.lookahead, limits.replica_stale_s)
        self.bounds = BoundTracker()
        self.gaps = GapMonitor()
        self._sessions: dict[str, RouterSession] = {}
        self._to_wake: set[str] = set()
        self._leases: dict[str, Lease] = {}
        self._unconfirmed: OrderedDict[str, Lease] = OrderedDict()
        self._by_replica: dict[str, set[str]] = {}
        self._provisional: dict[str, float] = {}
        self._owed: dict[str, float] = {}
        self._scaled_service: dict[str, float] = {}
        self._drain = DrainRate()
        self._client_drain: dict[str, DrainRate] = {}
        self._knows_the_past = False
        self.num_lifts = 0
        self.num_granted = 0
        self.num_lapsed = 0
        self.num_refused = 0

    # -- events from routers ----------------------------------------------------------------------------------------

    def route(self, call: RouterCall, now_s: float) -> RouterReply:
        """A router's submits, cancels and declined grants, then as many grants as fit anywhere."""
        session = self._session(call, now_s)
        if session is None:
            return RouterReply(self.epoch)
        if not session.is_repeat(call):
            session.last_seq = call.seq
            session.is_complete = session.is_complete or call.is_full
            for replica in call.unreachable:
                self.capacity.suspend(replica, now_s + UNREACHABLE_PAUSE_S)
            for request_id in (*call.cancels, *call.declined):
                self._drop(request_id)
            submits = call.submits
            if call.is_full:  # the least served first, or a client that is ahead would lift those behind it
                submits = tuple(sorted(submits, key=lambda submit: self.queue.counter(submit.client)))
            refusals = (self._submit(submit, session, now_s) for submit in submits)
            session.last_refusals = tuple(refusal for refusal in refusals if refusal is not None)
            self.dispatch(now_s)
        return self._reply(session, session.last_refusals)

    def poll(self, call: RouterCall, now_s: float) -> RouterReply:
        """Grants that wait for this router; ``call`` carries no events, and its ``seq`` is not looked at."""
        session = self._session(call, now_s)
        return RouterReply(self.epoch) if session is None else self._reply(session, ())

    def take_routers_to_wake(self) -> set[str]:
        """Routers that were granted something since the last call: their long polls should answer now."""
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
            self._end_session(session)
        is_first_call = call.epoch == 0
        self._sessions[call.router] = RouterSession(call.router, call.incarnation, now_s, is_complete=is_first_call)
        return self._sessions[call.router]

    def _reply(self, session: RouterSession, refusals: tuple[Refusal, ...]) -> RouterReply:
        return RouterReply(self.epoch, tuple(session.outbox.values()), refusals, resubmit=not session.is_complete)

    def _submit(self, submit: Submit, session: RouterSession, now_s: float) -> Refusal | None:
        if submit.request_id in self.queue or submit.request_id in self._leases:
            return None
        client = submit.client
        self.queue.table.register(client, submit.weight)
        if not submit.is_retry:
            error = self._refuse(submit, now_s)
            if isinstance(error, ClientQueueFull | ClusterQueueFull):
                self.dispatch(now_s)  # earlier ones of the same call may only look as if they had to wait
                error = self._refuse(submit, now_s)
            if error is not None:
                self.num_refused += 1
                return Refusal(submit.request_id, error)
            self.queue.policy.accepted(client, now_s)
        session.requests.add(submit.request_id)
        waiting = Waiting(submit, session.router, now_s - submit.waited_s)
        rise = self.queue.arrive(client, submit.request_id, waiting, waiting.arrived_s)
        self.num_lifts += rise > 0
        self._observe({client})
        return None

    def _refuse(self, submit: Submit, now_s: float) -> Refused | None:
        client, limits = submit.client, self.limits
        wait_s = self.queue.policy.retry_after_s(client, now_s)
        if wait_s is not None:
            return RateLimited(client, getattr(self.queue.policy, "limit", 0), max(wait_s, 1.0))
        limit = limits.max_waiting_per_client if submit.max_waiting is None else submit.max_waiting
        waiting = self.queue.backlog
        num = waiting.num_waiting(client)
        if num >= limit:
            drain = self._client_drain.get(client)
            return ClientQueueFull(client, num, limit, retry_after_s(1, drain.per_s(now_s) if drain else 0.0))
        share = limits.max_waiting / (waiting.num_clients + (num == 0))
        if len(waiting) >= limits.max_waiting and (num >= share or len(waiting) >= 2 * limits.max_waiting):
            return ClusterQueueFull(len(waiting), limits.max_waiting, retry_after_s(1, self._drain.per_s(now_s)))
        return None

    # -- events from replicas ---------------------------------------------------------------------------------------

    def report(self, report: StepReport, now_s: float) -> ReportReply:
        """A replica's totals and what became of its requests; then as many grants as fit anywhere."""
        is_old_acquaintance = report.is_full or report.epoch not in (0, self.epoch)
        added = self.ledger.merge(report, as_baseline=is_old_acquaintance and not self._knows_the_past)
        if added is not None:
            level = self._level()
            room = self.capacity.get(report.replica)
            is_current = room is None or room.incarnation <= report.incarnation
            if room is not None and room.incarnation < report.incarnation:
                self._lose_replica(report.replica)
            before = {client: self.queue.counter(client) for client in added}
            for request_id in (*report.received, *report.held):
                self._confirm(request_id, report)
            for request_id in report.started:
                self._settle(request_id, report)
            for client in report.totals:
                if client not in self.queue.table:
                    self.queue.table.register(client, report.weights.get(client, 1.0))
            for client, difference in added.items():
                amount = self.queue.charge(client, difference.service)
                self._scaled_service[client] = self._scaled_service.get(client, 0.0) + amount
            for request_id in report.finished:
                self._finish(request_id, report)
            self.bounds.saw_return(level, self._level())
            self.bounds.saw_merge(report.replica, max((self.queue.counter(c) - before[c] for c in added), default=0.0))
            if is_current:
                self.capacity.report(report, now_s)
            self._observe(set(added))
            self.dispatch(now_s)
        clients = {*report.totals, *report.clients}
        return ReportReply(
            epoch=self.epoch,
            ack=self.ledger.ack(report.replica, report.incarnation),
            counters={client: self.queue.counter(client) for client in clients if client in self.queue.table},
            need_full=not report.is_full and report.epoch not in (0, self.epoch),
        )

    def _is_on(self, lease: Lease, report: StepReport) -> bool:
        return (lease.replica, lease.incarnation) == (report.replica, report.incarnation)

    def _confirm(self, request_id: str, report: StepReport) -> Lease | None:
        lease = self._leases.get(request_id)
        if lease is None or not self._is_on(lease, report):
            self._void(request_id)
            return None
        if not lease.confirmed:
            lease.confirmed = True
            del self._unconfirmed[request_id]
            self.capacity.release(lease.replica, request_id)
        return lease

    def _void(self, request_id: str) -> None:
        """It is on a replica already: whatever else was planned for it is void. A router that wants it all the same
        (it could not reach that replica) is asked to submit again."""
        waiting = self._drop(request_id)
        session = self._sessions.get(waiting.router) if waiting is not None else None
        if session is not None:
            session.is_complete = False

    def _settle(self, request_id: str, report: StepReport) -> None:
        """The replica's totals include this request's input from now on."""
        lease = self._confirm(request_id, report)
        if lease is not None:
            self._return_charge(lease)

    def _finish(self, request_id: str, report: StepReport) -> None:
        lease = self._leases.get(request_id)
        if lease is not None and self._is_on(lease, report):
            self._drop(request_id)

    # -- grants -----------------------------------------------------------------------------------------------------

    def dispatch(self, now_s: float) -> None:
        """Grant while the head of the policy's order fits somewhere; the first that does not stops all (no skipping:
        the bound needs it)."""
        while (waiting := self.queue.peek()) is not None:
            need = self._need_tokens(waiting.submit)
            room = self.capacity.best_for(need, now_s)
            if room is None:
                return
            self.queue.pop()
            self._grant(waiting, room, need, now_s)

    def _need_tokens(self, submit: Submit) -> int:
        reserve = self.limits.reserve_output_tokens
        return submit.num_input + (submit.max_output if reserve is None else min(submit.max_output, reserve))

    def _grant(self, waiting: Waiting, room: ReplicaRoom, need: int, now_s: float) -> None:
        """Charge and lease what was picked: one step, nobody can come between."""
        submit = waiting.submit
        client, request_id = submit.client, submit.request_id
        input_service = self.cost.service(submit.num_input, 0)
        charge = self.queue.charge(client, input_service)
        whole = self.cost.service(submit.num_input, submit.max_output)
        owed = (whole - input_service) / self.queue.table.weight(client)
        deadline_s = now_s + self.limits.lease_s
        lease = Lease(waiting, room.name, room.incarnation, charge, owed, deadline_s)
        self._leases[request_id] = self._unconfirmed[request_id] = lease
        self._by_replica.setdefault(room.name, set()).add(request_id)
        self._provisional[client] = self._provisional.get(client, 0.0) + charge
        self._owed[client] = self._owed.get(client, 0.0) + owed
        self.bounds.saw_grant(charge, self._owed[client])
        self.bounds.saw_in_flight(self._provisional[client])
        self.capacity.reserve(room.name, request_id, need)
        self._drain.count(now_s)
        self._client_drain.setdefault(client, DrainRate()).count(now_s)
        self.num_granted += 1
        self._observe({client})
        grant = Grant(request_id, room.name, now_s - waiting.arrived_s, self.num_granted)
        self._sessions[waiting.router].put(grant)
        self._to_wake.add(waiting.router)

    def _return_charge(self, lease: Lease) -> None:
        if not lease.charge:
            return
        client = lease.waiting.submit.client
        self.queue.give_back(client, lease.charge)
        _subtract(self._provisional, client, lease.charge)
        lease.charge = 0.0

    def _level(self) -> float:
        """Where a client that becomes active now is lifted to: 0 before the first."""
        reference = self.queue.least_served() or self.queue.last_to_leave
        return 0.0 if reference is None else self.queue.counter(reference)

    def _drop(self, request_id: str) -> Waiting | None:
        """The request leaves, from whatever stage; an unserved charge returns."""
        level = self._level()
        waiting = self.queue.remove(request_id)
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            waiting = lease.waiting
            client = waiting.submit.client
            self._return_charge(lease)
            _subtract(self._owed, client, lease.owed)
            self._unconfirmed.pop(request_id, None)
            self._by_replica[lease.replica].discard(request_id)
            self.capacity.release(lease.replica, request_id)
            self.bounds.saw_return(level, self._level())
        if waiting is not None:
            session = self._sessions.get(waiting.router)
            if session is not None:
                session.requests.discard(request_id)
                session.withdraw(request_id)
            self._observe({waiting.submit.client})
        return waiting

    # -- time -------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let leases lapse, and routers and replicas die; call it a few times a second."""
        limits = self.limits
        for session in [s for s in self._sessions.values() if now_s - s.heard_s > limits.router_dead_s]:
            self._end_session(session)
        for room in [r for r in self.capacity if now_s - r.heard_s > limits.replica_dead_s]:
            self._lose_replica(room.name)
            self.capacity.forget(room.name)
            self.bounds.lost_replica(room.name)
        while self._unconfirmed:
            request_id, lease = next(iter(self._unconfirmed.items()))
            if lease.deadline_s > now_s:
                break
            self.num_lapsed += 1
            self._requeue(request_id)
        self.dispatch(now_s)

    def _requeue(self, request_id: str) -> None:
        """Charge returned, request back at its place in the queue. If nothing else of its client waits, the client is
        lifted like any other that becomes active: what the others received meanwhile is no credit."""
        waiting = self._drop(request_id)
        assert waiting is not None
        session = self._sessions.get(waiting.router)
        if session is not None:
            session.requests.add(request_id)
            rise = self.queue.arrive(waiting.submit.client, request_id, waiting, waiting.arrived_s)
            self.num_lifts += rise > 0
            self._observe({waiting.submit.client})

    def _lose_replica(self, replica: str) -> None:
        """It died or began anew: what it never confirmed waits again; the rest is over, the router will say more."""
        for request_id in sorted(self._by_replica.get(replica, ())):
            if self._leases[request_id].confirmed:
                self._drop(request_id)
            else:
                self._requeue(request_id)
        self._by_replica.pop(replica, None)

    def _end_session(self, session: RouterSession) -> None:
        del self._sessions[session.router]
        for request_id in sorted(session.requests):
            lease = self._leases.get(request_id)
            if lease is None or not lease.confirmed:
                self._drop(request_id)

    # -- what others may see ----------------------------------------------------------------------------------------

    def _observe(self, changed: set[str]) -> None:
        """Watch the gap of clients whose service or backlog changed."""
        self.gaps.observe({client: self._scaled_service.get(client, 0.0) for client in changed}, self.queue.is_waiting)

    @property
    def is_idle(self) -> bool:
        """No router and no replica is known."""
        return not self._sessions and not len(self.capacity)

    def status(self, now_s: float) -> dict[str, Any]:
        """A plain picture for people: clients, replicas, gap and bound. Amounts are service / weight where named so."""
        running: dict[str, int] = {}
        for lease in self._leases.values():
            client = lease.waiting.submit.client
            running[client] = running.get(client, 0) + 1
        clients = {}
        for client in self.queue.table:
            totals = self.ledger.totals(client)
            clients[client] = {
                "weight": self.queue.table.weight(client),
                "counter": self.queue.counter(client),
                "waiting": self.queue.backlog.num_waiting(client),
                "running": running.get(client, 0),
                "service": totals.service,
                "num_input": totals.num_input,
                "num_cached": totals.num_cached,
                "num_output": totals.num_output,
            }
        return {
            "time_s": now_s,
            "epoch": self.epoch,
            "policy": self.queue.policy.name,
            "clients": clients,
            "replicas": {
                room.name: {
                    "report_age_s": now_s - room.heard_s,
                    "free_kv_tokens": room.room_tokens,
                    "kv_capacity_tokens": room.kv_capacity_tokens,
                    "max_slots": room.max_slots,
                    "running": room.num_running,
                    "waiting": room.num_waiting,
                    "granted_unconfirmed": len(room.unconfirmed),
                }
                for room in self.capacity
            },
            "routers": len(self._sessions),
            "waiting": len(self.queue),
            "leases": len(self._leases),
            "granted": self.num_granted,
            "lapsed": self.num_lapsed,
            "refused": self.num_refused,
            "lifts": self.num_lifts,
            "bound": self.bounds.bound,
            "bound_unit": self.bounds.unit,
            "staleness": self.bounds.staleness,
            "worst_gap": self.gaps.worst,
            "worst_pair": self.gaps.worst_pair,
            "jain_backlogged": jain([self._scaled_service.get(c, 0.0) for c in self.queue.backlog.clients()]),
        }

    # -- snapshots --------------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Everything that must outlive the authority, as plain values. Provisional charges are left out: the requests
        behind them are settled by their replica's report, or come again."""
        table = self.queue.table
        return {
            "version": SNAPSHOT_VERSION,
            "counters": {
                client: [table.counter(client) - self._provisional.get(client, 0.0), table.weight(client)]
                for client in table
            },
            # The next life begins with nobody waiting: the lift's reference is then whoever is least served now.
            "last_to_leave": self.queue.least_served() or self.queue.last_to_leave,
            "ledger": self.ledger.dump(),
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take over a snapshot; only into a dispatcher that has seen nothing yet.

        Raises:
            ValueError: when the snapshot is of another version.
        """
        assert not len(self.queue) and not self._leases
        if data.get("version") != SNAPSHOT_VERSION:
            raise ValueError(f"snapshot version {data.get('version')!r}, this fairserve reads {SNAPSHOT_VERSION}")
        for client, (counter, weight) in data["counters"].items():
            self.queue.table.register(client, weight)
            self.queue.table.set(client, counter)
        self.queue.table.rebase()
        self.queue.restore_last_to_leave(data["last_to_leave"])
        self.ledger.load(data["ledger"])
        self._knows_the_past = True

    def check(self) -> None:
        """Invariants that hold between any two events."""
        self.queue.check()
        self.ledger.check()
        self.capacity.check()
        assert all(request_id not in self.queue for request_id in self._leases)
        unconfirmed = {request_id for request_id, lease in self._leases.items() if not lease.confirmed}
        assert unconfirmed == set(self._unconfirmed)
        reserved = {request_id for room in self.capacity for request_id in room.unconfirmed}
        assert reserved <= unconfirmed, "room is reserved for a request that is gone"
        assert {r for requests in self._by_replica.values() for r in requests} == set(self._leases)
        for name, mine in (("charge", self._provisional), ("owed", self._owed)):
            sums: dict[str, float] = {}
            for lease in self._leases.values():
                client = lease.waiting.submit.client
                sums[client] = sums.get(client, 0.0) + getattr(lease, name)
            for client in sums.keys() | mine.keys():
                total, amount = sums.get(client, 0.0), mine.get(client, 0.0)
                assert abs(total - amount) <= 1e-6 * (1 + abs(total)), (name, client, total, amount)


def _subtract(amounts: dict[str, float], client: str, amount: float) -> None:
    """Keep only what is more than rounding."""
    amounts[client] = amounts.get(client, 0.0) - amount
    if abs(amounts[client]) < 1e-6:
        del amounts[client]
