"""A cluster in one process: the real Dispatcher, RouterBooks, LocalBooks and Reporters round an engine that counts.

Time is virtual. Every message may be lost, repeated or late: ``network`` decides, one call at a time. Nothing here
knows about fairness.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fairserve.dispatch.dispatcher import Dispatcher, DispatchLimits
from fairserve.dispatch.messages import Grant, ReportReply, RouterReply, StepReport, Submit
from fairserve.dispatch.replica_book import KEPT_ACCOUNTS, LocalBook, Reporter
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import Refused
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import CostFunction, WeightedTokens
from fairserve.fairness.prediction import make_predictor


@dataclass(frozen=True)
class ToyRequest:
    request_id: str
    client: str
    num_input: int
    num_output: int
    max_output: int
    weight: float = 1.0
    application: str = ""
    foretold: int | None = None

    def submit(self, max_waiting: int | None = None) -> Submit:
        return Submit(
            self.request_id,
            self.client,
            self.num_input,
            self.max_output,
            self.weight,
            max_waiting,
            predicted_output=self.foretold,
        )


@dataclass(frozen=True)
class Shape:
    """How large a replica is, and how many engine steps it makes in one step of the cluster."""

    slots: int = 4
    kv_tokens: int = 1_000
    speed: float = 1.0


class Perfect:
    """A network that loses nothing."""

    def arrives(self) -> bool:
        return True

    def replies(self) -> bool:
        return True

    def repeats(self) -> bool:
        return False


@dataclass
class Lossy:
    """Loses calls and replies, and delivers reports twice, with the given chance; a lost reply means that the call was
    carried out."""

    rng: random.Random
    loss: float

    def arrives(self) -> bool:
        return self.rng.random() >= self.loss

    def replies(self) -> bool:
        return self.rng.random() >= self.loss

    def repeats(self) -> bool:
        return self.rng.random() < self.loss


@dataclass
class ToyReplica:
    """Continuous batching in numbers: every step gives each running request one token."""

    name: str
    book: LocalBook[ToyRequest]
    reporter: Reporter
    shape: Shape
    cost: CostFunction
    served: dict[str, list[int]]
    """client -> input and output tokens served by all replicas: theirs in common."""
    incarnation: int = 1
    running: dict[str, ToyRequest] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)
    usage: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """request id -> client, input tokens and output tokens that the caller was told."""
    delivered: dict[str, list[int]] = field(default_factory=dict)
    """client -> input and output tokens served here, this very moment: what no report may have said yet."""
    is_alive: bool = True
    _progress: float = 0.0
    """Part of the next engine step."""

    def accept(self, request: ToyRequest) -> None:
        self.needs[request.request_id] = request.num_input + request.max_output
        self.book.received(request)
        self.book.push(request)

    def advance(self) -> None:
        """One step of the cluster."""
        self._progress += self.shape.speed
        while self._progress >= 1:
            self._progress -= 1
            self.step()

    def step(self) -> None:
        for request in list(self.running.values()):
            self.book.output(request.request_id, 1)
            self._deliver(request.client, 0, 1)
            self.made[request.request_id] += 1
            if self.made[request.request_id] == request.num_output:
                self.finish(request.request_id)
        while (head := self.book.peek()) is not None and len(self.running) < self.shape.slots:
            self.book.pop()
            self.running[head.request_id] = head
            self.made[head.request_id] = 0
            self.book.started(head.request_id, head.num_input, 0)
            self._deliver(head.client, head.num_input, 0)

    def _deliver(self, client: str, num_input: int, num_output: int) -> None:
        for rows in (self.delivered, self.served):
            row = rows.setdefault(client, [0, 0])
            row[0] += num_input
            row[1] += num_output

    def finish(self, request_id: str) -> None:
        """Ends here, done or aborted, waiting or running."""
        request = self.running.pop(request_id, None)
        if request is not None:
            self.usage[request_id] = (request.client, request.num_input, self.made.pop(request_id))
        elif self.book.remove(request_id) is None:
            return
        del self.needs[request_id]
        self.book.finished(request_id)

    def served_of(self, request_id: str) -> float:
        """Service that the request has received here."""
        if request_id in self.usage:
            _, num_input, num_output = self.usage[request_id]
        elif request_id in self.running:
            num_input, num_output = self.running[request_id].num_input, self.made[request_id]
        else:
            return 0.0
        return self.cost.service(num_input, num_output)

    @property
    def free_kv_tokens(self) -> int:
        return self.shape.kv_tokens - sum(self.needs.values())

    @property
    def free_slots(self) -> int:
        return self.shape.slots - len(self.running) - len(self.book)


class ToyCluster:
    """``step()`` is one engine step of every replica (more or fewer, by its ``Shape``), then one exchange of every
    replica and router.

    ``shapes``: of each replica, instead of ``num_replicas`` of ``slots`` and ``kv_tokens``. ``swallow()``: whether a
    router loses the grant that it has just got, as one that dies with it would; the lease must lapse. ``keeps``: a
    snapshot outlives the authority only once :meth:`save` has made it; else one is made in the moment of a crash.
    ``kept_accounts``: of replicas.
    """

    def __init__(
        self,
        policy: str = "vtc",
        *,
        num_replicas: int = 1,
        num_routers: int = 1,
        slots: int = 4,
        kv_tokens: int = 1_000,
        lookahead: int = 0,
        cost: CostFunction | None = None,
        network: Perfect | Lossy | None = None,
        step_s: float = 0.05,
        report_every: int = 1,
        limits: DispatchLimits | None = None,
        shapes: Sequence[Shape] | None = None,
        prediction: str = "none",
        group_weights: Mapping[str, float] | None = None,
        swallow: Callable[[], bool] = lambda: False,
        keeps: bool = False,
        kept_accounts: int = KEPT_ACCOUNTS,
    ) -> None:
        self.policy, self.cost = policy, cost or WeightedTokens()
        self.prediction, self.group_weights = prediction, group_weights
        self.limits = limits or DispatchLimits(lookahead=lookahead)
        self._swallow = swallow
        self._keeps, self._kept_accounts = keeps, kept_accounts
        self._saved: dict[str, Any] | None = None
        self._saved_acks: dict[tuple[str, int], int] = {}
        self.network = network or Perfect()
        self.now_s = 0.0
        self.step_s, self.report_every = step_s, report_every
        self.num_steps = 0
        self.dispatcher = self._new_dispatcher(1)
        self.routers = [RouterBook(f"router-{i}", 1) for i in range(num_routers)]
        self.served: dict[str, list[int]] = {}
        self.replicas: dict[str, ToyReplica] = {}
        self.dead: list[ToyReplica] = []
        """Earlier lives of replicas that began anew."""
        for i, shape in enumerate(shapes or [Shape(slots, kv_tokens)] * num_replicas):
            self.add_replica(f"replica-{i}", shape)
        self.requests: dict[str, tuple[ToyRequest, RouterBook]] = {}
        self.refused: dict[str, Refused] = {}
        self.granted: list[tuple[str, str]] = []
        self.grants: dict[str, Grant] = {}
        self.on_step: list[Callable[[], None]] = []

    def _new_dispatcher(self, epoch: int) -> Dispatcher:
        return Dispatcher(
            make_policy(self.policy),
            self.cost,
            self.limits,
            epoch=epoch,
            predictor=make_predictor(self.prediction),
            group_weights=self.group_weights,
        )

    def add_replica(self, name: str, shape: Shape, incarnation: int = 1) -> ToyReplica:
        book: LocalBook[ToyRequest] = LocalBook(
            make_policy(self.policy),
            self.cost,
            group_weights=self.group_weights,
            tracks_outputs=self.prediction != "none",
        )
        reporter = Reporter(name, incarnation, self._kept_accounts)
        replica = ToyReplica(name, book, reporter, shape, self.cost, self.served, incarnation)
        self.replicas[name] = replica
        return replica

    # -- what the world does ----------------------------------------------------------------------------------------

    def submit(self, request: ToyRequest, router: int = 0, max_waiting: int | None = None) -> None:
        book = self.routers[router]
        self.requests[request.request_id] = (request, book)
        self._want(request, request.submit(max_waiting), book)

    def _want(self, request: ToyRequest, submit: Submit, book: RouterBook) -> None:
        book.want(
            submit,
            self.now_s,
            lambda grant: self._send(request, grant, book),
            lambda error: self.refused.__setitem__(request.request_id, error),
        )

    def cancel(self, request_id: str) -> None:
        """The caller goes away: its router forgets it and the replica, if it has it, aborts it."""
        self.requests[request_id][1].forget(request_id)
        for replica in self.replicas.values():
            replica.finish(request_id)

    def _send(self, request: ToyRequest, grant: Grant, book: RouterBook) -> None:
        if self._swallow():
            return
        replica = self.replicas.get(grant.replica)
        if replica is None or not replica.is_alive:
            book.decline(grant, is_unreachable=True)
            self._want(request, replace(request.submit(), is_retry=True, waited_s=grant.waited_s), book)
            return
        self.granted.append((request.request_id, grant.replica))
        self.grants[request.request_id] = grant
        replica.accept(request)

    def kill_replica(self, name: str, *, resend: bool = False) -> None:
        """``resend``: the routers of what had not started there notice, and want it again."""
        replica = self.replicas[name]
        replica.is_alive = False
        while resend and (request := replica.book.peek()) is not None:
            replica.book.pop()
            del replica.needs[request.request_id]
            grant, book = self.grants[request.request_id], self.requests[request.request_id][1]
            book.decline(grant, is_unreachable=True)
            self._want(request, replace(request.submit(), is_retry=True, waited_s=grant.waited_s), book)

    def restart_replica(self, name: str) -> None:
        """A new life begins under the name of one that was killed."""
        old = self.replicas[name]
        assert not old.is_alive
        self.dead.append(old)
        self.add_replica(name, old.shape, old.incarnation + 1)

    def crash_authority(self, *, snapshot: bool) -> None:
        """The counter actor dies and comes back with an older snapshot, or with nothing."""
        data = (self._saved if self._keeps else self.dispatcher.dump()) if snapshot else None
        self.dispatcher = self._new_dispatcher(self.dispatcher.epoch + 1)
        if data is not None:
            self.dispatcher.load(data)

    def save(self) -> None:
        """As the counter actor does, about once a second."""
        self._saved_acks = self.dispatcher.ledger.acks()
        self._saved = json.loads(json.dumps(self.dispatcher.dump()))

    # -- time ---------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.now_s += self.step_s
        self.num_steps += 1
        for replica in self.replicas.values():
            if replica.is_alive:
                replica.advance()
        for replica in self.replicas.values():
            if replica.is_alive and self.num_steps % self.report_every == 0:
                self.exchange_report(replica)
        for router in self.routers:
            self.exchange_router(router)
        self.dispatcher.tick(self.now_s)
        for observer in self.on_step:
            observer()

    def exchange_report(self, replica: ToyReplica) -> None:
        report = self.compose(replica)
        if self.network.arrives():
            reply = self.dispatcher.report(report, self.now_s)
            if self.network.repeats():
                reply = self.dispatcher.report(report, self.now_s)
            if self.network.replies():
                self.deliver_report_reply(replica, reply)

    def compose(self, replica: ToyReplica) -> StepReport:
        replica.reporter.add(replica.book.take_events())
        return replica.reporter.compose(
            free_kv_tokens=replica.free_kv_tokens,
            free_slots=replica.free_slots,
            kv_capacity_tokens=replica.shape.kv_tokens,
            max_slots=replica.shape.slots,
        )

    def deliver_report_reply(self, replica: ToyReplica, reply: ReportReply) -> None:
        if self._keeps:
            saved = self._saved_acks.get((replica.name, replica.incarnation), 0)
            reply = replace(reply, saved=min(reply.ack, saved))
        reported = replica.reporter.replied(reply)
        if reported is not None:
            replica.book.apply_counters(reply.counters, reported)
            replica.book.close(replica.reporter.idle())

    def exchange_router(self, router: RouterBook) -> None:
        for poll in (False, True):
            if not poll and not router.has_news:
                continue
            call = router.compose_poll() if poll else router.compose(self.now_s)
            if self.network.arrives():
                reply: RouterReply = (
                    self.dispatcher.poll(call, self.now_s) if poll else self.dispatcher.route(call, self.now_s)
                )
                if self.network.replies():
                    router.replied(reply, to_poll=poll)

    def run_until_quiet(self, max_steps: int = 10_000) -> None:
        """Step until nothing waits and nothing runs, then once more over a perfect network so that all is reported."""
        self.network = Perfect()
        for _ in range(max_steps):
            self.step()
            busy = any(r.is_alive and (r.running or len(r.book)) for r in self.replicas.values())
            if not busy and not any(len(r) or r.has_news for r in self.routers) and not len(self.dispatcher.queue):
                break
        else:
            raise AssertionError("the cluster never came to rest")
        for _ in range(3):
            self.step()

    def delivered(self, client: str) -> float:
        """Service that all replicas have given this client up to now, reported or not."""
        return self.cost.service(*self.served.get(client, (0, 0)))

    def check(self) -> None:
        self.dispatcher.check()
        for replica in self.replicas.values():
            replica.book.check()

    def told(self, client: str) -> tuple[int, int]:
        """Input and output tokens that callers of this client were told, over all replicas."""
        rows = [u for r in self.replicas.values() for u in r.usage.values() if u[0] == client]
        return sum(row[1] for row in rows), sum(row[2] for row in rows)
