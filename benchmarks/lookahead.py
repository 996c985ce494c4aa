"""How many requests must be granted ahead of free slots to keep replicas busy?

Saturates the service and, for each ``dispatch.lookahead``, prints the share of running slots that were in use and the
tokens/s, in alternating rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.skew import Load, keys
from fairserve.config import FairServeArgs
from fairserve.local import free_port, local_cluster, running_app

WARM_UP_S = 8.0
SAMPLE_S = 0.2


async def measure(load: Load, actor: Any, seconds: float) -> dict[str, float]:
    """Slot use (0..1) and tokens/s over ``seconds``, after a warm-up, with the service saturated."""
    import ray

    async def status() -> dict[str, Any]:
        return dict(await asyncio.to_thread(ray.get, actor.status.remote()))

    async with load:
        await asyncio.sleep(WARM_UP_S)
        first, began = await status(), time.monotonic()
        used = []
        while time.monotonic() - began < seconds:
            replicas = (await status())["replicas"].values()
            # A report tells of the moment after a step: what waits at the replica takes the slots of those that just
            # ended before the next step begins.
            busy = sum(min(r["max_slots"], r["running"] + r["waiting"]) for r in replicas)
            used.append(busy / sum(r["max_slots"] for r in replicas))
            await asyncio.sleep(SAMPLE_S)
        last, took_s = await status(), time.monotonic() - began
    tokens = sum(
        last["clients"][name][kind] - first["clients"][name][kind]
        for name in first["clients"]
        for kind in ("num_input", "num_output")
    )
    return {"slot_use": statistics.fmean(used), "tokens_per_s": tokens / took_s}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lookahead", description=__doc__.split("\n")[0])
    parser.add_argument("--values", default="0,1,2,4", help="lookaheads to compare (default 0,1,2,4)")
    parser.add_argument("--rounds", type=int, default=2, help="alternating rounds (default 2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement (default 20)")
    parser.add_argument("--out", type=Path, default=Path("out/lookahead.json"))
    options = parser.parse_args(argv)
    values = [int(value) for value in options.values.split(",")]
    args = FairServeArgs.model_validate(
        {
            "num_replicas": 2,
            "max_generation_s": 5.0,
            "engine": {"max_num_seqs": 8, "max_model_len": 512, "kv_cache_tokens": 4096},
            "api": {"keys": keys()},
        }
    )
    rows: list[dict[str, Any]] = []
    with local_cluster(args, port=free_port(), quiet=True) as cluster, running_app(args, quiet=True):
        import ray

        actor = ray.get_actor(args.counter.name, namespace=args.counter.namespace)
        for _ in range(options.rounds):
            for value in values:
                dispatch = args.dispatch.model_copy(update={"lookahead": value})
                ray.get(actor.configure.remote(args.model_copy(update={"dispatch": dispatch}).model_dump_json()))
                load = Load(
                    {"a": cluster.url},
                    args.model_name,
                    {"ann": ("a",), "bob": ("a",)},
                    prompt="and then",
                    max_tokens=24,
                )
                row = {"lookahead": value} | asyncio.run(measure(load, actor, options.seconds))
                rows.append(row)
                print("lookahead {lookahead}: slots in use {slot_use:6.1%}, {tokens_per_s:7.1f} tokens/s".format(**row))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
