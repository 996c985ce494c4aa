"""What a report and a grant cost the counter actor, and how old its picture of a replica is, on a real Ray.

    python -m benchmarks.control [--quick] [--replicas 8 32 64] [--reports each one] [--windows 3] [--seconds 2]

Simulated replicas (``simulated_node.py``), eight in a process, 16 requests each and 30 steps a second; 1,000 clients
always wait. For each number of replicas:

- *steps*: what runs, runs on. CPU of the actor's process per report, all threads and background work included;
  *handling* is the part inside ``report()``, the rest is mostly Ray's. *Stale* is the time from a step to the moment
  when the actor had counted it. Reports are self-clocked: a replica that waits for its reply sends the steps since then
  as one report.
- *grants*: answers of 32 to 96 tokens. CPU beyond what the reports of *steps* would have cost, per grant: its submit,
  its share of the polls, what the reports say of its start and its end.
- *alone*: nothing else runs. What one request waits for its grant, beside a bare call to the actor and back.

With more than eight replicas all of it twice (``counter.reports_per_node``): *each* replica reports by itself, and
*one* call carries reports of the eight that share a process here, by way of an actor *beside* them, whose own CPU per
report is shown, too.

A machine with few cores does not keep up with many replicas: then there are fewer reports than steps, and what is stale
grows. CPU per report and per grant hold all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.machine import describe_machine
from benchmarks.peers.figures import quantile
from benchmarks.simulated_node import STEPS_PER_S, MeteredService, Node, Sent, over_ray
from fairserve.config import FairServeArgs

NUM_CLIENTS = 1_000
WAYS = ("each", "one")
PER_NODE = 8
"""Replicas in one process."""
WARM_UP_S = 3.0
START_S = 180.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over windows of time, one after another."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


@dataclass(frozen=True, slots=True)
class Window:
    """What the counter actor did meanwhile. ``stale_s``: of every step that it counted."""

    seconds: float
    cpu_s: float
    handled_s: float
    reports: int
    calls: int
    grants: int
    stale_s: list[float]
    node_cpu_s: float = 0.0
    """Of the actors beside the replicas."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of replicas and one way of reports. CPU and times in milliseconds; ``cores`` is CPU of the counter
    actor per second."""

    replicas: int
    way: str
    report_cpu: Spread
    report_handling: Spread
    reports_per_s: Spread
    reports_per_call: Spread
    steps_per_s: int
    cores: Spread
    stale_p50: Spread
    stale_p99: Spread
    node_cpu: Spread
    """Per report, of the actors beside the replicas."""
    grant_cpu: Spread
    grants_per_s: Spread
    round_trip_p50: float
    round_trip_p99: float
    alone_p50: float
    alone_p99: float
    load_1_min: float


def window(before: dict[str, Any], after: dict[str, Any], sent: Sent) -> Window:
    """Between two answers of the meter; ``sent`` since then."""
    stale_s = [taken_s - step_s for replica, seq, taken_s in after["taken"] for step_s in sent.get((replica, seq), ())]
    counts = ("at_s", "cpu_s", "handled_s", "reports", "calls", "grants", "node_cpu_s")
    spent = {name: after[name] - before[name] for name in counts}
    return Window(spent.pop("at_s"), stale_s=stale_s, **spent)


def row(
    replicas: int,
    way: str,
    steps: Sequence[Window],
    grants: Sequence[Window],
    alone: Sequence[tuple[float, float]],
    load: float,
) -> Row:
    """All figures of one setting."""
    report_cpu = Spread.of([1e3 * one.cpu_s / max(1, one.reports) for one in steps])
    grant_cpu = [(1e3 * one.cpu_s - one.reports * report_cpu.median) / max(1, one.grants) for one in grants]
    return Row(
        replicas=replicas,
        way=way,
        report_cpu=report_cpu,
        report_handling=Spread.of([1e3 * one.handled_s / max(1, one.reports) for one in steps]),
        reports_per_s=Spread.of([one.reports / one.seconds for one in steps]),
        reports_per_call=Spread.of([one.reports / max(1, one.calls) for one in steps]),
        steps_per_s=replicas * STEPS_PER_S,
        cores=Spread.of([one.cpu_s / one.seconds for one in steps]),
        stale_p50=Spread.of([1e3 * quantile(one.stale_s, 0.5) for one in steps]),
        stale_p99=Spread.of([1e3 * quantile(one.stale_s, 0.99) for one in steps]),
        node_cpu=Spread.of([1e3 * one.node_cpu_s / max(1, one.reports) for one in steps]),
        grant_cpu=Spread.of(grant_cpu),
        grants_per_s=Spread.of([one.grants / one.seconds for one in grants]),
        round_trip_p50=1e3 * quantile([trip_s for trip_s, _ in alone], 0.5),
        round_trip_p99=1e3 * quantile([trip_s for trip_s, _ in alone], 0.99),
        alone_p50=1e3 * quantile([waited_s for _, waited_s in alone], 0.5),
        alone_p99=1e3 * quantile([waited_s for _, waited_s in alone], 0.99),
        load_1_min=load,
    )


class Stage:
    """A counter actor and the nodes of ``num_replicas`` replicas, in the Ray that this process is connected to."""

    def __init__(self, args: FairServeArgs, num_replicas: int, way: str) -> None:
        import ray

        from fairserve.cluster.counter_actor import start_counter_actor

        # Not pinned: then it is created in this process, where the patch holds.
        named = {"name": f"control-{num_replicas}-{way}", "reports_per_node": way, "pin_to_head": False}
        self._args = args.model_copy(update={"counter": args.counter.model_copy(update=named)})
        with mock.patch("fairserve.cluster.counter_actor.CounterService", MeteredService):
            self.actor = start_counter_actor(self._args)
        make = ray.remote(Node).options(num_cpus=0, max_concurrency=1_000)
        names = [f"node-{i}" for i in range(math.ceil(num_replicas / PER_NODE))]
        sizes = [min(PER_NODE, num_replicas - i * PER_NODE) for i in range(len(names))]
        args_json = self._args.model_dump_json()
        self._nodes = {
            name: make.remote(name, args_json, size, over_ray) for name, size in zip(names, sizes, strict=True)
        }
        for name, node in self._nodes.items():
            others = {other: handle for other, handle in self._nodes.items() if other != name}
            ray.get(node.start.remote(others), timeout=START_S)

    def measure(self, num_windows: int, seconds: float, num_alone: int) -> tuple[list[Window], list[Window], list[Any]]:
        """Windows of *steps* and of *grants*, and the pairs of *alone*."""
        import ray

        clients = [f"client-{i}" for i in range(NUM_CLIENTS)]
        num = len(self._nodes)
        self._all("endless", True)
        for i, node in enumerate(self._nodes.values()):
            ray.get(node.load.remote(clients[i::num]), timeout=START_S)
        steps = self._windows(num_windows, seconds)
        self._all("endless", False)
        grants = self._windows(num_windows, seconds)
        self._all("unload")
        time.sleep(1.0)  # requests that were on their way end, too
        first = next(iter(self._nodes.values()))
        return steps, grants, ray.get(first.alone.remote(num_alone, self.actor), timeout=START_S)

    def close(self) -> None:
        import ray

        from fairserve.local import forget_counters

        for name, node in self._nodes.items():
            ray.kill(node)
            with contextlib.suppress(ValueError):  # there is none
                config = self._args.counter
                ray.kill(ray.get_actor(f"{config.name}-reports-{config.name}-{name}", namespace=config.namespace))
        forget_counters(self._args)

    def _windows(self, num: int, seconds: float) -> list[Window]:
        time.sleep(WARM_UP_S)
        self._all("take_sent")
        windows, before = [], self._meter()
        for _ in range(num):
            time.sleep(seconds)
            after = self._meter()
            sent: Sent = {}
            for some in self._all("take_sent"):
                sent |= some
            windows.append(window(before, after, sent))
            before = after
        return windows

    def _meter(self) -> dict[str, Any]:
        import ray

        answer = dict(ray.get(self.actor.meter.remote(), timeout=START_S))
        return answer | {"node_cpu_s": cpu_s_of("ray::NodeReports")}

    def _all(self, method: str, *values: Any) -> list[Any]:
        """The answers of all nodes."""
        import ray

        return list(ray.get([getattr(node, method).remote(*values) for node in self._nodes.values()], timeout=START_S))


def cpu_s_of(title: str) -> float:
    """User and system time of the processes below this one whose titles begin so."""
    import psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                total += sum(process.cpu_times()[:2])
    return total


COLUMNS = {
    "replicas": "replicas",
    "way": "way",
    "report_cpu": "CPU/report ms",
    "report_handling": "handling ms",
    "reports_per_s": "reports/s",
    "steps_per_s": "of",
    "reports_per_call": "a call",
    "cores": "actor cores",
    "stale_p50": "stale p50 ms",
    "stale_p99": "p99",
    "node_cpu": "beside ms",
    "grant_cpu": "CPU/grant ms",
    "grants_per_s": "grants/s",
}


def table(rows: Sequence[Row]) -> str:
    """A line per number of replicas: median (least-most) of its windows; then what a request alone waits."""
    lines = [list(COLUMNS.values())] + [[str(getattr(one, name)) for name in COLUMNS] for one in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append("")
    text += [
        f"alone among {one.replicas} replicas, {one.way}: granted after {one.alone_p50:.2f} ms "
        f"(p99 {one.alone_p99:.2f}); "
        f"a bare call and back takes {one.round_trip_p50:.2f} ms (p99 {one.round_trip_p99:.2f})"
        for one in rows
    ]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="control", description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 32, 64], help="default 8 32 64")
    parser.add_argument("--reports", choices=WAYS, nargs="+", default=WAYS, help="default each one")
    parser.add_argument("--windows", type=int, default=3, help="of each kind, one after another (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window (default 2)")
    parser.add_argument("--alone", type=int, default=50, help="requests alone in the cluster (default 50)")
    parser.add_argument("--quick", action="store_true", help="16 replicas, one window of 2 s each: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/control.json"))
    options = parser.parse_args(argv)
    if min(options.replicas) < 1 or options.windows < 1 or options.seconds <= 0 or options.alone < 1:
        parser.error("nothing to run: at least one replica, one window of more than 0 seconds and one request alone")
    if options.quick:
        options.replicas, options.windows, options.seconds, options.alone = [16], 1, 2.0, 20
    from fairserve.local import free_port, local_cluster

    args = FairServeArgs()
    rows = []
    with local_cluster(args, port=free_port(), quiet=True):
        for num_replicas in options.replicas:
            for way in options.reports if num_replicas > PER_NODE else options.reports[:1]:
                stage = Stage(args, num_replicas, way)
                try:
                    measured = stage.measure(options.windows, options.seconds, options.alone)
                finally:
                    stage.close()
                rows.append(row(num_replicas, way, *measured, describe_machine()["load_1_min"]))
                print(f"{num_replicas} replicas, {way}: measured", file=sys.stderr, flush=True)
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"windows": options.windows, "seconds": options.seconds, "clients": NUM_CLIENTS, "per_node": PER_NODE}
    data = {"machine": describe_machine(), "settings": settings, "rows": [asdict(one) for one in rows]}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
