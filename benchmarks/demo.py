"""`make demo`: the same flood under FCFS and under VTC, on real replicas of the embedded model.

Ends by itself and leaves nothing running. `--check` exits 1 when a promise was not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import workload
from benchmarks.chart import draw
from benchmarks.load import OnEvent, Record, Run, Status, Target, drive
from benchmarks.machine import describe_machine
from benchmarks.measures import PolicyRun, figures_of
from benchmarks.table import claims, policy_table, tokens_claim
from fairserve.config import ApiConfig, ApiKey, EngineConfig, FairnessConfig, FairServeArgs
from fairserve.engine.embedded import ensure_embedded
from fairserve.errors import FairServeError
from fairserve.local import free_port, local_cluster, running_app

KEYS = {client: f"demo-key-{client}" for client in (*workload.CLIENTS, "warm-up")}
CALIBRATION_S = 30.0
"""Seconds that finding the capacity may take; usually about half."""


def demo_args(policy: str, replicas: int, slots: int) -> FairServeArgs:
    """The service that is measured; only the policy differs between runs."""
    return FairServeArgs(
        num_replicas=replicas,
        max_generation_s=5.0,
        engine=EngineConfig(max_num_seqs=slots, max_model_len=512, kv_cache_tokens=512 * slots),
        fairness=FairnessConfig.model_validate({"policy": policy}),
        api=ApiConfig(keys=tuple(ApiKey(client=client, key=key) for client, key in KEYS.items())),
    )


def actor_status(args: FairServeArgs) -> Status:
    """Asks the counter actor, which may be busy or not there."""
    import ray

    async def status() -> dict[str, Any] | None:
        try:
            actor = ray.get_actor(args.counter.name, namespace=args.counter.namespace)
            answer: dict[str, Any] = await asyncio.wait_for(actor.status.remote(), timeout=1.0)
        except (ValueError, TimeoutError, ray.exceptions.RayError):
            return None
        return answer

    return status


class Demo:
    """Runs policies one after another, each in a fresh application with a fresh counter actor."""

    def __init__(self, options: argparse.Namespace, url: str, console: Console) -> None:
        self._options = options
        self._url = url
        self._console = console
        self.capacity_rps: float | None = options.capacity
        self._started = time.monotonic()

    def run(self, policy: str) -> PolicyRun:
        options = self._options
        args = demo_args(policy, options.replicas, options.slots)
        self._say(f"{policy.upper()}: starting {options.replicas} replicas of {args.model}")
        with running_app(args, quiet=True):
            target = Target(self._url, args.model_name, KEYS)
            return PolicyRun(policy, asyncio.run(self._measure(policy, args, target)))

    async def _measure(self, policy: str, args: FairServeArgs, target: Target) -> Run:
        options = self._options
        num_slots = options.replicas * options.slots
        if self.capacity_rps is None:
            self.capacity_rps = await self._calibrate(target, num_slots)
        else:
            await drive(target, workload.burst("warm-up", num_slots), CALIBRATION_S, stop_after=options.replicas)
        plan = workload.flood(self.capacity_rps, options.seconds, num_slots, options.seed)
        self._say(f"{policy.upper()}: {len(plan)} requests in {options.seconds:.0f} s")
        with self._progress(policy, options.seconds) as on_event:
            return await drive(target, plan, options.seconds, status=actor_status(args), on_event=on_event)

    async def _calibrate(self, target: Target, num_slots: int) -> float:
        """Requests of the mix per second that the service finishes when it is full; also warms it up."""
        plan = workload.burst("warm-up", 4 * num_slots)
        run = await drive(target, plan, CALIBRATION_S, stop_after=2 * num_slots)
        finished = sorted(record.finish_s for record in run.records if record.finish_s is not None)
        if len(finished) < 2:
            problems = {record.error for record in run.records} - {None}
            raise FairServeFailed(
                f"too few requests finished in {run.duration_s:.0f} s: {problems or 'no error, only silence'}"
            )
        first = min(num_slots // 2, len(finished) // 2)  # before that the slots fill, and less comes out
        capacity_rps = (len(finished) - 1 - first) / (finished[-1] - finished[first])
        self._say(f"this machine finishes {capacity_rps:.2f} requests/s: asking for {workload.OVERLOAD:g} times that")
        return capacity_rps

    @contextlib.contextmanager
    def _progress(self, policy: str, duration_s: float) -> Iterator[OnEvent]:
        """A bar over the seconds of a run, with what every client has got; plain lines where there is no terminal."""
        sent, done = (dict.fromkeys(workload.CLIENTS, 0) for _ in range(2))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(policy.upper(), total=duration_s, now="")
            started = time.monotonic()

            def on_event(event: str, record: Record) -> None:
                sent[record.client] += event == "sent"
                done[record.client] += record.finish_s is not None and event == "ended"
                now = "  ".join(f"{client} {done[client]}/{sent[client]}" for client in sent)
                progress.update(task, completed=time.monotonic() - started, now=now + " finished/sent")

            yield on_event

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._started:4.0f} s[/dim]  {text}", highlight=False)


class FairServeFailed(FairServeError):
    message = "{detail}"

    def __init__(self, detail: str) -> None:
        super().__init__(detail=detail)


def report(runs: Sequence[PolicyRun], settings: dict[str, Any], console: Console, out: Path) -> bool:
    """Print tables and claims, write chart and JSON; returns whether every promise was kept."""
    figures = [figures_of(made) for made in runs]
    for one in figures:
        console.print(policy_table(one))
    pairs = [(runs[i], runs[i + 1]) for i in range(0, len(runs), 2)]
    by_policy = [{made.policy: figures_of(made) for made in pair} for pair in pairs]
    made_claims = claims(by_policy[0]["fcfs"], by_policy[0]["vtc"])
    if len(pairs) > 1:
        made_claims.append(tokens_claim([(pair["fcfs"].tokens_per_s, pair["vtc"].tokens_per_s) for pair in by_policy]))
    for claim in made_claims:
        console.print(
            f"{'[green]kept[/green]  ' if claim.kept else '[red]missed[/red]'}  {claim.text}", highlight=False
        )
    console.print("'>' marks requests still without a first token at the end: the true value is larger.", style="dim")
    draw(sorted(pairs[0], key=lambda made: made.policy), out / "demo.png")
    data = {"machine": describe_machine(), "settings": settings, "runs": [made.to_json() for made in runs]}
    (out / "demo.json").write_text(json.dumps(data) + "\n")
    console.print(f"chart {out / 'demo.png'}, data {out / 'demo.json'}", highlight=False)
    return all(claim.kept for claim in made_claims)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    started = time.monotonic()
    _allow_open_files(8192)
    args = demo_args("fcfs", options.replicas, options.slots)
    try:
        ensure_embedded(args.model, progress=console.print)
        console.print("starting Ray (10-20 s)", style="dim")
        with local_cluster(args, port=free_port(), quiet=True) as cluster:
            demo = Demo(options, cluster.url, console)
            order = [("fcfs", "vtc") if pair % 2 == 0 else ("vtc", "fcfs") for pair in range(options.pairs)]
            runs = [demo.run(policy) for pair in order for policy in pair]
    except FairServeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    settings = {name: getattr(options, name) for name in ("seconds", "replicas", "slots", "seed")}
    kept = report(runs, {**settings, "capacity_rps": demo.capacity_rps}, console, options.out)
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes", style="dim")
    return 0 if kept or not options.check else 1


def _allow_open_files(num: int) -> None:
    """Every waiting request is an open socket, here and in Serve's proxy, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < num:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num if hard == resource.RLIM_INFINITY else min(num, hard), hard))


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=80.0, help="length of one run (default 80)")
    parser.add_argument("--pairs", type=int, default=1, help="alternate FCFS and VTC so many times (default 1)")
    parser.add_argument("--replicas", type=int, default=2, help="model replicas (default 2)")
    parser.add_argument("--slots", type=int, default=8, help="requests one replica runs at once (default 8)")
    parser.add_argument("--capacity", type=float, help="requests/s to take for the capacity (default: measured first)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for chart and data (default out)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a promise was not kept")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
