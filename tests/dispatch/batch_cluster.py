"""A cluster in one process whose replicas batch for real: Dispatcher, RouterBooks, LocalBooks, Reporters, Batchers and
KV blocks, all made from the configuration as the live system makes them. Only the model is missing: a request's answer
is as long as the test says. Messages may be lost; replicas may die and come back.

:meth:`BatchCluster.made` is the truth that no account under test has touched: what the batchers' sequences hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from fairserve.assembly import make_dispatcher, make_local_book
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import Grant, StepReport, Submit
from fairserve.dispatch.replica_book import LocalBook, Reporter
from fairserve.dispatch.router_book import RouterBook
from fairserve.engine.batching import Batcher, Sequence
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.errors import Refused

BLOCK = 4


@dataclass(frozen=True)
class Job:
    """A request, and how long its answer will be."""

    request_id: str
    client: str
    num_input: int
    num_output: int
    max_output: int
    weight: float = 1.0
    application: str = ""
    interaction: str = ""
    call_index: int = 0
    prefix: tuple[int, ...] = ()
    num_cached: int = 0
    """Prompt tokens that every replica finds in its prefix cache."""
    foretold: int | None = None

    def submit(self) -> Submit:
        return Submit(
            self.request_id,
            self.client,
            self.num_input,
            self.max_output,
            self.weight,
            application=self.application,
            interaction=self.interaction,
            call_index=self.call_index,
            prefix=self.prefix,
            predicted_output=self.foretold,
        )


class BatchReplica:
    """One life of one replica."""

    def __init__(self, cluster: BatchCluster, name: str, incarnation: int) -> None:
        self.cluster, self.name, self.incarnation = cluster, name, incarnation
        self.book: LocalBook[GenerateRequest] = make_local_book(cluster.fairness)
        self.reporter = Reporter(name, incarnation)
        self.kv = KVBlocks(cluster.kv_tokens // BLOCK, BLOCK, num_lanes=cluster.slots)
        self.batcher = Batcher(
            self.kv,
            self.book,
            self.book,
            max_num_seqs=cluster.slots,
            max_num_batched_tokens=cluster.step_tokens,
            max_model_len=cluster.kv_tokens,
            preempt_gap=cluster.dispatch.preempt_gap,
            cached_tokens=lambda request: self.jobs[request.request_id].num_cached,
        )
        self.jobs: dict[str, Job] = {}
        self.reserved: dict[str, int] = {}
        self.ended: dict[str, Sequence] = {}
        self.num_preempted = 0
        self.num_recomputed_tokens = 0
        self.most_waiting = 0

    def accept(self, job: Job) -> None:
        request = GenerateRequest(
            job.request_id,
            job.client,
            (0,) * job.num_input,
            SamplingParams(max_tokens=job.max_output),
            job.weight,
            application=job.application,
        )
        reserve = self.cluster.dispatch.reserve_output_tokens
        output = job.max_output if reserve is None else min(job.max_output, reserve)
        self.jobs[job.request_id] = job
        self.reserved[job.request_id] = self.kv.blocks_for(min(job.num_input + output, self.cluster.kv_tokens))
        self.book.received(request)
        self.book.push(request)

    def step(self) -> None:
        plan = self.batcher.plan()
        self.num_preempted += plan.num_preempted
        for sequence in self.batcher.commit(plan, {chunk.request_id: 0 for chunk in plan if chunk.samples}):
            job = self.jobs[sequence.request.request_id]
            if len(sequence.output) == job.num_output:
                self.finish(job.request_id)
        self.most_waiting = max(self.most_waiting, len(self.book))
        self.batcher.check()
        self.book.check()

    def finish(self, request_id: str) -> None:
        """Ends here, done or aborted, waiting or running; a stranger is ignored."""
        if self.reserved.pop(request_id, None) is None:
            return
        sequence = self.batcher.finish(request_id)
        if sequence is not None:
            self.ended[request_id] = sequence

    @property
    def sequences(self) -> dict[str, Sequence]:
        """Everything that ever started in this life."""
        return {**self.ended, **self.batcher.running, **self.batcher.preempted}

    @property
    def is_busy(self) -> bool:
        return bool(self.batcher.running) or bool(len(self.book))

    def compose(self) -> StepReport:
        self.reporter.add(self.book.take_events())
        over = 0
        for request_id, sequence in (*self.batcher.running.items(), *self.batcher.preempted.items()):
            needed = max(self.kv.num_held(request_id), self.kv.blocks_for(sequence.num_tokens))
            over += max(0, needed - self.reserved[request_id])
        return self.reporter.compose(
            free_kv_tokens=(self.kv.num_blocks - sum(self.reserved.values()) - over) * BLOCK,
            free_slots=self.cluster.slots - len(self.reserved),
            kv_capacity_tokens=self.kv.capacity_tokens,
            max_slots=self.cluster.slots,
            num_running=len(self.batcher.running),
            num_waiting=len(self.book),
        )


@dataclass
class BatchCluster:
    """``step()`` is one engine step of every replica, then one exchange of every replica and router."""

    fairness: FairnessConfig = field(default_factory=lambda: FairnessConfig(prediction="none"))
    dispatch: DispatchConfig = field(
        default_factory=lambda: DispatchConfig(lookahead=0, reserve_output_tokens=None, prefix_block_tokens=BLOCK)
    )
    num_replicas: int = 1
    slots: int = 4
    kv_tokens: int = 160
    step_tokens: int = 64
    report_every: int = 1
    loss: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    log: DecisionLog | None = None
    step_s: float = 0.05

    def __post_init__(self) -> None:
        self.now_s, self.num_steps = 0.0, 0
        self.dispatcher: Dispatcher = make_dispatcher(self.fairness, self.dispatch, epoch=1, log=self.log)
        self.router = RouterBook("router", 1)
        self.replicas = [BatchReplica(self, f"replica-{i}", 1) for i in range(self.num_replicas)]
        self.dead: list[BatchReplica] = []
        self.jobs: dict[str, Job] = {}
        self.refused: dict[str, Refused] = {}
        self.cancelled: set[str] = set()
        self.grants: dict[str, Grant] = {}
        for _ in range(4):
            self.step()  # every replica has said hello

    # -- what the world does ----------------------------------------------------------------------------------------

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.jobs[job.request_id] = job
            self._want(job, job.submit())

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)
        self.router.forget(request_id)
        for replica in self.replicas:
            replica.finish(request_id)

    def kill(self, index: int) -> None:
        """The replica dies and a new life of it begins; callers of what ran there send it again."""
        old = self.replicas[index]
        self.dead.append(old)
        self.replicas[index] = BatchReplica(self, old.name, old.incarnation + 1)
        for request_id in list(old.reserved):
            self.router.decline(self.grants[request_id], is_unreachable=False)
            job = self.jobs[request_id]
            self._want(job, replace(job.submit(), is_retry=True))

    def _want(self, job: Job, submit: Submit) -> None:
        self.router.want(
            submit,
            self.now_s,
            lambda grant: self._send(job, grant),
            lambda error: self.refused.__setitem__(job.request_id, error),
        )

    def _send(self, job: Job, grant: Grant) -> None:
        self.grants[job.request_id] = grant
        next(replica for replica in self.replicas if replica.name == grant.replica).accept(job)

    # -- time -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.now_s += self.step_s
        self.num_steps += 1
        for replica in self.replicas:
            replica.step()
        if self.num_steps % self.report_every == 0:
            for replica in self.replicas:
                self._report(replica)
        self._route()
        self.dispatcher.tick(self.now_s)
        self.dispatcher.check()

    def _report(self, replica: BatchReplica) -> None:
        report = replica.compose()
        if self.rng.random() < self.loss:
            return
        reply = self.dispatcher.report(report, self.now_s)
        if self.rng.random() < self.loss:
            return
        reported = replica.reporter.replied(reply)
        if reported is not None:
            replica.book.apply_counters(reply.counters, reported)

    def _route(self) -> None:
        for poll in (False, True):
            if not poll and not self.router.has_news:
                continue
            call = self.router.compose_poll() if poll else self.router.compose(self.now_s)
            if self.rng.random() < self.loss:
                continue
            reply = self.dispatcher.poll(call, self.now_s) if poll else self.dispatcher.route(call, self.now_s)
            if self.rng.random() >= self.loss:
                self.router.replied(reply, to_poll=poll)

    def run_to_rest(self, max_steps: int = 4_000) -> None:
        """Until nothing waits and nothing runs and everything is reported, over a network that loses nothing."""
        self.loss = 0.0
        for _ in range(max_steps):
            self.step()
            if not (
                any(replica.is_busy or replica.reporter.has_news for replica in self.replicas)
                or len(self.router)
                or self.router.has_news
                or len(self.dispatcher.queue)
            ):
                break
        else:
            raise AssertionError("the cluster never came to rest")
        for _ in range(3 * self.report_every):
            self.step()

    # -- the truth --------------------------------------------------------------------------------------------------

    def made(self, client: str) -> float:
        """Service of everything computed for the client by replicas that live, reported or not."""
        return sum(
            self.dispatcher.cost.service(usage.num_input, usage.num_output, usage.num_cached)
            for replica in self.replicas
            for usage in (s.usage for s in replica.sequences.values() if s.request.client == client)
        )

    @property
    def num_delivered_tokens(self) -> int:
        return sum(len(s.output) for replica in self.replicas for s in replica.sequences.values())

    @property
    def clients(self) -> set[str]:
        return {job.client for job in self.jobs.values()}
