"""The engine of one replica: batcher, runner and text, as one plain object that one thread drives.

    engine.add(request)         checks it and lets it wait
    events = engine.step()      plan, run, commit: one token for each running request
    engine.abort(request_id)    at any moment

``Usage`` in an output is what was charged through :class:`~fairserve.engine.hooks.Account`, token for token.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from fairserve.clock import Clock
from fairserve.config import EngineConfig
from fairserve.engine import shards
from fairserve.engine.attention import Attachment, attach
from fairserve.engine.batching import Batcher, Chunk, Sequence, StepPlan
from fairserve.engine.detokenize import TextOutput
from fairserve.engine.events import Limits, StepEvents
from fairserve.engine.faults import EngineBroken, StepResult, StepRunner, run_step
from fairserve.engine.grammar import Grammars
from fairserve.engine.hooks import Account, WaitingQueue
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.loading import LoadedModel, load_model
from fairserve.engine.prefix_cache import KeyMaker
from fairserve.engine.prompt_rows import PromptReading
from fairserve.engine.request import (
    ErrorCode,
    FinishReason,
    GenerateRequest,
    RequestOutput,
    TokenLogprob,
    Usage,
)
from fairserve.engine.runner import Runner
from fairserve.engine.sampling import Sampled, Sampler
from fairserve.engine.sizing import choose_attention, kv_tokens
from fairserve.errors import ConfigError, InvalidRequest, PromptTooLong, ReplicaFailed

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """What the engine keeps for each request, running or waiting."""

    request: GenerateRequest
    text: TextOutput
    reserved_blocks: int
    prompt: PromptReading = field(default_factory=PromptReading)


@dataclass(slots=True)
class _Made:
    """What one step made for one request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: bytes = b""


