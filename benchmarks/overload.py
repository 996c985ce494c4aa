"""Ten times capacity, for minutes: does memory stay bounded, do limits hold, and does a polite client notice?

    python -m benchmarks.overload [--seconds 180] [--out out/overload.json]

Starts a Ray of its own and an open fairserve. First polite clients are alone and their times to the first token are
noted; then flooding clients ask, open loop, for ten times what the service finishes, one of them under a new name with
every request. Every two seconds: resident memory of every process of the service, what waits at the counter actor.
Every refusal is looked at: its status, and its Retry-After. In the end 2,000 requests are sent and hung up on, and what
is left of them is counted. Ends by itself, and leaves nothing running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks import workload
from benchmarks.demo import FairServeFailed, _allow_open_files, actor_status
from benchmarks.load import Record, Status, Target, drive, send
from benchmarks.machine import describe_machine
from benchmarks.workload import Planned
from fairserve.config import DispatchConfig, EngineConfig, FairServeArgs
from fairserve.engine.embedded import ensure_embedded
from fairserve.errors import FairServeError
from fairserve.local import free_port, local_service

OVERLOAD = 10.0
POLITE = ("polite-1", "polite-2", "polite-3")
THINK_S = 1.0
"""Alone, a polite client waits so long between an answer and its next question."""
POLITE_SHARE = 0.5
"""Beside the flood it asks for so much of its fair share. Who asks for more than the share waits like anybody: that is
what fairness means, and with a think time of a second both polite clients ask for twice their share."""
FLOODING = tuple(f"flood-{i}" for i in range(7))
CROWD = "crowd"
"""Sends each request under a name that nobody has used before."""
SLOTS = 4
MAX_WAITING, MAX_WAITING_PER_CLIENT, MAX_CLIENTS = 100, 15, 20
SAMPLE_S = 2.0
CALIBRATION_S = 40.0
CROWD_RATE = 0.25
"""What the crowd asks for, of the capacity. Where anybody may make names up, newcomers who ask for more than all of it
leave nothing for those who have been served before: each has as good a claim as any client. Keys are what stops that,
and organisations (``fairness/hierarchy.py``); this benchmark does not show it."""


def overload_args() -> FairServeArgs:
    """Limits are small, so that all of them are reached."""
    return FairServeArgs(
        num_replicas=2,
        max_generation_s=5.0,
        engine=EngineConfig(max_num_seqs=SLOTS, max_model_len=512, kv_cache_tokens=512 * SLOTS),
        dispatch=DispatchConfig(
            max_waiting=MAX_WAITING, max_waiting_per_client=MAX_WAITING_PER_CLIENT, max_clients=MAX_CLIENTS
        ),
    )


class Names(dict[str, str]):
    """Open mode: whoever calls is called what its bearer token says."""

    def __missing__(self, client: str) -> str:
        return client


@dataclass
class Tally:
    """What came back of the flood, by status; and of 429s, what was in their Retry-After."""

    statuses: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    least_retry_after_s: float | None = None
    most_retry_after_s: float | None = None

    async def saw(self, response: httpx.Response) -> None:
        """A hook of the HTTP client: looks at every answer before its body."""
        self.statuses[str(response.status_code)] += 1
        if response.status_code != 429:
            return
        wait = response.headers.get("retry-after", "")
        if not wait.isdigit() or int(wait) < 1:
            self.without_retry_after += 1
            return
        self.least_retry_after_s = min(float(wait), self.least_retry_after_s or float(wait))
        self.most_retry_after_s = max(float(wait), self.most_retry_after_s or float(wait))


class Memory:
    """Resident memory of every process below this one, over time."""

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self._titles: dict[int, str] = {}

    def sample(self, t_s: float) -> None:
        rows: dict[str, float] = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = self._titles.setdefault(process.pid, _title(process))
                rows[f"{title}#{process.pid}"] = round(process.memory_info().rss / 1e6, 1)
        self.samples.append({"t_s": round(t_s, 1), "rss_mb": rows})

    def figures(self, since_s: float) -> list[dict[str, Any]]:
        """Per process that lived from ``since_s`` to the end: MB, in the first and in the last third."""
        samples = [sample["rss_mb"] for sample in self.samples if sample["t_s"] >= since_s]
        names = set.intersection(*(set(rows) for rows in samples)) if samples else set()
        third = max(1, len(samples) // 3)
        made = []
        for name in sorted(names):
            series = [rows[name] for rows in samples]
            first, last = statistics.median(series[:third]), statistics.median(series[-third:])
            made.append(
                {"process": name.partition("#")[0], "first_third": first, "last_third": last, "most": max(series)}
            )
        return made


def _title(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return str(words[0]).partition(".")[0]  # what follows is the method that runs now
    scripts = [Path(word).name for word in words if word.endswith(".py")]
    return scripts[0] if scripts else Path(words[0]).name


def polite_think_s(capacity_rps: float) -> float:
    """Between the questions of a client that asks for ``POLITE_SHARE`` of an equal share of what the crowd leaves."""
    fair_rps = (1 - CROWD_RATE) * capacity_rps / (len(POLITE) + len(FLOODING))
    return 1 / (POLITE_SHARE * fair_rps)


async def polite(
    http: httpx.AsyncClient, target: Target, client: str, records: list[Record], began: float, think_s: float
) -> None:
    """One request at a time, for ever."""

    def now_s() -> float:
        return time.monotonic() - began

    for planned in itertools.cycle(workload.burst(client, 200, seed=len(client))):
        record = Record(client, submit_s=now_s())
        records.append(record)
        await send(http, target, planned, record, now_s, lambda *_: None)
        await asyncio.sleep(think_s)


def flood_plan(rate_rps: float, duration_s: float, seed: int) -> list[Planned]:
    """Poisson arrivals at ``rate_rps`` in all."""
    rng = random.Random(seed)
    crowd_share = CROWD_RATE / OVERLOAD
    plan: list[Planned] = []
    at_s = 0.0
    bodies = itertools.cycle(workload.burst("any", 500, seed))
    while at_s < duration_s:
        client = f"{CROWD}-{len(plan)}" if rng.random() < crowd_share else rng.choice(FLOODING)
        body = next(bodies)
        plan.append(Planned(client, at_s, body.prompt, body.num_output))
        at_s += rng.expovariate(rate_rps)
    return plan


class Overload:
    def __init__(self, options: argparse.Namespace, url: str, args: FairServeArgs, console: Console) -> None:
        self._options = options
        self._target = Target(url, args.model_name, Names())
        self._status: Status = actor_status(args)
        self._console = console
        self._began = time.monotonic()
        self._memory = Memory()
        self._samples: list[dict[str, Any]] = []
        self._tally = Tally()

    async def run(self) -> dict[str, Any]:
        options, memory = self._options, self._memory
        capacity_rps = await self._capacity_rps()
        self._say(f"it finishes {capacity_rps:.2f} requests/s; polite clients alone for {options.solo:.0f} s")
        solo: list[Record] = []
        hooks = {"response": [self._tally.saw]}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=60)
        async with (
            httpx.AsyncClient(limits=limits, timeout=timeout) as http,
            httpx.AsyncClient(limits=limits, timeout=timeout, event_hooks=hooks) as flood_http,
        ):
            await self._for(options.solo, self._polite(http, solo, THINK_S))
            beside: list[Record] = []
            plan = flood_plan(OVERLOAD * capacity_rps, options.seconds, options.seed)
            self._say(f"{len(plan)} requests of a flood in {options.seconds:.0f} s")
            flooding: list[Record] = []
            since_s = time.monotonic() - self._began
            work = self._polite(http, beside, polite_think_s(capacity_rps))
            await self._for(options.seconds, [*work, self._flood(flood_http, plan, flooding), self._watch()])
            until_s = time.monotonic() - self._began
        after_flood = await self._at_rest()
        self._say(f"{options.aborts} requests that are hung up on")
        aborted = await self._abort(options.aborts, options.seed)
        end = await self._at_rest()
        waited = self._samples
        return {
            "capacity_rps": round(capacity_rps, 2),
            "asked_rps": round(len(plan) / options.seconds, 2),
            "distinct_names": len({planned.client for planned in plan}),
            "flood": {
                "statuses": dict(self._tally.statuses),
                "finished": sum(record.finish_s is not None for record in flooding),
                "broke_off_or_failed": dict(Counter(r.error for r in flooding if r.error and "HTTP" not in r.error)),
                "refused_without_retry_after": self._tally.without_retry_after,
                "retry_after_s": [self._tally.least_retry_after_s, self._tally.most_retry_after_s],
            },
            "polite": {"alone": _ttft(solo, since_s), "beside_the_flood": _ttft(beside, until_s)},
            "limits": {
                "max_waiting": MAX_WAITING,
                "most_waiting": max((one["waiting"] for one in waited), default=None),
                "max_waiting_per_client": MAX_WAITING_PER_CLIENT,
                "most_waiting_of_a_client": max(
                    (max((c["waiting"] for c in one["clients"].values()), default=0) for one in waited), default=None
                ),
                "max_clients": MAX_CLIENTS,
                "most_clients_known": max((len(one["clients"]) for one in waited), default=None),
                "forgotten": end["forgotten"],
                "most_forgiven": end["most_forgiven"],
                "bound": end["bound"],
                "worst_gap": end["worst_gap"],
            },
            "rss_mb": memory.figures(since_s),
            "after_the_flood": _left(after_flood),
            "aborted": aborted,
            "after_the_aborts": _left(end),
            "samples": memory.samples,
        }

    def _polite(self, http: httpx.AsyncClient, records: list[Record], think_s: float) -> list[Any]:
        return [polite(http, self._target, client, records, self._began, think_s) for client in POLITE]

    async def _capacity_rps(self) -> float:
        """Requests per second when it is full."""
        num = 2 * SLOTS
        plan = [one for i in range(4) for one in workload.burst(f"warm-up-{i}", num, seed=i)]
        run = await drive(self._target, plan, CALIBRATION_S, stop_after=3 * num)
        ends = sorted(record.finish_s for record in run.records if record.finish_s is not None)
        if len(ends) < 4:
            raise FairServeFailed(f"only {len(ends)} requests finished in {run.duration_s:.0f} s")
        first = len(ends) // 4
        return (len(ends) - 1 - first) / (ends[-1] - ends[first])

    async def _for(self, seconds: float, work: Sequence[Any]) -> None:
        """Do all of it, and stop; what is under way is hung up on."""
        tasks = [asyncio.create_task(one) for one in work]
        try:
            await asyncio.sleep(seconds)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def _flood(self, http: httpx.AsyncClient, plan: Sequence[Planned], records: list[Record]) -> None:
        began = time.monotonic()

        def now_s() -> float:
            return time.monotonic() - began

        async with asyncio.TaskGroup() as group:
            for planned in plan:
                await asyncio.sleep(planned.at_s - now_s())
                record = Record(planned.client, submit_s=now_s())
                records.append(record)
                group.create_task(send(http, self._target, planned, record, now_s, lambda *_: None))

    async def _watch(self) -> None:
        while True:
            self._memory.sample(time.monotonic() - self._began)
            status = await self._status()
            if status is not None:
                self._samples.append(status)
                if len(self._samples) % 10 == 1:
                    self._say(
                        f"{status['waiting']} wait, {len(status['clients'])} clients known, "
                        f"{status['forgotten']} forgotten, {dict(self._tally.statuses)}"
                    )
            await asyncio.sleep(SAMPLE_S)

    async def _abort(self, num: int, seed: int) -> dict[str, int]:
        """Send so many requests for long answers, and hang up on each within half a second."""
        rng, turns = random.Random(seed), asyncio.Semaphore(50)
        outcomes: Counter[str] = Counter()

        async def one(http: httpx.AsyncClient, i: int) -> None:
            record = Record(f"aborter-{i % 20}", submit_s=0.0)
            planned = Planned(record.client, 0.0, "river table window", 300)
            async with turns:
                try:
                    async with asyncio.timeout(rng.uniform(0.05, 0.5)):
                        await send(http, self._target, planned, record, lambda: 0.0, lambda *_: None)
                    outcomes[record.error or "finished"] += 1
                except TimeoutError:
                    outcomes["hung up after the first token" if record.first_s is not None else "hung up before"] += 1

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None)) as http:
            await asyncio.gather(*(one(http, i) for i in range(num)))
        return dict(outcomes)

    async def _at_rest(self) -> dict[str, Any]:
        """Everybody has hung up: the status when nothing waits or runs any more, or after a minute."""
        status: Mapping[str, Any] | None = None
        for _ in range(60):
            await asyncio.sleep(1.0)
            status = await self._status() or status
            if status is not None and not status["waiting"] and not status["leases"] and not _running(status):
                break
        if status is None:
            raise FairServeFailed("the counter actor did not answer")
        return dict(status)

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began:4.0f} s[/dim]  {text}", highlight=False)


def _running(status: Mapping[str, Any]) -> int:
    return sum(replica["running"] + replica["waiting"] for replica in status["replicas"].values())


def _left(status: Mapping[str, Any]) -> dict[str, Any]:
    """What is still at work; free KV tokens of all that there are, by replica."""
    replicas = status["replicas"].values()
    return {
        "waiting": status["waiting"],
        "leases": status["leases"],
        "running": _running(status),
        "kv_free": [[replica["free_kv_tokens"], replica["kv_capacity_tokens"]] for replica in replicas],
    }


def _ttft(records: Sequence[Record], until_s: float) -> dict[str, Any]:
    """Seconds to the first token. What still waited for it at ``until_s`` counts with its age: the true value is
    larger."""
    answered = [record for record in records if record.error is None]
    waiting = sum(record.first_s is None for record in answered)
    first = sorted((until_s if one.first_s is None else one.first_s) - one.submit_s for one in answered)
    made: dict[str, Any] = {
        "requests": len(records),
        "still_without_first_token": waiting,
        "errors": dict(Counter(record.error for record in records if record.error)),
    }
    if len(first) >= 2:
        cuts = statistics.quantiles(first, n=100, method="inclusive")
        made |= {"ttft_p50_s": round(cuts[49], 3), "ttft_p99_s": round(cuts[98], 3), "ttft_max_s": round(first[-1], 3)}
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="overload", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="of the flood (default 180)")
    parser.add_argument("--solo", type=float, default=40.0, help="seconds of the polite clients alone (default 40)")
    parser.add_argument("--aborts", type=int, default=2_000, help="requests hung up on in the end (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default 0)")
    parser.add_argument("--note", default="", help="what else the machine does, for the record")
    parser.add_argument("--out", type=Path, default=Path("out/overload.json"), help="file (default out/overload.json)")
    options = parser.parse_args(argv)
    console, args = Console(width=140), overload_args()
    _allow_open_files(8192)
    try:
        ensure_embedded(args.model, progress=console.print)
        console.print("starting Ray (10-20 s)", style="dim")
        with local_service(args, port=free_port(), quiet=True) as cluster:
            figures = asyncio.run(Overload(options, cluster.url, args, console).run())
    except FairServeError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    settings = {name: getattr(options, name) for name in ("seconds", "solo", "seed", "note")}
    data = {"machine": describe_machine(), "settings": settings, "figures": figures}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    console.print_json(data={name: value for name, value in figures.items() if name != "samples"})
    console.print(f"data {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
