"""Tokens/s and the worst gap with 1, 2, 3 and 4 replicas, through the whole application.

    python -m benchmarks.scaling [--quick] [--seconds 20] [--kinds paced cpu] [--out out/scaling.json]

- *paced*: replicas without a model (``stub_engine.py``), 8 requests each and 30 steps a second, as a GPU would keep its
  pace whatever the CPUs do. What they can make is known, 240 output tokens/s each, and *use* is the part of it that
  came out. HTTP, routing, counter actor, reports and the way of the tokens are real.
- *cpu*: the embedded model on one torch thread each, with 1 and 2 replicas.

Two clients, weights 4 and 1, always have twice as many requests open as there are slots. Tokens are those that the
counter actor was told of, per second and in stretches of 2 s. The worst gap is service / weight between clients that
both wait, since the application began, beside the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.skew import WEIGHTS, Load, Status, keys
from benchmarks.stub_engine import STEPS_PER_S, stubbed
from fairserve.config import FairServeArgs

KINDS = {"paced": (1, 2, 3, 4), "cpu": (1, 2)}
"""Numbers of replicas by kind."""
SLOTS = 8
MAX_TOKENS = {"paced": 48, "cpu": 24}
WARM_UP_S = {"paced": 4.0, "cpu": 10.0}
STRETCH_S = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """One number of replicas of one kind. Tokens per second are output tokens; ``stretches`` has them for each."""

    kind: str
    replicas: int
    tokens_per_s: float
    stretches: list[float]
    possible: float | None
    """Output tokens/s that the replicas make when every slot runs, where that is known."""
    worst_gap: float
    bound: float
    ratio: float
    """Service of the client of weight 4 over that of the client of weight 1."""
    load_1_min: float


def settings(kind: str, replicas: int) -> FairServeArgs:
    engine: dict[str, Any] = {"max_num_seqs": SLOTS}
    if kind == "cpu":
        engine |= {"num_threads": 1, "max_model_len": 512, "kv_cache_tokens": 512 * SLOTS}
    return FairServeArgs.model_validate(
        {"num_replicas": replicas, "max_generation_s": 5.0, "engine": engine, "api": {"keys": keys()}}
    )


async def measure(load: Load, status: Status, warm_up_s: float, seconds: float) -> list[dict[str, Any]]:
    """The counter actor's answers, each with ``at_s``, from the end of the warm-up on, a stretch apart."""
    samples: list[dict[str, Any]] = []

    async def take() -> None:
        answer = await asyncio.to_thread(status)
        samples.append(answer | {"at_s": time.monotonic()})

    async with load:
        await asyncio.sleep(warm_up_s)
        await take()
        while samples[-1]["at_s"] - samples[0]["at_s"] < seconds:
            await asyncio.sleep(STRETCH_S)
            await take()
    return samples


def row(kind: str, replicas: int, samples: Sequence[dict[str, Any]], load_1_min: float) -> Row:
    """The figures of one run, from :func:`measure`'s answers."""

    def total(sample: dict[str, Any], field: str, client: str | None = None) -> float:
        return float(sum(sample["clients"].get(name, {}).get(field, 0) for name in ([client] if client else WEIGHTS)))

    def per_s(first: dict[str, Any], last: dict[str, Any]) -> float:
        return (total(last, "num_output") - total(first, "num_output")) / float(last["at_s"] - first["at_s"])

    first, last = samples[0], samples[-1]
    served = {name: total(last, "service", name) - total(first, "service", name) for name in WEIGHTS}
    most, least = sorted(WEIGHTS, key=lambda name: -WEIGHTS[name])
    return Row(
        kind=kind,
        replicas=replicas,
        tokens_per_s=per_s(first, last),
        stretches=[per_s(one, other) for one, other in pairwise(samples)],
        possible=float(replicas * SLOTS * STEPS_PER_S) if kind == "paced" else None,
        worst_gap=last["worst_gap"],
        bound=last["bound"],
        ratio=served[most] / max(served[least], 1e-9),
        load_1_min=load_1_min,
    )


@contextmanager
def running(kind: str, args: FairServeArgs) -> Iterator[Status]:
    """The application, in the Ray that this process is connected to; asks its counter actor."""
    import ray

    from fairserve.cluster.counter_actor import find_counter_actor
    from fairserve.local import running_app

    with stubbed() if kind == "paced" else nullcontext(), running_app(args, quiet=True):
        actor = find_counter_actor(args.counter)
        yield lambda: dict(ray.get(actor.status.remote(), timeout=30))


def table(rows: Sequence[Row]) -> str:
    """A line per run; *times* compares with one replica of the same kind."""
    alone = {one.kind: one.tokens_per_s for one in rows if one.replicas == 1}
    lines = [("kind", "replicas", "output tokens/s", "times", "use", "worst gap", "bound", "4:1")]
    lines += [
        (
            one.kind,
            str(one.replicas),
            f"{one.tokens_per_s:.1f} ({min(one.stretches):.1f}-{max(one.stretches):.1f})",
            f"{one.tokens_per_s / alone[one.kind]:.2f}" if alone.get(one.kind) else "-",
            f"{one.tokens_per_s / one.possible:.1%}" if one.possible else "-",
            f"{one.worst_gap:,.0f}",
            f"{one.bound:,.0f}",
            f"{one.ratio:.2f}",
        )
        for one in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run, after its warm-up (default 20)")
    parser.add_argument("--kinds", choices=tuple(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="paced, 1 and 2 replicas for 4 s: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/scaling.json"))
    options = parser.parse_args(argv)
    if options.seconds <= 0:
        parser.error("nothing to run: more than 0 seconds are needed")
    runs = [(kind, num) for kind in options.kinds for num in KINDS[kind]]
    if options.quick:
        runs, options.seconds = [("paced", 1), ("paced", 2)], 4.0
    from fairserve.local import free_port, local_cluster

    rows = []
    most = settings("paced", max(num for _, num in runs))
    with local_cluster(most, port=free_port(), quiet=True) as cluster:
        for kind, replicas in runs:
            args = settings(kind, replicas)
            load = Load(
                {"a": cluster.url},
                args.model_name,
                dict.fromkeys(WEIGHTS, ("a",)),
                prompt="tell me about rivers and",
                max_tokens=MAX_TOKENS[kind],
                in_flight=2 * SLOTS * replicas,
            )
            with running(kind, args) as status:
                samples = asyncio.run(measure(load, status, WARM_UP_S[kind], options.seconds))
            rows.append(row(kind, replicas, samples, describe_machine()["load_1_min"]))
            print(f"{kind}, {replicas} replicas: {rows[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr, flush=True)
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "seconds": options.seconds, "rows": [asdict(one) for one in rows]}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