class Engine:
    """Continuous batching over one model. Not thread-safe: see :class:`~fairserve.engine.loop.EngineLoop`."""

    def __init__(
        self,
        batcher: Batcher,
        runner: StepRunner,
        kv: KVBlocks,
        queue: WaitingQueue,
        account: Account,
        limits: Limits,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_token_ids: frozenset[int],
        reserve_output_tokens: int | None,
        seed: int,
        clock: Clock,
        adapters: Collection[str] = (),
    ) -> None:
        """``adapters``: names of the LoRA adapters that requests may ask for."""
        self.limits = limits
        self._adapters = adapters
        self._batcher = batcher
        self._runner = runner
        self._kv = kv
        self._queue = queue
        self._account = account
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._reserve = reserve_output_tokens
        self._next_seed = seed
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._reserved_blocks = 0
        self._num_failed = 0
        self.broken: str | None = None
        """Why this engine will never compute anything again; its requests have failed, and so does every new one."""
        self._outputs: list[RequestOutput] = []
        """Made since the last events: aborts and refusals come out with the next ones."""

    def add(self, request: GenerateRequest) -> None:
        """Let a request wait for its turn. A refused one is received and finished in the account, charged nothing.

        Raises:
            PromptTooLong: the prompt leaves no room for a single output token.
            InvalidRequest: no prompt, an unknown token id or adapter, output together with an embedding, a grammar that
                cannot be used, or an id that is in use.
            ReplicaFailed: the engine is broken.
        """
        request_id = request.request_id
        if self.broken is not None:
            raise ReplicaFailed(self.broken)
        if request_id in self._live:
            raise InvalidRequest(f"request {request_id!r} is already here")
        self._account.received(request)
        try:
            self._check_request(request)
            text = TextOutput(self._tokenizer, request.prompt_token_ids[: request.num_prompt], request.sampling)
            for token_id in request.prompt_token_ids[request.num_prompt :]:  # its text is out; the last may be held
                text.push(token_id)
            seed = request.sampling.seed
            if seed is None:
                seed, self._next_seed = self._next_seed, self._next_seed + 1
            self._runner.sampler.add(request, seed)
        except Exception:
            self._account.finished(request_id)
            raise
        live = _Live(request, text, self._kv.blocks_for(self._reservation(request)))
        self._live[request_id] = live
        self._reserved_blocks += live.reserved_blocks
        self._queue.push(request)

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it is; its last output comes with the next events. A stranger is ignored."""
        if request_id in self._live:
            self._finish(request_id, "abort")

    def refuse(self, request_id: str, message: str, code: ErrorCode) -> None:
        """Say with the next events that a request was not taken: for callers that cannot catch what ``add`` raises."""
        self._emit(request_id, Usage(0, 0, 0), _Made(), "error", error=message, code=code)

    @property
    def grammars(self) -> Grammars:
        """Compiled for this model; any thread may ask."""
        return self._runner.sampler.grammars

    def has_work(self) -> bool:
        """Is there anything to compute, or an output not yet given out?"""
        return bool(self._live or self._outputs)

    def step(self) -> StepEvents:
        """Compute one step. What the model fails on fails alone, see :mod:`fairserve.engine.faults`; when that is
        everything, or the bookkeeping itself fails, the engine is ``broken``."""
        began_s = self._clock.now_s()
        plan = planned = StepPlan()
        result = StepResult()
        try:
            plan = planned = self._batcher.plan()
            if plan.copies:
                self._runner.copy(plan.copies)
            if plan:
                result = run_step(self._runner, plan)
            if result.out_of_memory is None:
                self._commit(plan, result)
            else:
                plan = self._plan_less(plan, result.out_of_memory)
        except Exception as error:
            logger.exception("the engine is broken")
            self.break_off(str(error) or type(error).__name__)
        step_s = self._clock.now_s() - began_s
        num_prefill_tokens = sum(len(chunk.token_ids) for chunk in plan.prefills)
        if plan:
            self._batcher.budget.took(num_prefill_tokens, step_s)
        return self._events(
            num_prefill_tokens=num_prefill_tokens,
            num_decode_tokens=len(plan.decodes),
            num_preempted=plan.num_preempted,
            num_out_of_memory=int(result.out_of_memory is not None),
            num_started_tokens=planned.num_started_tokens,
            num_cached_tokens=planned.num_cached_tokens,
            step_s=step_s,
        )

    def idle_events(self) -> StepEvents:
        """Outputs since the last events (aborts) and the state now, without a step."""
        return self._events()

    def fail_all(self, message: str) -> None:
        """Finish every request with an error: the last resort of whoever drives the engine."""
        for request_id in list(self._live):
            try:
                self._fail(request_id, message)
            except Exception:  # the bookkeeping may be what broke
                logger.exception("request %s could not be closed", request_id)
                self._live.pop(request_id, None)
                self.refuse(request_id, message, "replica_failed")

    def break_off(self, why: str) -> None:
        """Compute nothing any more: fail every request, and from now on every new one."""
        self.broken = f"its engine broke: {why}"
        self.fail_all(self.broken)

    def stop(self) -> None:
        """Compute nothing any more; the other ranks of a tensor parallel replica end."""
        self._runner.stop()

    def check(self) -> None:
        """Assert what must be true between two steps."""
        self._batcher.check()
        started = self._batcher.running.keys() | self._batcher.preempted.keys()
        assert self._live.keys() >= started, "unknown requests run"
        assert len(self._queue) == len(self._live) - len(self._batcher.running), "a request neither waits nor runs"
        assert self._reserved_blocks == sum(live.reserved_blocks for live in self._live.values()), "reservations drift"
        assert len(self._runner.sampler) == len(self._live), "sampling state of a request that left"

    def _check_request(self, request: GenerateRequest) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if request.sampling.max_tokens < 0 or (request.pooling and request.sampling.max_tokens):
            raise InvalidRequest("max_tokens must be 0 for an embedding, and never less", param="max_tokens")
        if request.num_input + min(1, request.sampling.max_tokens) > self.limits.max_model_len:
            raise PromptTooLong(request.num_input, request.sampling.max_tokens, self.limits.max_model_len)
        if not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < self.limits.vocab_size:
            raise InvalidRequest(f"token ids must lie in [0, {self.limits.vocab_size})", param="prompt")
        if request.adapter and request.adapter not in self._adapters:
            known = ", ".join(sorted(self._adapters)) or "none"
            raise InvalidRequest(f"there is no adapter {request.adapter!r} here; known: {known}", param="model")
        p = request.sampling
        named = [
            *(p.allowed_token_ids or ()),
            *(token for token, _ in p.logit_bias),
            *(t for w in p.bad_words for t in w),
        ]
        if named and not 0 <= min(named) <= max(named) < self.limits.vocab_size:
            raise InvalidRequest(f"token ids must lie in [0, {self.limits.vocab_size})", param="logit_bias")

    def _reservation(self, request: GenerateRequest) -> int:
        """Tokens the cluster reserved for this request when it granted it."""
        output = request.sampling.max_tokens
        if self._reserve is not None:
            output = min(output, self._reserve)
        return min(request.num_input + output, self.limits.max_model_len)

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        """Book a step that was run. A request that it failed on is charged for its part of it: it was computed."""
        sampled = {request_id: row for request_id, row in result.rows.items() if row is not None and not row.error}
        tokens = {request_id: s.token_id for request_id, s in sampled.items()}
        for request_id, row in sampled.items():
            if row.prompt is not None:
                self._live[request_id].prompt.add(row.prompt)
        grown = self._batcher.commit(plan, tokens)
        for sequence in grown:
            request_id = sequence.request.request_id
            if request_id in result.failed:
                continue
            try:
                if sequence.output:
                    self._advance(sequence, sampled[request_id])
                else:
                    prompt = self._live[request_id].prompt
                    made = _Made(logprobs=prompt.take(), embedding=prompt.embedding())
                    self._finish(request_id, "length", made)
            except Exception as error:
                logger.exception("making the text of request %s failed", request_id)
                self._fail(request_id, f"the output could not be decoded: {error}", "model_error")
        for request_id, ruled_out in result.rows.items():
            if ruled_out is not None and ruled_out.error:
                self._fail(request_id, ruled_out.error, "invalid_request")
        for chunk in plan:
            if chunk.request_id in result.failed:
                self._fail_computed(chunk, result.failed[chunk.request_id])

    def _fail_computed(self, chunk: Chunk, why: str) -> None:
        logger.warning("the model failed on request %s: %s", chunk.request_id, why)
        self._runner.scrub(self._kv.forget(chunk.request_id))
        self._num_failed += 1
        self._fail(chunk.request_id, why, "model_error")

    def _plan_less(self, plan: StepPlan, why: str) -> StepPlan:
        """After a step that ran out of memory. Returns what was computed: nothing, or all of a step that cannot be made
        smaller and found memory at the second try.

        Raises:
            EngineBroken: there is no memory for a prompt of a few tokens either.
        """
        self._runner.release_memory()
        num_preempted = self._batcher.shrink(plan)
        budget = self._batcher.budget
        if num_preempted is None:
            if not self._runner.is_sound():
                raise EngineBroken(f"there is no memory left to compute anything: {why}")
            again = run_step(self._runner, plan)  # another process's shortage may be over
            if again.out_of_memory is None:
                self._commit(plan, again)
                return plan
            for chunk in plan:
                self._fail_computed(chunk, f"there is no memory to compute it, even alone: {why}")
        logger.warning(
            "a step of %d requests ran out of memory: from now on at most %d of %d tokens and %d of %d requests (%s)",
            *(len(plan), budget.tokens, budget.max_tokens, budget.requests, budget.max_requests, why),
        )
        return StepPlan(num_preempted=plan.num_preempted + (num_preempted or 0))

    def _advance(self, sequence: Sequence, new: Sampled) -> None:
        """Give out one new token and end the request where it ends."""
        request, live = sequence.request, self._live[sequence.request.request_id]
        made = _Made(token_ids=[new.token_id], logprobs=live.prompt.take() + ([new.logprob] if new.logprob else []))
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if new.token_id in request.sampling.stop_token_ids:
            reason, stop_reason = "stop", new.token_id
        elif new.token_id in self._eos and (new.ends or not request.sampling.ignore_eos):
            reason = "stop"
        else:
            made.text, stop_reason = live.text.push(new.token_id)
            if stop_reason is not None or new.ends:
                reason = "stop"
            elif sequence.num_tokens >= self._batcher.max_tokens(request):
                reason = "length"
        if reason is None:
            self._emit(request.request_id, sequence.usage, made)
        else:
            self._finish(request.request_id, reason, made, stop_reason)

    def _finish(
        self,
        request_id: str,
        reason: FinishReason,
        made: _Made | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
        code: ErrorCode = "replica_failed",
    ) -> None:
        made = made or _Made()
        if reason != "error":  # it may be the text that failed
            made.text += self._live[request_id].text.flush()
        live = self._live.pop(request_id)
        self._reserved_blocks -= live.reserved_blocks
        self._runner.sampler.drop(request_id)
        sequence = self._batcher.finish(request_id)
        usage = sequence.usage if sequence is not None else Usage(0, 0, 0)
        self._emit(request_id, usage, made, reason, stop_reason, error, code)

    def _fail(self, request_id: str, message: str, code: ErrorCode = "replica_failed") -> None:
        if request_id in self._live:
            self._finish(request_id, "error", error=message, code=code)

    def _emit(
        self,
        request_id: str,
        usage: Usage,
        made: _Made,
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
        code: ErrorCode = "replica_failed",
    ) -> None:
        token_ids, logprobs = tuple(made.token_ids), tuple(made.logprobs)
        self._outputs.append(
            RequestOutput(
                request_id,
                made.text,
                token_ids,
                usage,
                logprobs,
                reason,
                stop_reason,
                error,
                error_code=code,
                embedding=made.embedding,
            )
        )

    def _events(
        self,
        num_prefill_tokens: int = 0,
        num_decode_tokens: int = 0,
        num_preempted: int = 0,
        num_out_of_memory: int = 0,
        num_started_tokens: int = 0,
        num_cached_tokens: int = 0,
        step_s: float = 0.0,
    ) -> StepEvents:
        outputs, self._outputs = tuple(self._outputs), []
        num_failed, self._num_failed = self._num_failed, 0
        return StepEvents(
            outputs=outputs,
            num_running=len(self._batcher.running),
            num_waiting=len(self._queue),
            free_kv_tokens=self._free_kv_tokens(),
            free_slots=self.limits.max_num_seqs - len(self._live),
            num_prefill_tokens=num_prefill_tokens,
            num_decode_tokens=num_decode_tokens,
            num_preempted=num_preempted,
            step_s=step_s,
            resident_tokens=self._batcher.resident_tokens,
            num_failed=num_failed,
            num_out_of_memory=num_out_of_memory,
            num_started_tokens=num_started_tokens,
            num_cached_tokens=num_cached_tokens,
            idle_cached_tokens=self._kv.num_cached * self._kv.block_size,
        )

    def _free_kv_tokens(self) -> int:
        """Counted in whole blocks, a shared one once: with everything reserved (``reserve_output_tokens`` None) no
        decode ever finds the cache full."""
        over = -self._kv.num_shared
        for sequences in (self._batcher.running, self._batcher.preempted):
            for request_id, sequence in sequences.items():
                needed = max(self._kv.num_held(request_id), self._kv.blocks_for(sequence.num_tokens))
                over += max(0, needed - self._live[request_id].reserved_blocks)
        return (self._kv.num_blocks - self._reserved_blocks - over) * self._kv.block_size


def build_engine(
    model: str,
    config: EngineConfig,
    *,
    reserve_output_tokens: int | None,
    preempt_gap: float | None = None,
    queue: WaitingQueue,
    account: Account,
    num_threads: int | None,
    clock: Clock,
) -> Engine:
    """Load a model by name (see :func:`~fairserve.engine.loading.load_model`) and build its engine.

    Raises:
        ModelError: the model cannot be found, loaded or served.
        ConfigError: the KV cache that was asked for cannot be made.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    loaded = load_model(model, config)
    engine = make_engine(
        loaded,
        config,
        reserve_output_tokens=reserve_output_tokens,
        preempt_gap=preempt_gap,
        queue=queue,
        account=account,
        clock=clock,
    )
    engine.grammars.warm()
    return engine


