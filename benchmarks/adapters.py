"""What LoRA adapters cost: tokens/s of a batch under one and under four of them, over the same batch of the bare model.

    python -m benchmarks.adapters --rounds 5

Batches alternate in one process. ``none loaded`` is an engine without adapters beside one that has them, both computing
the bare model: what adapters cost those who do not ask for them. The adapters are random ones of peft's, of every
linear of every layer; how good an adapter is does not change what it costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from fairserve.clock import SystemClock
from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.embedded import ensure_embedded
from fairserve.engine.engine import Engine, build_engine
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

STEPS = 12
NUM_PROMPT = 32
KINDS = {"none loaded": 0, "bare": 0, "1 adapter": 1, "4 adapters": 4}
"""Adapters that the requests of a batch are dealt over in turn."""
now = time.perf_counter


def make_adapters(model: str, folder: Path, num: int, rank: int) -> dict[str, str]:
    """Random adapters, by name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = ensure_embedded(model) if model == EMBEDDED_MODEL else model
    base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    made = {}
    for i in range(num):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings(action="ignore"):
            wrapped: Any = get_peft_model(base, config)
        for path, parameter in wrapped.named_parameters():
            if "lora_" in path:
                torch.nn.init.normal_(parameter, std=0.01)
        made[f"a{i}"] = str(folder / f"a{i}")
        wrapped.save_pretrained(made[f"a{i}"])
        base = wrapped.unload()
    return made


def make_engine(model: str, adapters: dict[str, str], most: int, threads: int, cpu_linear: Any) -> Engine:
    config = EngineConfig(
        device="cpu",
        cpu_linear=cpu_linear,
        max_num_seqs=most,
        kv_cache_tokens=most * 256,
        max_model_len=512,
        prefix_cache=False,
        adapters=adapters,
    )
    book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
    return build_engine(
        model,
        config,
        reserve_output_tokens=None,
        queue=book,
        account=book,
        num_threads=threads,
        clock=SystemClock(),
    )


def batch(engine: Engine, num_adapters: int, size: int) -> dict[str, float]:
    """Tokens/s of its prompts, and of decode steps by their median."""
    params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    for i in range(size):
        prompt = tuple(range(1000 + 80 * i, 1000 + 80 * i + NUM_PROMPT))
        adapter = f"a{i % num_adapters}" if num_adapters else ""
        engine.add(GenerateRequest(f"r{i}", "bench", prompt, params, adapter=adapter))
    began = now()
    while engine.step().num_prefill_tokens:
        prompts_s = now() - began
    steps = []
    for _ in range(STEPS):
        began = now()
        assert engine.step().num_decode_tokens == size
        steps.append(now() - began)
    for i in range(size):
        engine.abort(f"r{i}")
    engine.idle_events()
    return {"decode": size / statistics.median(steps), "prompt": size * NUM_PROMPT / prompts_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-linear", default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, one thread: on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("out/adapters.json"))
    args = parser.parse_args()
    if args.cpu_time:
        global now
        now, args.threads = time.process_time, 1
    torch.manual_seed(0)
    most = max(args.batches)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(args.model, Path(folder), max(KINDS.values()), args.rank)
        having = make_engine(args.model, adapters, most, args.threads, args.cpu_linear)
    without = make_engine(args.model, {}, most, args.threads, args.cpu_linear)
    speeds: dict[tuple[int, str], list[dict[str, float]]] = {}
    for number in range(args.rounds + 1):
        for size in args.batches:
            for kind in KINDS if number % 2 else reversed(KINDS):
                engine = without if kind == "none loaded" else having
                speeds.setdefault((size, kind), []).append(batch(engine, KINDS[kind], size))
        if number == 0:
            speeds.clear()  # the first round chooses kernels and touches memory
    rows: dict[str, Any] = {}
    for (size, kind), mine in sorted(speeds.items()):
        row: dict[str, Any] = rows.setdefault(f"{size} requests", {}).setdefault(kind, {})
        for part in ("decode", "prompt"):
            ratios = sorted(a[part] / b[part] for a, b in zip(mine, speeds[size, "bare"], strict=True))
            row[f"{part}_tokens_per_s"] = round(statistics.median(one[part] for one in mine), 1)
            row[f"{part}_over_bare"] = [round(r, 3) for r in (statistics.median(ratios), ratios[0], ratios[-1])]
    for size, kinds in rows.items():
        for kind in KINDS:
            one = kinds[kind]
            cells = (
                f"{part} {one[f'{part}_tokens_per_s']:7.1f} tokens/s, {{:.2f}} of bare ({{:.2f}} to {{:.2f}})".format(
                    *one[f"{part}_over_bare"]
                )
                for part in ("decode", "prompt")
            )
            print(f"{size:12} {kind:12} {'   '.join(cells)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"threads": args.threads, "rank": args.rank, "cpu_linear": args.cpu_linear, "cpu_time": args.cpu_time}
    result = {"machine": describe_machine(), **settings, "rounds": args.rounds, "rows": rows}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
