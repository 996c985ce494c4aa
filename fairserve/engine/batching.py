"""Continuous batching as plain code: ``plan()`` a step, run it elsewhere, ``commit()`` what was sampled.

A step computes every running request's next token first, then chunks of prompts, within a budget of tokens (Orca's
iteration-level scheduling, OSDI 2022; Sarathi-Serve's chunked prefill, OSDI 2024). A request is admitted while a slot
and KV room for its whole prompt exist; the first that does not fit ends admission, because passing over it would let
others overtake the least served client for as long as they are small (VTC, OSDI 2024, needs work conservation in
the order of the counters). When a decode finds no block, the youngest request of the most served client is preempted:
its blocks are freed and its tokens recomputed later, without a second charge. With ``preempt_gap`` the same happens
when the request that goes next finds no room, and the most served running client is ahead of its client by more than
that.

With a prefix cache a request starts after the leading blocks whose content is there already; at least its last token is
computed, because its row is sampled. Blocks are stored when a step has filled them, prompt and output alike, so that a
chat's next turn and a preempted request find them. A request whose prompt is to be scored, or pooled whole, finds only
what it has read already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from fairserve.engine.budget import StepBudget
from fairserve.engine.hooks import Account, WaitingQueue
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.prefix_cache import BlockKeys, KeyMaker
from fairserve.engine.request import GenerateRequest, Usage

MAX_SCORED = 256
"""Prompt tokens whose log probabilities one step gives: each takes a row of the whole vocabulary."""


@dataclass(slots=True)
class Sequence:
    """A request that has started: what was generated and how much of it is in the KV cache."""

    request: GenerateRequest
    age: int
    """Order of the first start; preemption does not change it."""
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens of prompt and output whose keys and values are in the cache."""
    num_input_computed: int = 0
    """Prompt tokens ever computed; what an abort cannot refund."""
    num_stored: int = 0
    """Leading blocks that were found in the prefix cache, or stored there."""
    num_refunded: int = 0
    num_cached: int = 0
    """Prompt tokens that came from the prefix cache."""
    num_paid: int = 0
    """Input tokens that another replica charged: charged like cached ones here, although they are computed."""
    num_input: int = field(init=False)
    is_read: bool = field(init=False)
    """More is asked of its prompt than the next token."""

    def __post_init__(self) -> None:
        self.num_input = self.request.num_input
        self.is_read = self.request.scores_prompt or self.request.pooling is not None

    @property
    def num_tokens(self) -> int:
        return self.num_input + len(self.output)

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next can be sampled: 1 for a decode."""
        return self.num_input + len(self.output) - self.num_computed

    @property
    def usage(self) -> Usage:
        num_cached = max(self.num_cached, self.num_paid)
        return Usage(self.request.num_input - self.num_refunded, num_cached, len(self.output))

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Prompt and output tokens at positions [start, end)."""
        num_input = self.num_input
        if start >= num_input:
            return tuple(self.output[start - num_input : end - num_input])
        head = self.request.prompt_token_ids[start:end]
        return (*head, *self.output[max(0, start - num_input) : max(0, end - num_input)])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request to compute in this step; a decode is a chunk of one."""

    request_id: str
    position: int
    """Position of the first token in its sequence."""
    token_ids: tuple[int, ...]
    samples: bool
    """The chunk reaches the end of what is known: its last row is sampled."""
    block_table: tuple[int, ...]
    start: int | None
    """First KV slot when the sequence's slots follow each other, else None."""
    adapter: str = ""
    """The LoRA adapter of the request; "" for the bare model."""
    read_from: int = 0
    """What the next two ask for, they ask of the rows from this one on: the rows before were read already."""
    targets: tuple[int, ...] = ()
    """Tokens of the prompt, one after each of these rows, whose log probabilities are asked for."""
    pools: bool = False
    """The sum of the hidden states of these rows is asked for."""

    @property
    def end(self) -> int:
        """Tokens of this sequence in the cache after the step."""
        return self.position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    decodes: tuple[Chunk, ...] = ()
    prefills: tuple[Chunk, ...] = ()
    num_preempted: int = 0
    copies: tuple[tuple[int, int], ...] = ()
    """KV blocks (source, destination) to copy first, once, and as if all were read before any is written."""
    num_started_tokens: int = 0
    """Prompt tokens of the requests that start with this step."""
    num_cached_tokens: int = 0
    """Those of them that the prefix cache held."""

    def __iter__(self) -> Iterator[Chunk]:
        yield from self.decodes
        yield from self.prefills

    def __len__(self) -> int:
        return len(self.decodes) + len(self.prefills)

    def part(self, begin: int, end: int) -> StepPlan:
        """The chunks [begin, end) in the order of iteration."""
        num = len(self.decodes)
        return StepPlan(self.decodes[begin:end], self.prefills[max(0, begin - num) : max(0, end - num)])


