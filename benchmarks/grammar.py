"""What it costs to keep outputs within a JSON Schema: decode steps beside free ones, and the choice of tokens alone.

    python -m benchmarks.grammar --rounds 5

Free and constrained batches alternate in one engine. ``choice`` is the part of a step that takes logits and gives
tokens; of a free greedy step it is what it was before there were grammars. With ``--cpu-time`` all times are processor
time of this process with one thread: for a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from fairserve.clock import SystemClock
from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.engine import Engine, build_engine
from fairserve.engine.request import GenerateRequest, Grammar, SamplingParams
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

STEPS = 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 100}
"""Long enough that no output ends while it is measured."""
KINDS: dict[str, dict[str, Any]] = {
    "free, greedy": {"temperature": 0.0},
    "constrained, greedy": {"temperature": 0.0, "grammar": Grammar("json_schema", json.dumps(SCHEMA))},
    "free, sampled": {"temperature": 1.0, "seed": 1},
    "constrained, sampled": {"temperature": 1.0, "seed": 1, "grammar": Grammar("json_schema", json.dumps(SCHEMA))},
}
now = time.perf_counter


class Timed:
    """Stands before a sampler's ``sample`` and remembers what it took."""

    def __init__(self, engine: Engine) -> None:
        self.took_s: list[float] = []
        sampler: Any = engine._runner.sampler
        sample = sampler.sample

        def timed(*args: Any) -> Any:
            began = now()
            sampled = sample(*args)
            self.took_s.append(now() - began)
            return sampled

        sampler.sample = timed


def batch(engine: Engine, timed: Timed, kind: str, size: int, steps: dict[str, list[float]]) -> None:
    """Prompts, then decode steps of ``size`` requests."""
    params = SamplingParams(max_tokens=256, ignore_eos=True, **KINDS[kind])
    for i in range(size):
        engine.add(GenerateRequest(f"r{i}", "bench", tuple(range(1000 + 40 * i, 1024 + 40 * i)), params))
    while engine.step().num_prefill_tokens:
        pass
    timed.took_s.clear()
    for _ in range(STEPS):
        began = now()
        events = engine.step()
        steps.setdefault(f"{kind}, {size}: step", []).append(now() - began)
        assert events.num_decode_tokens == size
    steps.setdefault(f"{kind}, {size}: choice", []).extend(timed.took_s)
    for i in range(size):
        engine.abort(f"r{i}")
    engine.idle_events()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/grammar.json"))
    args = parser.parse_args()
    if args.cpu_time:
        global now
        now, args.threads = time.process_time, 1
    most = max(args.batches)
    config = EngineConfig(device="cpu", max_num_seqs=most, kv_cache_tokens=most * 512, max_model_len=1024)
    book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
    engine = build_engine(
        args.model,
        config,
        reserve_output_tokens=None,
        queue=book,
        account=book,
        num_threads=args.threads,
        clock=SystemClock(),
    )
    timed = Timed(engine)
    steps: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):
        for size in args.batches:
            for kind in KINDS if number % 2 else reversed(KINDS):
                batch(engine, timed, kind, size, steps)
        if number == 0:
            steps.clear()  # the first round chooses kernels and meets most states of the grammar
    rows = {
        name: {
            "median_ms": round(1000 * statistics.median(times), 3),
            "p90_ms": round(1000 * sorted(times)[len(times) * 9 // 10], 3),
            "steps": len(times),
        }
        for name, times in sorted(steps.items())
    }
    for size in args.batches:
        for part in ("step", "choice"):
            cells = [f"{kind} {rows[f'{kind}, {size}: {part}']['median_ms']:8.3f}" for kind in KINDS]
            print(f"{size:3} rows, {part:6} median ms: {'   '.join(cells)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(), "threads": args.threads, "cpu_time": args.cpu_time, "rows": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
