"""Do people who look slow down those who serve? A counter actor with ten dashboards open, against none.

    python -m benchmarks.reads [--quick] [--pairs 3] [--seconds 10] [--out out/reads.json]

In one process and without Ray: a ``CounterService`` with 1,000 clients that wait, and 8 or 64 replicas that report 30
times a second each, a step of 16 requests. Each report has its moment, whether the one before is done or not (open
loop), and was composed beforehand. A dashboard asks for the overview once a second, for the history of eight clients
and for new events, and pickles the answers, as Ray would. Runs without and with them take turns.

*Handling* is CPU time inside ``report()``, *late* the time from a report's moment to its reply, so that what held the
loop up counts, too: only a quiet machine gives it a meaning. *cpu* is all CPU time of the process per report, what
dashboards cost included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import pickle
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.crowd import Crowd, Size
from benchmarks.machine import describe_machine
from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import StepReport

NUM_CLIENTS = 1_000
REPLICAS = (8, 64)
DASHBOARDS = (0, 10)
STEPS_PER_S = 30
RUNNING = 16
"""Requests of a replica, each of which makes a token in every step."""
NUM_SHOWN = 8
"""Clients whose history a dashboard draws."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Times are milliseconds."""

    replicas: int
    dashboards: int
    reports: int
    handling_p50: float
    handling_p99: float
    handling_max: float
    late_p50: float
    late_p99: float
    late_max: float
    cpu: float
    """Of the process, per report."""
    answers: int
    """That dashboards got."""
    answer_p99: float
    """From question to answer."""


class Stage:
    """A service whose dispatcher is a crowd's, which is busy; and all reports of a run."""

    def __init__(self, num_replicas: int, seconds: float, seed: int) -> None:
        self.crowd = Crowd(Size(NUM_CLIENTS, NUM_CLIENTS, num_replicas), seed)
        self.crowd.grant()
        self.crowd.start()
        for running in self.crowd._running:
            del running[RUNNING:]
        args = FairServeArgs.model_validate({"counter": {"store": None}})
        self.began_s = time.perf_counter()
        self.service = CounterService(args.model_dump_json(), clock=self)
        self.service.main.authority.dispatcher = self.crowd.dispatcher
        self.reports = [
            (step / STEPS_PER_S + replica / num_replicas / STEPS_PER_S, self._step(replica))
            for step in range(round(seconds * STEPS_PER_S))
            for replica in range(num_replicas)
        ]

    def now_s(self) -> float:
        """The service's clock."""
        return self.crowd.now_s + time.perf_counter() - self.began_s

    def _step(self, replica: int) -> StepReport:
        served = [(request.client, 0, 1) for request in self.crowd._running[replica]]
        return self.crowd._compose(replica, totals=self.crowd._serve(replica, served))


async def run(stage: Stage, num_replicas: int, num_dashboards: int) -> Row:
    handling, late, answers = list[float](), list[float](), list[float]()
    began_s = stage.began_s = time.perf_counter()
    names = [f"client-{i}" for i in range(NUM_SHOWN)]

    async def dashboard(number: int) -> None:
        await asyncio.sleep(number / 10)
        while True:
            asked_s = time.perf_counter()
            pickle.dumps(await stage.service.overview())
            pickle.dumps(await stage.service.history(names, since_s=time.time() - 600))
            pickle.dumps(await stage.service.events(limit=50))
            answers.append(time.perf_counter() - asked_s)
            await asyncio.sleep(max(0.0, 1.0 - answers[-1]))

    dashboards = [asyncio.create_task(dashboard(i)) for i in range(num_dashboards)]
    cpu_s = time.process_time()
    for at_s, report in stage.reports:
        wait_s = began_s + at_s - time.perf_counter()
        await asyncio.sleep(max(0.0, wait_s))  # also when it is late: others have their turn, as in the actor
        handled_s = time.thread_time()
        await stage.service.report(report)
        handling.append(time.thread_time() - handled_s)
        late.append(time.perf_counter() - began_s - at_s)
    cpu_s = time.process_time() - cpu_s
    stage.service.end()
    for task in dashboards:
        task.cancel()
    await asyncio.gather(*dashboards, return_exceptions=True)
    return Row(
        replicas=num_replicas,
        dashboards=num_dashboards,
        reports=len(handling),
        handling_p50=_ms(handling, 0.5),
        handling_p99=_ms(handling, 0.99),
        handling_max=_ms(handling, 1.0),
        late_p50=_ms(late, 0.5),
        late_p99=_ms(late, 0.99),
        late_max=_ms(late, 1.0),
        cpu=1e3 * cpu_s / len(handling),
        answers=len(answers),
        answer_p99=_ms(answers, 0.99),
    )


def _ms(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of all do not exceed; 0 for none."""
    ordered = sorted(values)
    return 1e3 * ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


FIGURES = ("handling_p50", "handling_p99", "handling_max", "late_p50", "late_p99", "late_max", "cpu", "answer_p99")


def table(rows: Sequence[Row]) -> str:
    """One line per setting: medians over its runs."""
    lines = [("replicas", "dashboards", "runs", *(name.replace("_", " ") for name in FIGURES))]
    for key in dict.fromkeys((row.replicas, row.dashboards) for row in rows):
        group = [row for row in rows if (row.replicas, row.dashboards) == key]
        medians = (statistics.median(getattr(row, name) for row in group) for name in FIGURES)
        lines.append((*map(str, key), str(len(group)), *(f"{value:.2f}" for value in medians)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reads", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="runs of every setting (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run (default 10)")
    parser.add_argument("--quick", action="store_true", help="one pair of 3 s: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/reads.json"))
    options = parser.parse_args(argv)
    pairs, seconds = (1, 3.0) if options.quick else (options.pairs, options.seconds)
    if pairs < 1 or seconds <= 0:
        parser.error("nothing to run: at least one pair and more than 0 seconds")
    rows = []
    for num_replicas in REPLICAS:
        for pair in range(pairs):
            for num_dashboards in DASHBOARDS:
                stage = Stage(num_replicas, seconds, pair)
                gc.collect()
                gc.freeze()  # the reports composed beforehand are none of the actor's garbage
                rows.append(asyncio.run(run(stage, num_replicas, num_dashboards)))
                gc.unfreeze()
    print(f"{NUM_CLIENTS:,} clients wait; milliseconds; medians over runs\n")
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "seconds": seconds, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
