"""What the engine's prefix cache gains where prompts begin alike, and costs where they do not.

    python -m benchmarks.prefix_cache [--rounds 5] [--threads 2] [--out out]

One engine in this process, on the embedded model, float32. With and without the cache, in alternating rounds:

- ``ttft``: a request of 1,000 shared and 24 own tokens, after one with the same 1,000 has finished. Their keys and
  values lie where it starts. ``ttft_copied``: the first one still runs and holds them, so they are copied.
- ``decode``: tokens/s of 32 requests, 8 at a time, 64 tokens in and 64 out, all different, in a KV cache of 2,048
  tokens: nothing is ever found, and once it is full, requests that start or grow move old content out of their way.

And the parts alone: copying 1,000 tokens, hashing 1,000 tokens, hashing the block that a decode has filled.

Floors of a hit, for this model: 1,000 tokens are 46 MB of keys and values; reading and writing them takes 4 ms at
22.9 GB/s, and computing them 0.27 TFLOP, 2.2 s at 124 GFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import describe_machine
from fairserve.clock import SystemClock
from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.engine import Engine, make_engine
from fairserve.engine.loading import LoadedModel, load_model
from fairserve.engine.prefix_cache import KeyMaker
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.engine.runner import Runner
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

NUM_SHARED, NUM_OWN = 1000, 24
NUM_REQUESTS, AT_ONCE, NUM_INPUT, NUM_OUTPUT = 32, 8, 64, 64
SMALL_CACHE, BLOCK = 2048, 16


class Bench:
    """Engines on one model, one after another; every prompt is new unless it is meant not to be."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.rng = random.Random(1)

    def engine(self, is_on: bool, **changes: Any) -> Engine:
        book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
        config = EngineConfig(device="cpu", prefix_cache=is_on, block_size=BLOCK, **changes)
        return make_engine(
            self.loaded, config, reserve_output_tokens=None, queue=book, account=book, clock=SystemClock()
        )

    def tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self.rng.choices(range(100, 40_000), k=num))

    def ttft_s(self, is_on: bool, *, is_held: bool) -> float:
        engine, shared = self.engine(is_on, kv_cache_tokens=16_384), self.tokens(NUM_SHARED)
        engine.add(_request("first", shared + self.tokens(NUM_OWN), 2))
        while engine.has_work():
            if engine.step().outputs and is_held:
                break
        engine.add(_request("second", shared + self.tokens(NUM_OWN), 1))
        began_s = perf_counter()
        while not any(output.request_id == "second" for output in engine.step().outputs):
            pass
        return perf_counter() - began_s

    def decode(self, is_on: bool) -> float:
        """Output tokens/s, prompts included in the time."""
        engine = self.engine(is_on, kv_cache_tokens=SMALL_CACHE, max_num_seqs=AT_ONCE)
        for i in range(NUM_REQUESTS):
            engine.add(_request(f"r{i}", self.tokens(NUM_INPUT), NUM_OUTPUT))
        began_s, num_tokens = perf_counter(), 0
        while engine.has_work():
            num_tokens += sum(len(output.token_ids) for output in engine.step().outputs)
        return num_tokens / (perf_counter() - began_s)

    def parts(self) -> dict[str, float]:
        """Microseconds."""
        engine, keys = self.engine(True, kv_cache_tokens=16_384), KeyMaker(bytes(32), "client", BLOCK)
        prompt, runner = self.tokens(NUM_SHARED), engine._runner
        assert isinstance(runner, Runner)
        num_blocks = NUM_SHARED // BLOCK
        grown = keys.keys_for("client")
        return {
            "copy_1000_tokens_us": _least_us(lambda: runner.copy([(i, 500 + i) for i in range(num_blocks)]), 20),
            "copy_one_block_us": _least_us(lambda: runner.copy([(3, 900)]), 50),
            "hash_1000_tokens_us": _least_us(lambda: keys.keys_for("client").add(prompt), 200),
            "hash_a_filled_block_us": _least_us(lambda: grown.add(prompt[:BLOCK]), 1000),
        }


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(request_id, "client", prompt, sampling)


def _least_us(act: Callable[[], object], times: int) -> float:
    """The least of several tries: what else runs only adds."""
    act()
    taken = []
    for _ in range(times):
        began_s = perf_counter()
        act()
        taken.append(perf_counter() - began_s)
    return min(taken) * 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefix_cache", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of everything, with and without (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for prefix_cache.json (default out)")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.threads < 1:
        parser.error("nothing to run: at least one round and one thread")
    torch.set_num_threads(options.threads)
    bench = Bench(load_model(EMBEDDED_MODEL, EngineConfig(device="cpu")))
    asked: dict[str, Callable[[bool], float]] = {
        "ttft_s": lambda is_on: bench.ttft_s(is_on, is_held=False),
        "ttft_copied_s": lambda is_on: bench.ttft_s(is_on, is_held=True),
        "decode_tokens_per_s": bench.decode,
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    for i in range(options.rounds):
        for name, ask in asked.items():
            order = (True, False) if i % 2 else (False, True)
            got = {is_on: ask(is_on) for is_on in order}
            figures[name].append((got[False], got[True]))
            print(f"{name}: without {got[False]:.3f}, with {got[True]:.3f}", flush=True)
    parts = bench.parts()
    for name, pairs in figures.items():
        ratios = [with_it / without for without, with_it in pairs]
        without, with_it = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"ratio {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name:>20}: without {without:.3f}, with {with_it:.3f} (medians), {spread}")
    for name, taken_us in parts.items():
        print(f"{name:>24}: {taken_us:,.1f}")
    options.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "pairs": figures, "parts": parts}
    (options.out / "prefix_cache.json").write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
