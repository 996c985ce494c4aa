"""A cluster in one process: the real Dispatcher, RouterBooks, LocalBooks and Reporters round an engine that counts.

Time is virtual. Every message may be lost, repeated or late: ``network`` decides, one call at a time. Nothing here
knows about fairness.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fairserve.dispatch.dispatcher import Dispatcher, DispatchLimits
from fairserve.dispatch.messages import Grant, ReportReply, RouterReply, Submit
from fairserve.dispatch.replica_book import LocalBook, Reporter
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import Refused
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import CostFunction, WeightedTokens


@dataclass(frozen=True)
class ToyRequest:
    request_id: str
    client: str
    num_input: int
    num_output: int
    max_output: int
    weight: float = 1.0
    application: str = ""


class Perfect:
    """A network that loses nothing."""

    def arrives(self) -> bool:
        return True

    def replies(self) -> bool:
        return True


@dataclass
class Lossy:
    """Loses calls and replies with the given chances; a lost reply means that the call was carried out."""

    rng: random.Random
    loss: float

    def arrives(self) -> bool:
        return self.rng.random() >= self.loss

    def replies(self) -> bool:
        return self.rng.random() >= self.loss


@dataclass
class ToyReplica:
    """Continuous batching in numbers: every step gives each running request one token."""

    name: str
    book: LocalBook
    reporter: Reporter
    slots: int
    kv_tokens: int
    running: dict[str, ToyRequest] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)
    usage: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """request id -> client, input tokens and output tokens that the caller was told."""
    delivered: dict[str, list[int]] = field(default_factory=dict)
    """client -> input and output tokens served here, this very moment: what no report may have said yet."""
    is_alive: bool = True

    def accept(self, request: ToyRequest) -> None:
        self.needs[request.request_id] = request.num_input + request.max_output
        self.book.received(request)
        self.book.push(request)

    def step(self) -> None:
        for request in list(self.running.values()):
            self.book.output(request.request_id, 1)
            self.delivered[request.client][1] += 1
            self.made[request.request_id] += 1
            if self.made[request.request_id] == request.num_output:
                self.finish(request.request_id)
        while (head := self.book.peek()) is not None and len(self.running) < self.slots:
            self.book.pop()
            self.running[head.request_id] = head
            self.made[head.request_id] = 0
            self.book.started(head.request_id, head.num_input, 0)
            self.delivered.setdefault(head.client, [0, 0])[0] += head.num_input

    def finish(self, request_id: str) -> None:
        """Ends here, done or aborted, waiting or running."""
        request = self.running.pop(request_id, None)
        if request is not None:
            self.usage[request_id] = (request.client, request.num_input, self.made.pop(request_id))
        elif self.book.remove(request_id) is None:
            return
        del self.needs[request_id]
        self.book.finished(request_id)

    @property
    def free_kv_tokens(self) -> int:
        return self.kv_tokens - sum(self.needs.values())

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.running) - len(self.book)


class ToyCluster:
    """``step()`` is one engine step of every replica, then one exchange of every replica and router."""

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
    ) -> None:
        self.policy, self.cost = policy, cost or WeightedTokens()
        self.limits = limits or DispatchLimits(lookahead=lookahead)
        self.network = network or Perfect()
        self.now_s = 0.0
        self.step_s, self.report_every = step_s, report_every
        self.num_steps = 0
        self.dispatcher = self._new_dispatcher(1)
        self.routers = [RouterBook(f"router-{i}", 1) for i in range(num_routers)]
        self.slots, self.kv_tokens = slots, kv_tokens
        self.replicas: dict[str, ToyReplica] = {}
        for i in range(num_replicas):
            self.add_replica(f"replica-{i}")
        self.requests: dict[str, tuple[ToyRequest, RouterBook]] = {}
        self.refused: dict[str, Refused] = {}
        self.granted: list[tuple[str, str]] = []
        self.on_step: list[Callable[[], None]] = []

    def _new_dispatcher(self, epoch: int) -> Dispatcher:
        return Dispatcher(make_policy(self.policy), self.cost, self.limits, epoch=epoch)

    def add_replica(self, name: str) -> ToyReplica:
        replica = ToyReplica(
            name, LocalBook(make_policy(self.policy), self.cost), Reporter(name, 1), self.slots, self.kv_tokens
        )
        self.replicas[name] = replica
        return replica

    # -- what the world does ----------------------------------------------------------------------------------------

    def submit(self, request: ToyRequest, router: int = 0, max_waiting: int | None = None) -> None:
        book = self.routers[router]
        self.requests[request.request_id] = (request, book)
        submit = Submit(
            request.request_id, request.client, request.num_input, request.max_output, request.weight, max_waiting
        )
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
        replica = self.replicas.get(grant.replica)
        if replica is None or not replica.is_alive:
            book.decline(grant, is_unreachable=True)
            submit = Submit(request.request_id, request.client, request.num_input, request.max_output, request.weight)
            book.want(
                replace(submit, is_retry=True, waited_s=grant.waited_s),
                self.now_s,
                lambda grant: self._send(request, grant, book),
                lambda error: self.refused.__setitem__(request.request_id, error),
            )
            return
        self.granted.append((request.request_id, grant.replica))
        replica.accept(request)

    def kill_replica(self, name: str) -> None:
        self.replicas[name].is_alive = False

    def crash_authority(self, *, snapshot: bool) -> None:
        """The counter actor dies and comes back with an older snapshot, or with nothing."""
        data = self.dispatcher.dump() if snapshot else None
        self.dispatcher = self._new_dispatcher(self.dispatcher.epoch + 1)
        if data is not None:
            self.dispatcher.load(data)

    # -- time ---------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.now_s += self.step_s
        self.num_steps += 1
        for replica in self.replicas.values():
            if replica.is_alive:
                replica.step()
        for replica in self.replicas.values():
            if replica.is_alive and self.num_steps % self.report_every == 0:
                self.exchange_report(replica)
        for router in self.routers:
            self.exchange_router(router)
        self.dispatcher.tick(self.now_s)
        for observer in self.on_step:
            observer()

    def exchange_report(self, replica: ToyReplica) -> None:
        replica.reporter.add(replica.book.take_events())
        report = replica.reporter.compose(
            free_kv_tokens=replica.free_kv_tokens,
            free_slots=replica.free_slots,
            kv_capacity_tokens=replica.kv_tokens,
            max_slots=replica.slots,
        )
        if self.network.arrives():
            reply = self.dispatcher.report(report, self.now_s)
            if self.network.replies():
                self.deliver_report_reply(replica, reply)

    def deliver_report_reply(self, replica: ToyReplica, reply: ReportReply) -> None:
        reported = replica.reporter.replied(reply)
        if reported is not None:
            replica.book.apply_counters(reply.counters, reported)

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
        rows = [r.delivered[client] for r in self.replicas.values() if client in r.delivered]
        return self.cost.service(sum(row[0] for row in rows), sum(row[1] for row in rows))

    def check(self) -> None:
        self.dispatcher.check()
        for replica in self.replicas.values():
            replica.book.check()

    def told(self, client: str) -> tuple[int, int]:
        """Input and output tokens that callers of this client were told, over all replicas."""
        rows = [u for r in self.replicas.values() for u in r.usage.values() if u[0] == client]
        return sum(row[1] for row in rows), sum(row[2] for row in rows)
