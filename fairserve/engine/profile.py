"""Measure how long an engine's steps take: a designed grid of batches, contexts and prompts, each step written down.

What is fitted to the samples is ``simulate/step_time.py``'s affair. Requests sample at temperature 1, as most do; the
time is :meth:`Engine.step`'s own, so it holds planning, sampling and the making of text, and nothing of a replica.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fairserve import __version__
from fairserve.clock import Clock
from fairserve.config import EngineConfig, FairServeArgs
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.engine import Engine, build_engine
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.engine.sizing import num_threads, uses_gpu
from fairserve.errors import ConfigError, ReplicaFailed
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

MAX_S = 75.0
"""Seconds of measuring, loading apart; on a slow machine the longest contexts are left out."""
STEPS_PER_CELL = 6
SHORTEST = 16
GROWTH = 4
"""Contexts measured: 16, 64, 256, ... tokens and the longest that fits."""
CHUNK_REPEATS = 3
RECORDED = ("device", "dtype", "attention", "cpu_linear", "max_num_batched_tokens")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured step; see ``StepTime.seconds`` for what is counted."""

    group: int
    """Steps of one group are alike."""
    num_decodes: int
    decode_context_tokens: int
    num_prefill_tokens: int
    prefill_context_tokens: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """The samples, and what they were measured on; nothing that names the machine or its owner."""

    samples: tuple[Sample, ...]
    model: str
    engine: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]


def profile_engine(args: FairServeArgs, clock: Clock, max_s: float = MAX_S) -> Measurement:
    """Build the engine that one replica would have, and measure it.

    Raises:
        ModelError, ConfigError: as :func:`~fairserve.engine.engine.build_engine`.
    """
    threads = num_threads(args)
    book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
    engine = build_engine(
        args.model,
        args.engine,
        reserve_output_tokens=None,
        queue=book,
        account=book,
        num_threads=threads,
        clock=clock,
    )
    load = os.getloadavg()[0]
    samples = measure(engine, args.engine.max_num_batched_tokens, clock, max_s)
    return Measurement(
        samples=tuple(samples),
        model=args.model_name,
        engine=_engine_facts(args.engine, engine.limits, threads),
        machine={
            "processor": _processor(),
            "accelerator": torch.cuda.get_device_name() if uses_gpu(args.engine) else None,
            "cores": len(os.sched_getaffinity(0)),
            "load_1_min_before": round(load, 2),
            "load_1_min_after": round(os.getloadavg()[0], 2),
        },
        versions={
            "python": platform.python_version(),
            "fairserve": __version__,
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
        },
    )


