"""CPU of proxy, ingress and replica for each token that is streamed, with and without trunks (``api.multiplex``).

    python -m benchmarks.streaming [--quick] [--pairs 3] [--seconds 10] [--streams 32] [--out out/streaming.json]

A replica without a model (``stub_engine.py``) makes 30 tokens a second for each stream; everything else is the real
path: Serve's proxy, the API, the fair router, the counter actor. Two ingresses stand before the same replica, one with
trunks and one without, and take turns. All of it once with Serve's default settings and once with HAProxy and Serve's
throughput settings (``deployments/README.md``).

CPU is user and system time of the processes, from /proc, between two moments at which all streams run, divided by the
tokens that callers got in between. *Two hops* are proxy, ingress and replica. Counter actor and controller are shown
beside: they do not work for each token. The client is a process of its own and not counted, but it needs a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.machine import describe_machine
from benchmarks.stub_engine import TEXT, stubbed

DEFAULT, FAST = "default", "haproxy"
KINDS = ("proxy", "ingress", "replica", "actor", "controller")
HOPS = ("proxy", "ingress", "replica")
WARM_UP_S = 2.0
MARK = TEXT.encode()


@dataclass(frozen=True, slots=True)
class Row:
    """One run. CPU in milliseconds per token, by process; gaps between a stream's events in milliseconds."""

    settings: str
    multiplex: bool
    streams: int
    seconds: float
    tokens: int
    cpu: dict[str, float]
    two_hops: float
    gap_p50: float
    gap_p99: float
    first_p50: float
    """From the request to its first event, over streams that all began at once."""
    load_1_min: float


