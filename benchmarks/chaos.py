"""`make chaos`: any process is killed, stopped or cut off, at any time, under load; nothing may be lost.

Ends by itself and leaves nothing running. Exits 1 when a request was lost or a token cannot be accounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import chaos_net
from benchmarks.chaos_load import CUT, FAILED, FINISHED, LEFT, LOST, REFUSED, Client, crowd
from benchmarks.machine import describe_machine
from fairserve.config import FairServeArgs
from fairserve.errors import FairServeError
from fairserve.local import APP, free_port, local_cluster, running_app

CALM_S = 30.0
"""Seconds before the first fault, at most a quarter of the run."""
PATIENT_RAY = "RAY_health_check_failure_threshold", "20"
"""Ray gives up a node after 5 failed health checks, and its replicas end with it. A partition of 30 s lasts for nearly
a minute, because TCP pauses longer and longer between its tries: that was 5 failures in most trials."""
NOT_ONLY_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1"
"""A local Ray listens on loopback only, where the far node could not join it."""


def chaos_args(model: str, clients: list[Client], replicas: int) -> FairServeArgs:
    """Few slots, so that clients wait; two doors. The replicas reserve no CPU and the far node offers none, so that
    the doors stay on this side of the cable: it runs between replicas and actor."""
    return FairServeArgs.model_validate(
        {
            "model": model,
            "served_model_name": "tiny",
            "num_replicas": replicas,
            "num_ingress_replicas": 2,
            "num_cpus_per_replica": 0,
            "max_generation_s": 20.0,
            "engine": {"max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_tokens": 2048, "num_threads": 1},
            "api": {"keys": chaos_keys(clients)},
        }
    )


def chaos_keys(clients: Sequence[Client]) -> list[dict[str, Any]]:
    """The configuration of these clients."""
    return [
        {"client": c.name, "key": c.key, "weight": c.temper.weight, "max_waiting": c.temper.max_waiting}
        for c in clients
    ]


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    clients = crowd(options.clients)
    os.environ.setdefault(*PATIENT_RAY)
    no_cable = "not wanted" if options.no_partition else chaos_net.why_not()
    if no_cable is None:
        os.environ.setdefault(*NOT_ONLY_LOOPBACK)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="fs-chaos-") as folder, contextlib.ExitStack() as stack:
            from tests.tiny_model import save_tiny_model

            args = chaos_args(str(save_tiny_model(Path(folder) / "tiny")), clients, options.replicas)
            cluster = stack.enter_context(local_cluster(args, port=free_port(), quiet=True))
            cable = stack.enter_context(_cable(no_cable, console))
            outcome = _run(args, clients, options, cluster.url, cable, console)
    except FairServeError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("chaos: stopped", file=sys.stderr)
        return 130
    for table in tables(outcome):
        console.print(table)
    console.print("what callers saw:", json.dumps(outcome.details, indent=1), highlight=False)
    names = ("seconds", "seed", "clients", "replicas")
    settings = {name: getattr(options, name) for name in names} | {"partitions": cable is not None}
    machine = describe_machine()
    data = {"machine": machine, "settings": settings, "note": options.note, **outcome.to_json()}
    path = options.out / f"chaos-{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"data {path}, {(time.monotonic() - began) / 60:.1f} minutes", highlight=False)
    for problem in (*outcome.lost, *outcome.tokens.problems):
        console.print(f"[red]problem[/red]  {problem}", highlight=False)
    return 0 if not outcome.counts[LOST] and outcome.tokens.is_exact else 1


def _run(args: FairServeArgs, clients: list[Client], options: Any, url: str, cable: Any, console: Console) -> Any:
    from benchmarks.chaos_faults import Injector, Processes
    from benchmarks.chaos_storm import storm
    from benchmarks.chaos_witness import witnessed

    with witnessed(), running_app(args, quiet=True, wait=False):
        processes = Processes(APP, args.counter)
        injector = Injector(processes, random.Random(options.seed), cable, only=options.only)
        return asyncio.run(
            storm(
                url,
                args.model_name,
                clients,
                injector,
                processes,
                seconds=options.seconds,
                calm_s=min(CALM_S, options.seconds / 4),
                seed=options.seed,
                cards=injector.deck(),
                pause_s=(4.0, 10.0),
                say=lambda text: console.print(text, style="dim", highlight=False),
            )
        )


@contextlib.contextmanager
def _cable(why_not: str | None, console: Console) -> Iterator[tuple[chaos_net.Cable, str] | None]:
    if why_not is not None:
        console.print(f"no partitions: {why_not}", style="dim")
        yield None
        return
    with chaos_net.far_node() as cable:
        yield cable


def tables(outcome: Any) -> list[Table]:
    """What is printed at the end."""
    return [_faults_table(outcome), _requests_table(outcome), _tokens_table(outcome), _times_table(outcome)]


def _faults_table(outcome: Any) -> Table:
    table = Table("fault", "times", "fair again, s: p50", "max", title="Faults injected", title_justify="left")
    for (kind, how), num in sorted(Counter((f.kind, f.how) for f in outcome.faults).items()):
        fair = [f.fair_s for f in outcome.faults if (f.kind, f.how) == (kind, how)]
        table.add_row(f"{kind} {how}", str(num), f"{statistics.median(fair):.1f}", f"{max(fair):.1f}")
    fair = [fault.fair_s for fault in outcome.faults] or [0.0]
    num_censored = sum(fault.is_censored for fault in outcome.faults)
    table.add_row("all", str(len(outcome.faults)), f"{statistics.median(fair):.1f}", f"{max(fair):.1f}")
    table.caption = f"{num_censored} times the next fault or the end came before that"
    return table


def _requests_table(outcome: Any) -> Table:
    table = Table("requests", "", title="Requests", title_justify="left")
    table.add_row("sent", f"{sum(outcome.counts.values()):,}")
    names = {
        FINISHED: "finished",
        REFUSED: "cleanly refused: 429 or 503 with Retry-After",
        FAILED: "failed after the first byte, with an error event",
        LEFT: "left by their caller on purpose",
        CUT: CUT,
        LOST: "lost",
    }
    for outcome_name, text in names.items():
        table.add_row(text, f"{outcome.counts[outcome_name]:,}")
    table.caption = (
        f"{outcome.num_unconnected} tries found the proxy away or not ready; {outcome.num_door_deaths} doors died"
    )
    return table


def _tokens_table(outcome: Any) -> Table:
    tokens = outcome.tokens
    table = Table("tokens", "input", "output", title="Tokens", title_justify="left")
    rows = {
        "made (witnesses in the replicas)": tokens.made,
        "= charged (the ledger)": tokens.charged,
        "+ made by killed replicas, not reported any more": tokens.unreported,
        "made": tokens.made,
        "= told as usage of finished requests": tokens.told,
        f"+ made in vain by killed replicas, for {tokens.num_in_vain} of these": tokens.made_in_vain,
        "+ made for streams that broke off or were left": tokens.made_for_others,
    }
    for text, (num_input, num_output) in rows.items():
        table.add_row(text, f"{num_input:,}", f"{num_output:,}")
    table.add_row("  of which their callers saw", "", f"{tokens.streamed_to_others:,}")
    most = max((one["seconds"] for one in tokens.unreported_by_replica.values()), default=0.0)
    table.add_row("  at most so many seconds of a replica's work", "", f"{most:.2f}")
    table.caption = "equal to the token" if tokens.is_exact else "NOT EQUAL"
    return table


def _times_table(outcome: Any) -> Table:
    table = Table("service", "", title="Fairness and service", title_justify="left")
    lives = outcome.lives.values()
    worst = max(lives, key=lambda life: life["worst_gap"] / max(life["bound"], 1e-9))
    free = outcome.fault_free
    table.add_row("actor's lives", str(len(lives)))
    table.add_row(
        "its worst gap against its bound, in the life that came nearest",
        f"{worst['worst_gap']:,.0f} of {worst['bound']:,.0f} (staleness {worst['staleness']:,.0f})",
    )
    table.add_row("before the first fault", f"{free['worst_gap']:,.0f} of {free['bound']:,.0f}")
    table.add_row("worst gap across its lives, seen from outside", f"{outcome.worst_gap:,.0f}")
    table.add_row("longest time without an answer of the actor", f"{outcome.longest_away_s:.2f} s")
    table.add_row("longest time without a token, while there was a proxy", f"{outcome.longest_silence_s:.2f} s")
    doors = [f.back_s for f in outcome.faults if f.kind == "proxy" and f.back_s is not None]
    if doors:
        table.add_row("proxy SIGKILL: a new request is served after", _spread(doors))
    for how in ("cut off", "SIGSTOP"):
        mine = [f for f in outcome.faults if (f.kind, f.how) == ("replica", how)]
        if mine and (back := [f.merged_s for f in mine if f.merged_s is not None]):
            table.add_row(f"replica {how}: it reports again, after the end of it", _spread(back))
    for how in ("SIGKILL", "ray.kill", "SIGSTOP", "slow"):
        mine = [f for f in outcome.faults if (f.kind, f.how) == ("actor", how)]
        for text, values in (
            ("first request without a grant after", [f.degraded_s for f in mine if f.degraded_s is not None]),
            ("the actor answers again after", [f.back_s for f in mine if f.back_s is not None]),
        ):
            if values:
                table.add_row(f"actor {how}: {text}", _spread(values))
    return table


def _spread(values: list[float]) -> str:
    return f"p50 {statistics.median(values):.2f} s, max {max(values):.2f} s of {len(values)}"


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the run (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of faults and clients (default 0)")
    parser.add_argument("--clients", type=int, default=20, help="clients (default 20)")
    parser.add_argument("--replicas", type=int, default=3, help="model replicas (default 3)")
    parser.add_argument("--only", default="", help="faults to inject: words such as actor,SIGSTOP (default all)")
    parser.add_argument("--no-partition", action="store_true", help="without a second node and its cable")
    parser.add_argument("--note", default="", help="a remark for the result file, such as what else ran")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the data (default out)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