def make_engine(
    loaded: LoadedModel,
    config: EngineConfig,
    *,
    reserve_output_tokens: int | None,
    preempt_gap: float | None = None,
    queue: WaitingQueue,
    account: Account,
    clock: Clock,
) -> Engine:
    """An engine round a model that is loaded already. One engine per model object: it takes over its attention."""
    runner, kv, max_model_len = make_runner(loaded, config)
    batcher = Batcher(
        kv,
        queue,
        account,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        preempt_gap=preempt_gap,
        max_step_s=config.max_step_s,
        prefix_cache=_key_maker(config, kv.block_size),
    )
    return Engine(
        batcher,
        runner,
        kv,
        queue,
        account,
        Limits(max_model_len, kv.capacity_tokens, config.max_num_seqs, kv.block_size, loaded.vocab_size),
        tokenizer=loaded.tokenizer,
        eos_token_ids=loaded.eos_token_ids,
        reserve_output_tokens=reserve_output_tokens,
        seed=config.seed,
        clock=clock,
        adapters=loaded.adapters.names if loaded.adapters is not None else (),
    )


def make_runner(loaded: LoadedModel, config: EngineConfig) -> tuple[Runner, KVBlocks, int]:
    """The KV cache of a model, and what runs it; the same on every rank. The last is the most tokens of a request."""
    max_model_len = min(config.max_model_len or loaded.max_context, loaded.max_context)
    attention_class = choose_attention(loaded, config)
    multiple = attention_class.block_size_multiple
    block_size = -(-config.block_size // multiple) * multiple
    num_tokens = kv_tokens(loaded, config, max_model_len)
    if config.tensor_parallel_size > 1:
        num_tokens = shards.least(num_tokens)
    num_blocks = num_tokens // block_size
    if num_blocks < 1:
        raise ConfigError(f"the KV cache holds less than one block of {block_size} tokens: raise kv_cache_tokens")
    kv = KVBlocks(num_blocks, block_size, num_lanes=config.max_num_seqs, shares=attention_class.shares_blocks)
    try:
        # One block more than requests get: the runner's own, to see whether the model is sound.
        cache = attention_class(kv.capacity_tokens + block_size, block_size, loaded.dtype, loaded.device)
        for layer, shape in loaded.layers.items():
            cache.allocate(layer, shape.kv_heads, shape.key_dim, shape.value_dim)
    except (RuntimeError, OSError) as error:
        size = loaded.kv_bytes_per_token * kv.capacity_tokens / 1e9
        raise ConfigError(f"no memory for a KV cache of {kv.capacity_tokens} tokens ({size:.1f} GB)") from error
    attach(loaded.model, Attachment(cache))
    runner_class = shards.ShardedRunner if shards.is_lead() else Runner
    sampler = Sampler(Grammars(loaded.tokenizer, loaded.eos_token_ids, loaded.vocab_size), loaded.eos_token_ids)
    runner = runner_class(
        loaded.model, cache, block_size, loaded.device, sampler, spare_block=num_blocks, adapters=loaded.adapters
    )
    return runner, kv, min(max_model_len, kv.capacity_tokens)


def follow(model: str, config: EngineConfig, rank: shards.Rank, num_threads: int | None) -> None:
    """One of the other ranks of a replica (``shards.py``), until rank 0 stops it.

    Raises:
        ModelError, ConfigError: as :func:`build_engine`.
        RuntimeError: rank 0 is gone, or this rank failed.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    shards.join(rank)
    runner, _, _ = make_runner(load_model(model, config), config)
    shards.follow(runner)


def _key_maker(config: EngineConfig, block_size: int) -> KeyMaker | None:
    """With a secret of this engine: what it holds in its cache cannot be guessed from outside."""
    if not config.prefix_cache:
        return None
    return KeyMaker(secrets.token_bytes(32), config.prefix_cache_scope, block_size)