@dataclass
class Reader:
    """One stream over a bare socket, so that the client costs little."""

    num_tokens: int = 0
    times_s: list[float] = field(default_factory=list)
    """Of writes that brought tokens."""
    first_s: float = math.inf

    async def read(self, url: str, path: str, max_tokens: int) -> None:
        where = urlsplit(url)
        body = json.dumps(
            {"model": "stub", "messages": [{"role": "user", "content": "go"}], "max_tokens": max_tokens, "stream": True}
        ).encode()
        head = (
            f"POST {where.path}{path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer ann\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        began_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            writer.write(head.encode() + body)
            while data := await reader.read(65536):
                if num := data.count(MARK):
                    self.times_s.append(time.perf_counter())
                    self.first_s = min(self.first_s, self.times_s[-1] - began_s)
                    self.num_tokens += num
        finally:
            writer.close()


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of these processes and of those that they started."""
    import psutil

    total = 0.0
    for pid in pids:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def measure(url: str, pids: dict[str, list[int]], num_streams: int, seconds: float) -> dict[str, Any]:
    """One run, as the fields of a row."""
    readers = [Reader() for _ in range(num_streams)]
    tasks = [asyncio.create_task(one.read(url, "/v1/chat/completions", 8000)) for one in readers]
    try:
        async with asyncio.timeout(60):
            while not all(one.num_tokens for one in readers):
                if any(task.done() for task in tasks):
                    raise RuntimeError(f"a stream ended: {next(task for task in tasks if task.done())!r}")
                await asyncio.sleep(0.05)
        await asyncio.sleep(WARM_UP_S)
        before = {kind: cpu_s(some) for kind, some in pids.items()}
        began_s, num_before = time.perf_counter(), sum(one.num_tokens for one in readers)
        await asyncio.sleep(seconds)
        after = {kind: cpu_s(some) for kind, some in pids.items()}
        ended_s, num_tokens = time.perf_counter(), sum(one.num_tokens for one in readers) - num_before
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    cpu = {kind: 1e3 * (after[kind] - before[kind]) / num_tokens for kind in pids}
    gaps = [
        later - earlier
        for one in readers
        for earlier, later in zip(one.times_s, one.times_s[1:], strict=False)
        if began_s <= earlier and later <= ended_s
    ]
    return {
        "seconds": ended_s - began_s,
        "tokens": num_tokens,
        "cpu": cpu,
        "two_hops": sum(cpu[kind] for kind in HOPS),
        "gap_p50": 1e3 * statistics.median(gaps),
        "gap_p99": 1e3 * sorted(gaps)[math.ceil(0.99 * len(gaps)) - 1],
        "first_p50": 1e3 * statistics.median(one.first_s for one in readers),
        "load_1_min": os.getloadavg()[0],
    }


def environment(settings: str, folder: str) -> dict[str, str]:
    """What Serve's processes must find in their environment."""
    if settings == DEFAULT:
        return {}
    from fairserve.local import free_port

    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Another HAProxy of Serve's on this machine has the default files and ports.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


def run_all(settings: str, pairs: int, seconds: float, streams: Sequence[int]) -> list[Row]:
    """All runs with one setting of Serve, in this process, whose environment holds it."""
    from benchmarks.chaos_faults import Processes
    from benchmarks.skew import second_door
    from fairserve.config import FairServeArgs
    from fairserve.local import APP, free_port, local_cluster, running_app

    args = FairServeArgs.model_validate(
        {
            "num_replicas": 1,
            "served_model_name": "stub",
            "max_generation_s": 5.0,
            "engine": {"max_num_seqs": max(256, *streams)},
        }
    )
    plain = args.model_copy(update={"api": args.api.model_copy(update={"multiplex": False})})
    rows = []
    with (
        local_cluster(args, port=free_port(), quiet=True) as cluster,
        stubbed(),
        running_app(args, quiet=True),
        second_door(plain, name="plain"),
    ):
        here, there = Processes(APP, args.counter), Processes("plain", args.counter)
        common = {kind: [one.pid for one in here.of(kind)] for kind in KINDS}
        doors = {
            True: (cluster.url, common),
            False: (f"{cluster.url}/plain", common | {"ingress": [one.pid for one in there.of("ingress")]}),
        }
        for url, _ in doors.values():
            asyncio.run(until_up(url))
        for num_streams in streams:
            for pair in range(pairs):
                for multiplex in (False, True) if pair % 2 else (True, False):
                    row = asyncio.run(measure(*doors[multiplex], num_streams, seconds))
                    rows.append(Row(settings=settings, multiplex=multiplex, streams=num_streams, **row))
                    print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


async def until_up(url: str) -> None:
    """HAProxy learns of a new application a moment later."""
    import httpx

    async with asyncio.timeout(60), httpx.AsyncClient(timeout=30) as http:
        while True:
            try:
                if (await http.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)


def line(row: Row) -> str:
    parts = "  ".join(f"{kind} {row.cpu[kind]:.3f}" for kind in KINDS)
    return (
        f"{row.settings:8} {'trunk' if row.multiplex else 'plain'}  {row.streams:3} streams  "
        f"{row.tokens / row.seconds:6.0f} tokens/s  two hops {row.two_hops:.3f} ms/token  ({parts})  "
        f"gap p50 {row.gap_p50:.1f} p99 {row.gap_p99:.1f} ms  first {row.first_p50:.0f} ms"
    )


def table(rows: Sequence[Row]) -> str:
    """One line per setting: medians over its runs, and the spread of what matters."""
    head = ("settings", "path", "streams", "runs", "two hops, ms/token", *HOPS, "actor", "gap p50", "gap p99")
    lines: list[tuple[str, ...]] = [head]
    for key in dict.fromkeys((row.settings, row.multiplex, row.streams) for row in rows):
        group = [row for row in rows if (row.settings, row.multiplex, row.streams) == key]
        both = [row.two_hops for row in group]
        lines.append(
            (
                key[0],
                "trunk" if key[1] else "plain",
                str(key[2]),
                str(len(group)),
                f"{statistics.median(both):.3f} ({min(both):.3f}-{max(both):.3f})",
                *(f"{statistics.median(row.cpu[kind] for row in group):.3f}" for kind in (*HOPS, "actor")),
                f"{statistics.median(row.gap_p50 for row in group):.1f}",
                f"{statistics.median(row.gap_p99 for row in group):.1f}",
            )
        )
    widths = [max(len(one[i]) for one in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(one, widths, strict=True)) for one in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="streaming", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of every setting (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run (default 10)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32], help="at a time (default 1 32)")
    parser.add_argument("--settings", choices=(DEFAULT, FAST), nargs="+", default=[DEFAULT, FAST])
    parser.add_argument("--quick", action="store_true", help="one pair of 3 s: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/streaming.json"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    pairs, seconds = (1, 3.0) if options.quick else (options.pairs, options.seconds)
    if pairs < 1 or seconds <= 0 or min(options.streams) < 1:
        parser.error("nothing to run: at least one pair, one stream and more than 0 seconds")
    if options.inner:
        rows = run_all(options.settings[0], pairs, seconds, options.streams)
        options.out.write_text(json.dumps([asdict(row) for row in rows]))
        return 0
    rows = []
    for settings in options.settings:  # each in a process of its own: Serve reads its settings when it is imported
        with tempfile.TemporaryDirectory(prefix="fs-st-") as folder:
            found = Path(folder, "rows.json")
            command = [sys.executable, "-m", "benchmarks.streaming", "--inner", "--settings", settings]
            command += ["--pairs", str(pairs), "--seconds", str(seconds), "--out", str(found)]
            command += ["--streams", *map(str, options.streams)]
            subprocess.run(command, env=os.environ | environment(settings, folder), check=True)
            rows += [Row(**row) for row in json.loads(found.read_text())]
    print("CPU in milliseconds per token, medians over runs (two hops: median, least and most)\n")
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
