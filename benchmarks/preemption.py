"""What ``dispatch.preempt_gap`` buys and costs: a greedy client with long answers against a modest one that bursts.

    python -m benchmarks.preemption [--seeds 3] [--jobs 2] [--out out]

Two simulated replicas (step times of Llama-2-7B on an A10G) with 16 slots each, 180 s. The greedy client asks without
pause for more than the replicas give: ``answers``, short prompts with answers of 384 to 512 tokens, or ``documents``,
prompts of 1,000 to 3,000 and answers of 128 to 256. The modest one sends 40 short requests every 30 s. When a burst
comes, every slot is the greedy client's, and without preemption what runs runs to its end.

**The bound with a gap of G.** Terms as in ``fairness/bounds.py``. Let g be ahead of the level at time t, and t0 the
last moment at which it was ahead by at most max(G, P), P being the largest charge of one grant. There is one: when g
is picked it stands at the level, and P above it afterwards; when it is lifted it comes to the level. After t0 it is
not picked, so its counter rises only by the output of requests that were granted before. While it is ahead by more
than G and the head of the queue has no room, every replica that runs requests of the most served client is granted
one request over the top. That request arrives during the next step, and starts in the one after it, in place of (at
least) the youngest request that is more than G ahead; the replica says so when that step ends, and gets the next. So
the i-th request to give way on a replica makes at most 2 i tokens after t0 (one of them in the step that took g over
the gap), and n of them n (n + 1). With

    R = w_q * sum over replicas of n (n + 1),  n the requests that one replica runs at the same time,

no counter is more than X = min(U, max(G, P) + R) + D above the level, and the bounds of ``fairness/bounds.py`` hold
with X in place of U + D: two clients that wait throughout an interval differ by at most 2 (X + S).

Assumed beyond what is assumed there: a report after every step, delays well below a step's length, and that whatever is
more than G ahead on a replica holds room enough for the head (a head with a long prompt may find too little, and then
nobody gives way: R is what U says). U itself is none the smaller for a G: what was preempted is still owed.

**What it is worth.** The gap itself obeys G closely: without prediction the worst one is about G + S, and so is no
longer a matter of how long answers are or how many slots there are. That is what it buys: a bound that the operator
chooses. What a user notices is less: a burst waits mostly for its own turn, so the first requests of it come sooner and
the last ones hardly. It costs the recomputed tokens, which is little where prompts are short and much where they are
long. Reserved but unused KV room is given away before anybody has to stop. With prediction it buys next to nothing: a
client that comes back is lifted to counters in which its rivals have paid for the rest of their answers already, so
nobody is ahead of anybody, and that paid but unserved output is part of S instead.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from fairserve.assembly import make_cost, make_local_book, policy_of
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.limits import DispatchLimits
from fairserve.fairness.prediction import make_predictor
from fairserve.simulate.cluster import SimCluster
from fairserve.simulate.measures import measure
from fairserve.simulate.records import Arrival
from fairserve.simulate.setup import ClusterSetup, ReplicaSetup
from fairserve.simulate.step_time import PRESETS
from fairserve.simulate.workloads_basic import Length, burst, merge, poisson

DURATION_S = 180.0
NUM_REPLICAS, NUM_SLOTS = 2, 16
GAPS = (None, 4000.0, 2000.0, 1000.0, 500.0)
GREEDY, MODEST = "greedy", "modest"
GREEDY_ASKS: dict[str, tuple[float, Length, Length]] = {
    "answers": (3.0, (32, 96), (384, 512)),
    "documents": (2.0, (1000, 3000), (128, 256)),
}
"""Requests per second, tokens in and out."""


def arrivals(workload: str, seed: int) -> list[Arrival]:
    rate, num_input, num_output = GREEDY_ASKS[workload]
    rng = random.Random(f"{seed} {GREEDY}")
    greedy = poisson(rng, client=GREEDY, rate=rate, num_input=num_input, num_output=num_output, end_s=DURATION_S)
    rng = random.Random(f"{seed} {MODEST}")
    times = (20 + 30 * k + rng.uniform(-3, 3) for k in range(5))
    bursts = (
        burst(rng, client=MODEST, num_requests=40, at_s=at_s, num_input=(128, 384), num_output=(32, 96))
        for at_s in list(times)
    )
    return merge(greedy, *bursts)


class Watched(Dispatcher):
    """Notes how far ahead of the level the counter of any client with something granted has been while somebody waits,
    and the largest charge of a grant."""

    most_ahead = 0.0
    most_charged = 0.0

    def dispatch(self, now_s: float) -> None:
        super().dispatch(now_s)
        if len(self.queue):
            level = self.queue.level()
            counters = (self.queue.counter(client) for client in self.leases.clients())
            self.most_ahead = max(self.most_ahead, max(counters, default=level) - level)
        self.most_charged = max([self.most_charged, *(lease.held for lease in self.leases.values())])


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Amounts are service; tokens/s are input and output."""

    workload: str
    prediction: str
    gap: float | None
    seed: int
    worst_gap: float
    bound: float
    """2 (U + S), as the dispatcher reports it."""
    most_ahead: float
    """Of the level."""
    most_ahead_allowed: float
    """X, from this run's U, D and P."""
    bound_with_gap: float
    """2 (X + S)."""
    unit: float
    staleness: float
    ttft_p50_s: float
    ttft_p99_s: float
    """Of the modest client."""
    greedy_latency_p99_s: float
    tokens_per_s: float
    num_preempted: int
    num_recomputed: int

    @property
    def holds(self) -> bool:
        return self.worst_gap <= self.bound_with_gap and self.most_ahead <= self.most_ahead_allowed


