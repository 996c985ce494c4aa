"""A simulated replica: the real Batcher, KV blocks, local book and reporter, round a model that only takes time.

It does what ``engine/engine.py`` and ``engine/loop.py`` do with them: between two steps requests come in and leave; a
step computes what the Batcher plans; its tokens exist when it ends.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fairserve.dispatch.replica_book import BookEvents, LocalBook
from fairserve.engine.batching import Batcher, StepPlan
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.request import GenerateRequest
from fairserve.fairness.cost import CostFunction
from fairserve.simulate.live import Live
from fairserve.simulate.meter import Meter
from fairserve.simulate.network import Network
from fairserve.simulate.prefix_cache import PrefixCache
from fairserve.simulate.records import Outcome
from fairserve.simulate.setup import ReplicaSetup
from fairserve.simulate.timeline import Timeline


@dataclass(slots=True)
class _Here:
    """One request on this replica."""

    live: Live
    reserved_blocks: int


@dataclass(frozen=True, slots=True)
class State:
    """After the newest step, or after whatever came in between."""

    free_kv_tokens: int
    free_slots: int
    num_running: int = 0
    num_waiting: int = 0


class SimReplica:
    """One incarnation of a replica. Between the steps things happen in the order in which they came."""

    def __init__(
        self,
        name: str,
        setup: ReplicaSetup,
        book: LocalBook[GenerateRequest],
        meter: Meter,
        network: Network,
        *,
        cost: CostFunction,
        jitter: float,
        rng: random.Random,
        reserve_output_tokens: int | None,
        preempt_gap: float | None,
    ) -> None:
        self.name = name
        self.setup = setup
        self.book = book
        self.is_alive = True
        self.cache = PrefixCache(setup.prefix_cache_tokens)
        self.delivered: dict[str, list[int]] = {}
        """client -> input, cached and output tokens of requests that have left."""
        self._cost = cost
        self._jitter = jitter
        self._meter = meter
        self._network = network
        self._timeline: Timeline = network.timeline
        self._rng = rng
        self._reserve = reserve_output_tokens
        self._kv = KVBlocks(setup.kv_tokens // setup.block_size, setup.block_size, num_lanes=setup.max_num_seqs)
        self.batcher = Batcher(
            self._kv,
            book,
            book,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.model_len,
            preempt_gap=preempt_gap,
            cached_tokens=self._starts,
        )
        self.state = State(self._kv.capacity_tokens, setup.max_num_seqs)
        self.on_events: Callable[[BookEvents], None] = lambda events: None
        self.num_sent = 0
        """Requests here or on their way here."""
        self.num_steps = 0
        self._coming: dict[str, Live] = {}
        """Requests that wait for the step to end, to be taken in."""
        self._here: dict[str, _Here] = {}
        self._reserved_blocks = 0
        self._inbox: deque[Callable[[], None]] = deque()
        self._is_turn_due = False
        self._is_stepping = False
        self._started: list[Live] = []
        meter.replicas_changed(idle=1)

    # -- what comes in ------------------------------------------------------------------------------------------------

    def accept(self, live: Live) -> None:
        """A request arrives."""
        if self.is_alive:
            self._coming[live.request_id] = live
            self.between_steps(partial(self._add, live))
        else:
            self._network.carry(partial(live.door.bounced, live))

    def leave(self, live: Live, outcome: Outcome = "cancelled") -> None:
        """Its caller goes away."""
        self.between_steps(partial(self._leave, live, outcome))

    def between_steps(self, act: Callable[[], None]) -> None:
        if self.is_alive:
            self._inbox.append(act)
            self._wake()

    def crash(self) -> list[Live]:
        """Everything here is lost. Returns the requests that had not started."""
        self.is_alive = False
        self._meter.replicas_changed(idle=-(not self._is_stepping), busy=-self._is_stepping)
        self.book_started()
        unserved = list(self._coming.values())
        for request_id, here in list(self._here.items()):
            live = here.live
            if live.has_started:
                self._count(live)
                live.record.reason = "replica_failed"
                live.door.ended(live)
            else:
                unserved.append(live)
            del self._here[request_id]
        return unserved

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """A turn at this moment, after whatever else arrives now."""
        if not self._is_turn_due and not self._is_stepping:
            self._is_turn_due = True
            self._timeline.after(0.0, self._turn)

    def _turn(self) -> None:
        """Let in and out what came meanwhile, and begin a step if there is something to compute."""
        self._is_turn_due = False
        if not self.is_alive:
            return
        inbox = self._inbox
        while inbox:
            inbox.popleft()()
        plan = self.batcher.plan() if self._here else None
        if plan:
            self._begin(plan)
        else:
            self._tell()

    def _begin(self, plan: StepPlan) -> None:
        meter = self._meter
        num_prefill = prefill_context = 0
        sampled = {chunk.request_id: 0 for chunk in plan.decodes}
        for chunk in plan.prefills:
            num, end = len(chunk.token_ids), chunk.end
            num_prefill += num
            prefill_context += num * end
            if chunk.samples:
                sampled[chunk.request_id] = 0
            sequence = self.batcher.running[chunk.request_id]
            known = sequence.num_tokens - 1 if sequence.output else sequence.num_input_computed
            meter.num_recomputed += max(0, min(end, known) - chunk.position)
        decode_context = sum([chunk.position for chunk in plan.decodes]) + len(plan.decodes)
        seconds = self.setup.step_time.seconds(len(plan.decodes), decode_context, num_prefill, prefill_context)
        if self._jitter:
            seconds *= 1.0 + self._jitter * (2.0 * self._rng.random() - 1.0)
        meter.num_steps += 1
        meter.num_preempted += plan.num_preempted
        meter.replicas_changed(idle=-1, busy=1)
        self._is_stepping = True
        self._timeline.after(seconds, partial(self._end, plan, sampled))

    def _end(self, plan: StepPlan, sampled: dict[str, int]) -> None:
        """The tokens of the step are there."""
        if not self.is_alive:
            return
        meter, here, service_of, now_s = self._meter, self._here, self._cost.service, self._timeline.now_s
        self._is_stepping = False
        self.num_steps += 1
        meter.replicas_changed(idle=1, busy=-1)
        moved: dict[str, None] = {}
        for live in self._started:
            record = live.record
            record.num_input = live.request.num_input
            meter.delivered(live, service_of(record.num_input, 0, record.num_cached))
            moved[live.node] = None
            if record.arrival.cancel_after == 0:
                self._caller_leaves(live)
        self._started.clear()
        for sequence in self.batcher.commit(plan, sampled):
            live = here[sequence.request.request_id].live
            record = live.record
            num_output = record.num_output = len(sequence.output)
            meter.delivered(live, service_of(record.num_input, num_output, record.num_cached))
            moved[live.node] = None
            if num_output == 1:
                record.first_token_s = now_s
                if record.arrival.prefix:
                    self.cache.use(record.arrival.prefix)
            if num_output >= live.num_end:
                self._finish(live, "finished")
            elif num_output == record.arrival.cancel_after:
                self._caller_leaves(live)
        meter.moved(moved)
        self._tell()
        self._wake()

    def _caller_leaves(self, live: Live) -> None:
        """It sees the token, goes away, and the replica hears of it."""
        self._network.carry(partial(self.leave, live), num_ways=2)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _add(self, live: Live) -> None:
        request = live.request
        del self._coming[request.request_id]
        live.record.replica = self.name
        live.num_end = min(live.record.arrival.length, self.setup.model_len - request.num_input)
        output = request.sampling.max_tokens
        if self._reserve is not None:
            output = min(output, self._reserve)
        reserved = self._kv.blocks_for(min(request.num_input + output, self.setup.model_len))
        self._here[request.request_id] = _Here(live, reserved)
        self._reserved_blocks += reserved
        self.book.received(request)
        self.book.push(request)

    def _leave(self, live: Live, outcome: Outcome) -> None:
        if live.request_id in self._here:
            self._finish(live, outcome)
            self._meter.moved((live.node,))

    def _finish(self, live: Live, outcome: Outcome) -> None:
        self._remove(live)
        live.record.outcome, live.record.finished_s = outcome, self._timeline.now_s
        if not live.has_started:
            self._meter.left(live)
        live.door.ended(live)

    def give_back(self, live: Live) -> None:
        """Unless it has started, it goes back to where it came from."""
        if live.request_id in self._here and not live.has_started:
            self._remove(live)
            self._network.carry(partial(live.door.returned, live))

    def _remove(self, live: Live) -> None:
        request_id = live.request_id
        self._reserved_blocks -= self._here.pop(request_id).reserved_blocks
        self.num_sent -= 1
        sequence = self.batcher.finish(request_id)
        if sequence is not None:
            record, usage = live.record, sequence.usage
            if usage.num_input != record.num_input:
                record.num_input = usage.num_input
                self._meter.delivered(live, self._cost.service(usage.num_input, usage.num_output, record.num_cached))
            self._count(live)

    def _count(self, live: Live) -> None:
        record = live.record
        row = self.delivered.setdefault(live.request.client, [0, 0, 0])
        for i, num in enumerate((record.num_input, record.num_cached, record.num_output)):
            row[i] += num

    def _starts(self, request: GenerateRequest) -> int:
        """The Batcher takes it from the queue and asks how many of its leading tokens are here."""
        live = self._here[request.request_id].live
        num_cached = min(self.cache.match(live.record.arrival.prefix), request.num_input - 1)
        live.has_started = True
        live.record.num_cached = num_cached
        self._started.append(live)
        self._meter.left(live)
        return num_cached

    # -- what goes out ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        running, waiting = len(self.batcher.running), len(self.book)
        free_slots = self.setup.max_num_seqs - len(self._here)
        self.state = State(self._free_kv_tokens(), free_slots, running, waiting)
        self.on_events(self.book.take_events())

    def _free_kv_tokens(self) -> int:
        """See ``Engine._free_kv_tokens``."""
        over = 0
        if self._reserve is not None:
            kv = self._kv
            for sequences in (self.batcher.running, self.batcher.preempted):
                for request_id, sequence in sequences.items():
                    needed = max(kv.num_held(request_id), kv.blocks_for(sequence.num_tokens))
                    over += max(0, needed - self._here[request_id].reserved_blocks)
        return (self._kv.num_blocks - self._reserved_blocks - over) * self._kv.block_size

    def flush(self) -> None:
        """After the end of a run: tell what was charged since the last step ended."""
        self.book_started()
        self._tell()

    def book_started(self) -> None:
        """Input is charged when a step begins, and is recorded when it ends; this one does not end."""
        for live in self._started:
            live.record.num_input = live.request.num_input
        self._started.clear()

    @property
    def kv_capacity_tokens(self) -> int:
        return self._kv.capacity_tokens

    @property
    def is_empty(self) -> bool:
        return not self._here

    def totals(self) -> dict[str, list[int]]:
        """Tokens by client of everything that started here: input, cached, output."""
        totals = {client: list(row) for client, row in self.delivered.items()}
        for here in self._here.values():
            record = here.live.record
            row = totals.setdefault(here.live.request.client, [0, 0, 0])
            for i, num in enumerate((record.num_input, record.num_cached, record.num_output)):
                row[i] += num
        return totals

    def check(self) -> None:
        self.batcher.check()
        self.book.check()
        assert len(self.book) == len(self._here) - len(self.batcher.running), "a request neither waits nor runs"
        assert self._reserved_blocks == sum(here.reserved_blocks for here in self._here.values())
