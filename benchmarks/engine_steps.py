"""How long the engine's steps take beside the floors of this machine, one setting beside another in alternating rounds.

    python -m benchmarks.engine_steps cpu_linear=packed cpu_linear=fused --rounds 5

A decode step reads all weights and the KV cache of its requests once, and a prompt chunk multiplies each of its tokens
with all weights: what the machine needs for that much reading and multiplying, measured here too, is the floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.machine import describe_machine
from fairserve.clock import SystemClock
from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.engine import Engine, build_engine
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

STEPS = 12
CHUNK = 256
now = time.perf_counter


class Bench:
    """One engine under one setting, and what its steps took."""

    def __init__(self, model: str, setting: str, batches: list[int], num_prompt: int, threads: int) -> None:
        self.setting = setting
        self.num_prompt = num_prompt
        changes = dict(part.split("=", 1) for part in setting.split(",") if part)
        config = {"device": "cpu", "max_num_seqs": max(batches), "max_num_batched_tokens": CHUNK}
        config |= {"kv_cache_tokens": max(batches) * 512, "max_model_len": 1024}
        config |= {key: yaml.safe_load(value) for key, value in changes.items()}
        book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
        began = now()
        self.engine: Engine = build_engine(
            model,
            EngineConfig(**config),
            reserve_output_tokens=None,
            queue=book,
            account=book,
            num_threads=threads,
            clock=SystemClock(),
        )
        self.load_s = now() - began
        self.steps: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}

    def round(self, batch: int) -> None:
        """Prompts, then decode steps of ``batch`` requests."""
        rng = torch.Generator().manual_seed(batch)
        sampling = SamplingParams(temperature=0.0, max_tokens=256, ignore_eos=True)
        self.tokens.clear()
        for i in range(batch):
            prompt = torch.randint(0, self.engine.limits.vocab_size, (self.num_prompt,), generator=rng).tolist()
            self.engine.add(GenerateRequest(f"r{i}", "bench", tuple(prompt), sampling))
        while self._step("prompts"):
            pass
        for _ in range(STEPS):
            self._step(f"decode {batch}")
        self._clear(batch)

    def chunk(self) -> None:
        """One prompt of a whole chunk."""
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        self.engine.add(GenerateRequest("r0", "bench", tuple(range(1000, 1000 + CHUNK)), sampling))
        self._step(f"prefill {CHUNK}")
        self._clear(1)

    def _step(self, kind: str) -> int:
        """Prompt tokens in it."""
        began = now()
        events = self.engine.step()
        self.steps.setdefault(kind, []).append(now() - began)
        for output in events.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return events.num_prefill_tokens

    def _clear(self, num: int) -> None:
        for i in range(num):
            self.engine.abort(f"r{i}")
        self.engine.idle_events()


def floors() -> dict[str, float]:
    """What this machine reads and multiplies, measured: bytes/s and float32 operations/s."""
    many = torch.ones(100_000_000)
    a = torch.ones(2048, 2048)
    reads, products = [], []
    with torch.inference_mode():
        for _ in range(6):
            began = now()
            many.sum()
            reads.append(now() - began)
            began = now()
            a @ a
            products.append(now() - began)
    return {"bytes_per_s": 4 * many.numel() / min(reads), "flop_per_s": 2 * 2048**3 / min(products)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="such as cpu_linear=fused,max_num_seqs=8: one engine each")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("out/engine_steps.json"))
    parser.add_argument("--cpu-time", action="store_true", help="of this thread alone: one thread on a busy machine")
    args = parser.parse_args()
    if args.cpu_time:
        global now
        now, args.threads = time.thread_time, 1
    torch.set_num_threads(args.threads)
    floor = floors()
    print(f"reads {floor['bytes_per_s'] / 1e9:.1f} GB/s, multiplies {floor['flop_per_s'] / 1e9:.0f} GFLOP/s")
    benches = [Bench(args.model, setting, args.batches, args.prompt, args.threads) for setting in args.settings]
    for number in range(args.rounds + 1):
        for batch in args.batches:
            tokens = []
            for bench in benches if number % 2 else benches[::-1]:
                bench.round(batch)
                tokens.append(dict(bench.tokens))
            if number == 0:
                print(f"batch {batch}: the same greedy tokens: {all(one == tokens[0] for one in tokens)}")
        for bench in benches:
            bench.chunk()
            if number == 0:
                bench.steps.clear()  # the first round chooses kernels and touches memory
    result: dict[str, Any] = {"machine": describe_machine(), "threads": args.threads, "floors": floor, "settings": {}}
    for bench in benches:
        rows = {kind: _spread(steps) for kind, steps in bench.steps.items()}
        result["settings"][bench.setting] = {"load_s": round(bench.load_s, 2), "ms": rows}
    kinds = list(benches[0].steps)
    for kind in (kind for kind in kinds if kind != "prompts"):
        cells = [f"{bench.setting}: {_spread(bench.steps[kind])['median']:8.2f}" for bench in benches]
        lows = [f"{_spread(bench.steps[kind])['p10']:.2f}" for bench in benches]
        print(f"{kind:28} median ms  {'  '.join(cells)}   (p10 {', '.join(lows)})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * s for s in seconds)
    return {
        "median": round(statistics.median(ordered), 3),
        "p10": round(ordered[len(ordered) // 10], 3),
        "p90": round(ordered[len(ordered) * 9 // 10], 3),
        "steps": len(ordered),
    }


if __name__ == "__main__":
    main()