def measure(engine: Engine, max_chunk: int, clock: Clock, max_s: float = MAX_S) -> list[Sample]:
    """Run the grid on an idle engine whose steps compute at most ``max_chunk`` tokens, and leave it idle.

    First prompts alone, in chunks of several sizes; then for each context length a batch that grows from 1 request by
    doubling: the newcomers' prompts are computed beside the others' decodes, then some steps compute decodes only.

    Raises:
        ConfigError: the engine's context is too short to measure anything.
        ReplicaFailed: the engine could not compute a step.
    """
    limits = engine.limits
    room = min(limits.max_model_len // 4, 256)
    longest = limits.max_model_len - room
    if room < 2:
        raise ConfigError(f"max_model_len is {limits.max_model_len}: a profile needs at least 8 tokens")
    bench = _Bench(engine, room, clock)
    bench.warm_up(min(longest, 2 * max_chunk))
    began_s = clock.now_s()
    bench.deadline_s = began_s + max_s
    for size in (max_chunk // 8, max_chunk // 4, max_chunk // 2, max_chunk):
        for _ in range(CHUNK_REPEATS if 0 < size <= longest else 0):
            bench.grow_to(1, size)
            bench.clear()
        bench.next_group()
    num_computed = sum(sample.num_prefill_tokens for sample in bench.samples)
    tokens_per_s = num_computed / max(clock.now_s() - began_s, 1e-9)
    share = int(tokens_per_s * 0.6 * max_s / len(context_lengths(longest)))
    for length in context_lengths(min(longest, max(share, SHORTEST))):
        for batch in batch_sizes(limits, length + room, max(1, share // length)):
            bench.grow_to(batch, length)
            bench.next_group()
            for _ in range(STEPS_PER_CELL):
                bench.step()
            bench.next_group()
        bench.clear()
    return bench.samples


def context_lengths(longest: int) -> list[int]:
    """16, 64, 256, ... and the longest; only the longest where it is short."""
    lengths = []
    length = SHORTEST
    while 2 * length <= longest:
        lengths.append(length)
        length *= GROWTH
    return [*lengths, longest]


def batch_sizes(limits: Limits, num_tokens: int, most: int) -> list[int]:
    """1, 2, 4, ... and the most: what slots, ``most`` and a KV cache for so many tokens each leave room for."""
    blocks = -(-num_tokens // limits.block_size)
    most = max(1, min(most, limits.max_num_seqs, limits.kv_capacity_tokens // limits.block_size // blocks))
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


class _Bench:
    """Drives one engine and counts what each step computes."""

    def __init__(self, engine: Engine, max_tokens: int, clock: Clock) -> None:
        self.samples: list[Sample] = []
        self.deadline_s = float("inf")
        """From then on nothing more is done, whatever is asked for."""
        self._engine = engine
        self._clock = clock
        self._sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._rng = random.Random(0)
        self._group = 0
        self._num_added = 0
        self._live: dict[str, None] = {}
        self._prompts: list[list[int]] = []
        """[tokens, tokens computed] of each prompt that is not finished, in order of arrival, as the engine goes."""

    def warm_up(self, num_input: int) -> None:
        """The first steps allocate, and choose kernels: they are not written down."""
        for _ in range(2):
            self.grow_to(2, max(1, num_input // 2))
            self.step()
            self.clear()
        self.samples.clear()

    @property
    def _is_late(self) -> bool:
        return self._clock.now_s() >= self.deadline_s

    def next_group(self) -> None:
        self._group += 1

    def grow_to(self, num_requests: int, num_input: int) -> None:
        """Add requests until so many run, and step until their prompts are computed."""
        while len(self._live) < num_requests and not self._is_late:
            self._num_added += 1
            request_id = f"profile-{self._num_added}"
            prompt = tuple(self._rng.choices(range(self._engine.limits.vocab_size), k=num_input))
            self._engine.add(GenerateRequest(request_id, "profile", prompt, self._sampling))
            self._live[request_id] = None
            self._prompts.append([num_input, 0])
        while self._prompts and not self._is_late:
            self.step()

    def clear(self) -> None:
        """Abort everything."""
        for request_id in self._live:
            self._engine.abort(request_id)
        self._live.clear()
        self._prompts.clear()
        self._engine.idle_events()

    def step(self) -> None:
        """One step, written down unless something ended in it: then its counts are not all known."""
        if self._is_late:
            return
        events = self._engine.step()
        if events.num_out_of_memory:
            raise ReplicaFailed("it ran out of memory while it was profiled: lower max_num_batched_tokens")
        if not events.num_decode_tokens and not events.num_prefill_tokens:
            raise ReplicaFailed("the engine computed nothing while it was profiled")
        # A prompt with one token left is a decode to the engine.
        self._prompts = [prompt for prompt in self._prompts if prompt[1] == 0 or prompt[0] - prompt[1] != 1]
        left, pairs = events.num_prefill_tokens, 0
        for prompt in self._prompts:
            taken = min(left, prompt[0] - prompt[1])
            left -= taken
            prompt[1] += taken
            pairs += taken * prompt[1]
        of_prompts = sum(prompt[1] for prompt in self._prompts)
        self._prompts = [prompt for prompt in self._prompts if prompt[1] < prompt[0]]
        ended = [output for output in events.outputs if output.finish_reason is not None]
        for output in ended:
            if output.finish_reason == "error":
                raise ReplicaFailed(output.error or "the engine failed")
            self._live.pop(output.request_id, None)
        if not ended and not events.num_preempted:
            context = events.resident_tokens - of_prompts
            sample = Sample(
                self._group, events.num_decode_tokens, context, events.num_prefill_tokens, pairs, events.step_s
            )
            self.samples.append(sample)


def _engine_facts(config: EngineConfig, limits: Limits, num_threads: int) -> dict[str, Any]:
    facts = {name: getattr(config, name) for name in RECORDED}
    for name in ("max_model_len", "kv_capacity_tokens", "max_num_seqs", "block_size"):
        facts[name] = getattr(limits, name)
    return facts | {"num_threads": None if uses_gpu(config) else num_threads}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines: Sequence[str] = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