@dataclass(frozen=True, slots=True)
class Job:
    workload: str
    prediction: str
    gap: float | None
    seed: int

    def run(self) -> Row:
        fairness = FairnessConfig.model_validate({"prediction": self.prediction})
        limits = DispatchLimits(**DispatchConfig(preempt_gap=self.gap).model_dump())
        cost = make_cost(fairness.cost)
        predictor = make_predictor(self.prediction)
        replica = ReplicaSetup(PRESETS["a10g-llama2-7b"], max_num_seqs=NUM_SLOTS)
        setup = ClusterSetup(
            replicas=(replica,) * NUM_REPLICAS,
            make_policy=lambda: policy_of(fairness),
            make_dispatcher=lambda epoch: Watched(policy_of(fairness), cost, limits, epoch=epoch, predictor=predictor),
            make_book=lambda: make_local_book(fairness),
            seed=self.seed,
            duration_s=DURATION_S,
            jitter=0.05,
        )
        cluster = SimCluster(setup, arrivals(self.workload, self.seed))
        cluster.run()
        assert cluster.authority is not None and isinstance(cluster.authority.dispatcher, Watched)
        return self._row(cluster, cluster.authority.dispatcher)

    def _row(self, cluster: SimCluster, watched: Watched) -> Row:
        record = cluster.record()
        figures = measure(record)
        modest, greedy = figures.of(MODEST), figures.of(GREEDY)
        assert modest.ttft is not None and greedy.latency is not None
        allowed = record.unit
        if self.gap is not None:
            late = cluster.setup.cost.service(0, NUM_REPLICAS * NUM_SLOTS * (NUM_SLOTS + 1))
            allowed = min(record.unit, max(self.gap, watched.most_charged) + late)
        return Row(
            **asdict(self),
            worst_gap=record.worst_gap,
            bound=record.bound,
            most_ahead=watched.most_ahead,
            most_ahead_allowed=allowed + watched.bounds.returned,
            bound_with_gap=2 * (allowed + record.staleness),
            unit=record.unit,
            staleness=record.staleness,
            ttft_p50_s=modest.ttft.p50,
            ttft_p99_s=modest.ttft.p99,
            greedy_latency_p99_s=greedy.latency.p99,
            tokens_per_s=figures.tokens_per_s,
            num_preempted=record.num_preempted,
            num_recomputed=record.num_recomputed,
        )


COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "worst gap": lambda rows: f"{max(row.worst_gap for row in rows):,.0f}",
    "2 (X + S)": lambda rows: f"{max(row.bound_with_gap for row in rows):,.0f}",
    "2 (U + S)": lambda rows: f"{max(row.bound for row in rows):,.0f}",
    "ahead": lambda rows: f"{max(row.most_ahead for row in rows):,.0f}",
    "X": lambda rows: f"{max(row.most_ahead_allowed for row in rows):,.0f}",
    "S": lambda rows: f"{max(row.staleness for row in rows):,.0f}",
    "TTFT p50 s": lambda rows: f"{_mean(rows, 'ttft_p50_s'):.2f}",
    "TTFT p99 s": lambda rows: f"{_mean(rows, 'ttft_p99_s'):.2f}",
    "greedy p99 s": lambda rows: f"{_mean(rows, 'greedy_latency_p99_s'):.1f}",
    "tokens/s": lambda rows: f"{_mean(rows, 'tokens_per_s'):,.1f}",
    "preempted": lambda rows: f"{_mean(rows, 'num_preempted'):,.0f}",
    "recomputed": lambda rows: f"{_mean(rows, 'num_recomputed'):,.0f}",
}
"""Amounts: the largest of the seeds. The others: their mean."""


def _mean(rows: Sequence[Row], figure: str) -> float:
    return statistics.fmean(getattr(row, figure) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """One line per workload, prediction and gap."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.prediction, "null" if row.gap is None else f"{row.gap:,.0f}"), []).append(
            row
        )
    lines = [("greedy asks", "prediction", "preempt_gap", *COLUMNS)]
    for key, group in groups.items():
        lines.append((*key, *[text(group) for text in COLUMNS.values()]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="preemption", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything, each with another seed (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for preemption.json (default out)")
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("nothing to run: at least one seed and one job")
    jobs = [
        Job(workload, prediction, gap, seed)
        for workload in GREEDY_ASKS
        for prediction in ("none", "moving_mean")
        for gap in GAPS
        for seed in range(1, options.seeds + 1)
    ]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        rows = list(pool.map(Job.run, jobs))
    print(table(rows))
    broken = [row for row in rows if not row.holds]
    print(f"\nthe bound 2 (X + S) and X itself held in {len(rows) - len(broken)} of {len(rows)} runs")
    options.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
    (options.out / "preemption.json").write_text(json.dumps(data, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