@dataclass(slots=True)
class _Room:
    """Prompt tokens that a step may still compute, and score."""

    tokens: int
    scored: int

    def take(self, sequence: Sequence) -> int:
        """Tokens for the next chunk of this one, 0 for none now."""
        num = max(0, min(self.tokens, sequence.num_pending))
        if sequence.is_read and sequence.request.pooling is None:
            num = min(num, self.scored)
            self.scored -= num
        self.tokens -= num
        return num


class Batcher:
    """Which requests run, and what the next step computes. The only writer of sequences and KV blocks."""

    def __init__(
        self,
        kv: KVBlocks,
        queue: WaitingQueue,
        account: Account,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        preempt_gap: float | None = None,
        max_step_s: float | None = None,
        cached_tokens: Callable[[GenerateRequest], int] | None = None,
        prefix_cache: KeyMaker | None = None,
    ) -> None:
        """``preempt_gap``: service / weight; None: never preempt for fairness. ``cached_tokens``: leading prompt tokens
        that need not be computed, asked when a request starts (a model of a cache). ``prefix_cache``: names what blocks
        hold; None: nothing is found again."""
        assert max_model_len <= kv.capacity_tokens, "a lone request must always fit: else it could wait for ever"
        self._kv = kv
        self._queue = queue
        self._account = account
        self._max_num_seqs = max_num_seqs
        self._budget = StepBudget(max_num_batched_tokens, max_num_seqs, max_step_s)
        self._max_model_len = max_model_len
        self._preempt_gap = preempt_gap
        self._cached_tokens = cached_tokens
        self._running: dict[str, Sequence] = {}
        self._preempted: dict[str, Sequence] = {}
        self._num_started = 0
        self._prefix_cache = prefix_cache
        self._keys: dict[str, BlockKeys] = {}
        """Of requests that were looked at, until they leave."""
        self._num_started_tokens = self._num_cached_tokens = 0

    @property
    def running(self) -> Mapping[str, Sequence]:
        return self._running

    @property
    def preempted(self) -> Mapping[str, Sequence]:
        """Started, out of the batch again, and waiting in the queue."""
        return self._preempted

    @property
    def resident_tokens(self) -> int:
        num_twice = self._kv.num_shared * self._kv.block_size
        return sum(sequence.num_computed for sequence in self._running.values()) - num_twice

    def max_tokens(self, request: GenerateRequest) -> int:
        """Tokens of prompt and output that the request can grow to."""
        return min(request.num_input + request.sampling.max_tokens, self._max_model_len)

    def plan(self) -> StepPlan:
        """What to compute next; takes the blocks for it, admits, and preempts where it must."""
        self._num_started_tokens = self._num_cached_tokens = 0
        num_preempted = self._make_room_for_decodes()
        # Blocks just taken from a victim are not for newcomers: the next decode would take them back.
        admits = not num_preempted
        if admits:
            num_preempted = self._give_way()
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._running.values():
            is_decode = sequence.num_computed > 0 and sequence.num_pending == 1
            (decodes if is_decode else prefills).append(sequence)
        room = _Room(self._budget.prompt_tokens(len(decodes)), MAX_SCORED)
        chunks = [self._chunk(sequence, num) for sequence in prefills if (num := room.take(sequence))]
        while admits and room.tokens > 0 and (admitted := self._admit()) is not None:
            if num := room.take(admitted):
                chunks.append(self._chunk(admitted, num))
        return StepPlan(
            tuple(self._chunk(s, 1) for s in decodes),
            tuple(chunks),
            num_preempted,
            self._kv.take_copies(),
            self._num_started_tokens,
            self._num_cached_tokens,
        )

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[Sequence]:
        """Book a step that was run. ``sampled``: the new token of each request whose chunk samples.

        Returns the sequences that got a token, and those that ask for none and are computed. A request that samples and
        is not in ``sampled`` has failed: the caller finishes it, and lets ``KVBlocks`` forget what it holds. Requests
        that left since the plan are passed over.
        """
        self._budget.went_well()
        grown = []
        never = self._max_model_len + 1
        block_size = never if self._prefix_cache is None else self._kv.block_size
        for chunk in plan:
            sequence = self._running.get(chunk.request_id)
            if sequence is None:
                continue
            end = sequence.num_computed = chunk.end
            if end // block_size > sequence.num_stored:
                self._store(sequence)
            if sequence.num_input_computed < sequence.num_input:
                sequence.num_input_computed = max(sequence.num_input_computed, min(end, sequence.num_input))
            if chunk.samples and chunk.request_id in sampled:
                sequence.output.append(sampled[chunk.request_id])
                self._account.output(chunk.request_id, 1)
                grown.append(sequence)
            elif not (chunk.samples or sequence.num_pending):
                grown.append(sequence)
        return grown

    def shrink(self, plan: StepPlan) -> int | None:
        """Plan less from now on, because this step ran out of memory; nothing of it was computed.

        With prompts in it, the budget of tokens is halved and what the step had started goes back to the queue, its
        blocks free. Else, or when the budget is at its least, the most served client's youngest request does, and for
        a while no more run than are left. Returns how many went back, None when a single request is too large alone.
        """
        if plan.prefills and self._budget.halve_tokens(sum(len(chunk.token_ids) for chunk in plan)):
            started = [self._running[chunk.request_id] for chunk in plan.prefills if chunk.position == 0]
        elif len(self._running) > 1:
            started = [self._victim()]
            self._budget.limit_requests(len(self._running) - 1)
        else:
            return None
        for sequence in reversed(started):
            self._preempt(sequence)
        return len(started)

    @property
    def budget(self) -> StepBudget:
        return self._budget

    def finish(self, request_id: str) -> Sequence | None:
        """Let a request go, wherever it is: blocks free, uncomputed prompt refunded, account closed.

        Returns its sequence, None when it never started.
        """
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            sequence = self._preempted.pop(request_id, None)
            self._queue.remove(request_id)
        self._kv.free(request_id)
        self._keys.pop(request_id, None)
        if sequence is not None:
            num_due = max(sequence.num_input_computed, sequence.num_paid)
            refund = sequence.request.num_input - num_due - sequence.num_refunded
            if refund:
                sequence.num_refunded += refund
                self._account.refund_input(request_id, refund)
        self._account.finished(request_id)
        return sequence

    def check(self) -> None:
        self._kv.check()
        assert len(self._running) <= self._max_num_seqs, "more running requests than slots"
        assert not self._running.keys() & self._preempted.keys(), "a request both runs and waits"
        for request_id, sequence in self._running.items():
            assert request_id == sequence.request.request_id
            assert sequence.num_pending >= 1, f"{request_id}: nothing left to compute, yet it runs"
            held = self._kv.num_held(request_id) * self._kv.block_size
            assert sequence.num_computed <= held, f"{request_id}: tokens without a block"
            assert sequence.num_tokens <= self.max_tokens(sequence.request), f"{request_id}: grew too long"
            if self._prefix_cache is not None:
                assert sequence.num_stored == sequence.num_computed // self._kv.block_size, f"{request_id}: not stored"
        for request_id, sequence in self._preempted.items():
            assert sequence.num_computed == 0, f"{request_id}: preempted, yet computed"
            assert self._kv.num_held(request_id) == 0, f"{request_id}: preempted, yet holds blocks"
        assert self._prefix_cache is None or self._keys.keys() >= self._running.keys(), "a sequence without its keys"
        held = sum(self._kv.num_held(request_id) for request_id in self._running) - self._kv.num_shared
        assert held + self._kv.num_free == self._kv.num_blocks, "blocks held by a request that does not run"

    def _make_room_for_decodes(self) -> int:
        num_preempted = 0
        kv = self._kv
        growing = [s for s in self._running.values() if kv.num_missing(s.request.request_id, s.num_tokens) > 0]
        growing.sort(key=lambda s: s.age)
        for sequence in growing:
            request_id = sequence.request.request_id
            if request_id not in self._running:
                continue  # preempted for an older one
            while not self._kv.can_hold(request_id, sequence.num_tokens):
                victim = self._victim()
                self._preempt(victim)
                num_preempted += 1
                if victim is sequence:
                    break
            else:
                self._kv.take(request_id, sequence.num_tokens)
        return num_preempted

    def _victim(self) -> Sequence:
        """The youngest running request of the most served client among those running."""
        return max(self._running.values(), key=self._claim)

    def _claim(self, sequence: Sequence) -> tuple[tuple[float, ...], int]:
        """The greatest gives way first."""
        return self._queue.standing(sequence.request.client), sequence.age

    def _give_way(self) -> int:
        """Where the request that goes next finds no room, and would find it without requests of clients more than
        ``preempt_gap`` ahead of its own: preempt those, the most served client's youngest first, and start it."""
        head = self._queue.peek()
        if self._preempt_gap is None or head is None or self._fits(head):
            return 0
        gap, lead = self._preempt_gap, self._queue.lead
        ahead = (s for s in self._running.values() if lead(s.request.client, head.client) > gap)
        victims: list[Sequence] = []
        for sequence in sorted(ahead, key=self._claim, reverse=True):
            victims.append(sequence)
            if self._fits(head, victims):
                break
        else:
            return 0  # nobody gives way for nothing
        for victim in victims:
            self._stop(victim)
        self._admit()  # before they come back: where the policy does not go by counters, they might stand first
        for victim in victims:
            self._queue.push_front(victim.request)
        return len(victims)

    def _fits(self, request: GenerateRequest, without: Collection[Sequence] = ()) -> bool:
        """There is a slot, and room for all that is known of it, once ``without`` are gone."""
        back = self._preempted.get(request.request_id)
        num_tokens = request.num_input if back is None else back.num_tokens
        num_slots = self._budget.requests - len(self._running) + len(without)
        if num_slots <= 0:
            return False
        # Whoever gets a copy of what is cached needs as much room as who computes it.
        keys = self._known(request, back) if self._kv.shares else ()
        return self._kv.can_start(num_tokens, keys, [s.request.request_id for s in without])

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._queue.push_front(sequence.request)

    def _stop(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        del self._running[request_id]
        self._kv.free(request_id)
        sequence.num_computed = 0
        self._preempted[request_id] = sequence

    def _admit(self) -> Sequence | None:
        """Start the request that goes next, or None: no request, no slot, or no room for it."""
        request = self._queue.peek()
        if request is None or not self._fits(request):
            return None
        popped = self._queue.pop()
        assert popped.request_id == request.request_id, "the queue popped another request than it named"
        back = self._preempted.pop(request.request_id, None)
        keys = self._known(request, back)
        num_tokens = request.num_input if back is None else back.num_tokens
        num_stored = self._kv.take(request.request_id, num_tokens, self.max_tokens(request), keys)
        num_found = num_stored * self._kv.block_size
        if back is None and self._cached_tokens is not None:
            num_found = min(self._cached_tokens(request), request.num_input - 1)
        sequence = back or self._start(request, num_found)
        sequence.num_stored, sequence.num_computed = num_stored, num_found
        # What a preempted request finds is not computed again, and its input was charged: nothing of it is refunded.
        sequence.num_input_computed = max(sequence.num_input_computed, min(num_found, request.num_input))
        self._running[request.request_id] = sequence
        return sequence

    def _start(self, request: GenerateRequest, num_cached: int) -> Sequence:
        self._num_started += 1
        self._num_started_tokens += request.num_input
        self._num_cached_tokens += num_cached
        num_paid = 0 if request.num_generated is None else request.num_input
        sequence = Sequence(request, age=self._num_started, num_cached=num_cached, num_paid=num_paid)
        self._account.started(request.request_id, request.num_input, max(num_cached, num_paid))
        return sequence

    def _known(self, request: GenerateRequest, back: Sequence | None) -> list[bytes]:
        """Keys of what a request is about to compute; not of its last token, whose row is sampled."""
        if self._prefix_cache is None:
            return []
        block_size = self._kv.block_size
        keys = self._keys.get(request.request_id)
        if keys is None:
            keys = self._keys[request.request_id] = self._prefix_cache.keys_for(request.client, request.adapter)
            keys.add(request.prompt_token_ids)
        num_tokens = request.num_input if back is None else back.num_tokens
        if back is not None and num_tokens // block_size > len(keys):
            keys.add(back.tokens(len(keys) * block_size, num_tokens))
        num_known = num_tokens - 1
        if request.reads_all:
            num_read = 0 if back is None else back.num_input_computed
            num_known = num_known if num_read == request.num_input else num_read
        return keys[: num_known // block_size]

    def _store(self, sequence: Sequence) -> None:
        """Blocks that the last step filled can be found from now on."""
        request_id, block_size = sequence.request.request_id, self._kv.block_size
        keys, num_full = self._keys[request_id], sequence.num_computed // block_size
        if num_full > len(keys):
            keys.add(sequence.tokens(len(keys) * block_size, num_full * block_size))
        self._kv.store(request_id, sequence.num_stored, keys[sequence.num_stored : num_full])
        sequence.num_stored = num_full

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        request_id = sequence.request.request_id
        position = sequence.num_computed
        end = position + num_tokens
        return Chunk(
            request_id,
            position,
            sequence.tokens(position, end),
            end == sequence.num_tokens and sequence.request.sampling.max_tokens > 0,
            self._kv.table(request_id),
            self._kv.start(request_id),
            sequence.request.adapter,
            *(_asked(sequence, position, end) if sequence.is_read else ()),
        )


def _asked(sequence: Sequence, position: int, end: int) -> tuple[int, tuple[int, ...], bool]:
    """``read_from``, ``targets`` and ``pools`` of a chunk [position, end)."""
    request = sequence.request
    begin = max(position, sequence.num_input_computed)
    if request.pooling is None:
        return begin - position, request.prompt_token_ids[begin + 1 : end + 1], False
    if request.pooling == "last":
        begin = sequence.num_input - 1
    return begin - position, (), begin < end
