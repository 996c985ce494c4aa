"""What does one authority buy, on 2, 8 and 64 replicas? Queues of their own behind load balancers, and fairserve.

    python -m benchmarks.ablation [--replicas 2 8 64] [--seeds 5] [--jobs 2]

The same clients everywhere, demand in proportion to the replicas, two ingresses for every eight replicas. Ingress
balanced: every client comes in everywhere. Skewed: nine tenths of a client's requests by one ingress, its own.
``SYSTEMS`` lists what is compared. All of fairserve's are one Dispatcher; of its bound 2 (U + S) the measured value is
shown.

With one authority the gap may grow with the memory of the cluster (U is at most w_q times M, the KV tokens of all
replicas) and with staleness S, and with nothing else. So beside the gap stand the gap over M, the bound over M, and the
part of S in the bound. Without one, the gap between clients that always wait somewhere grows with time, too: compare
``--seconds 60`` with ``--seconds 240``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.scale import table
from fairserve.fairness.bounds import jain
from fairserve.simulate.command import Job, run_jobs
from fairserve.simulate.gaps import PairGaps
from fairserve.simulate.measures import measure
from fairserve.simulate.records import RunRecord
from fairserve.simulate.run import with_policy
from fairserve.simulate.scenario import Scenario
from fairserve.simulate.seeds import Estimate, estimate


@dataclass(frozen=True, slots=True)
class System:
    """``word`` as ``fairserve simulate`` takes it; ``reserve``: ``dispatch.reserve_output_tokens``."""

    word: str
    reserve: int | None = None

    @property
    def is_ours(self) -> bool:
        return "@" not in self.word


SYSTEMS = {
    "vtc @ round_robin": System("vtc@round_robin"),
    "vtc @ least_loaded": System("vtc@least_loaded"),
    "dlpm @ d2lpm": System("dlpm@d2lpm"),
    "central, reserve all": System("vtc"),
    "central": System("vtc", 128),
    "ours": System("vtc+moving_mean", 128),
}
"""The first three: each replica has VTC (or DLPM) of its own, and each request is pushed to one at once: to the next,
to the one with fewest requests, or by D2LPM (arXiv 2501.14312: longest cached prefix, a deficit per client and replica
at each ingress). ``central``: requests wait at the authority, VTC, and at most 128 tokens of an answer are reserved, so
that as many run at a time as on a replica that admits by itself; ``reserve all``: all of max_tokens. ``ours`` foretells
lengths, too: fairserve as it comes."""

INGRESS = ("balanced", "skewed")
OWN_SHARE = 0.9
"""Of a client's requests, those that come in by its own ingress when ingress is skewed."""
KV_TOKENS = 10_000
CLIENTS = ("gold", "silver", "bronze", "longshort", "client-0", "shift", "rare")
GREEDY = ("gold", "silver", "bronze", "longshort")
"""Clients that ask for more than their share in every second: Jain's index is theirs."""
WARM_UP_S = 20.0
GROWTH = 1.1
"""From one size of the cluster to the next: what counts as growth of the mean."""


def clients(num_replicas: int) -> list[dict[str, Any]]:
    """The parts of the workload; rates in requests/s. A replica serves about 1.7 requests/s of 256 and 256 tokens.

    ``longshort`` alternates: one ingress that deals its requests in turn puts all the long ones on the same half of the
    replicas. The prompts of ``client-0`` begin with one of two documents: whoever follows cached prefixes sends them to
    few replicas. ``shift`` comes and goes. ``rare`` sends less than its share, and large requests.
    """
    n = float(num_replicas)
    longshort = {"kind": "even", "client": "longshort", "rate": 0.15 * n}
    shift = {"kind": "on_off", "client": "shift", "weight": 2.0, "on_s": 15.0, "off_s": 15.0, "spacing": "poisson"}
    documents = {"kind": "shared_prefix", "system_tokens": 512, "num_templates": 2, "template_tokens": 512, "turns": 1}
    return [
        {"kind": "poisson", "client": "gold", "weight": 4.0, "rate": 0.9 * n},
        {"kind": "poisson", "client": "silver", "weight": 2.0, "rate": 0.5 * n},
        {"kind": "poisson", "client": "bronze", "rate": 0.4 * n},
        longshort | {"phase": 0.0, "num_input": 1024, "num_output": 256},
        longshort | {"phase": 0.5, "num_input": 64, "num_output": 16},
        documents | {"rates": [0.4 * n], "question_tokens": [16, 64], "answer_tokens": [32, 96]},
        shift | {"rate": 0.6 * n},
        {"kind": "poisson", "client": "rare", "rate": 0.02 * n, "num_input": [256, 2048], "num_output": [256, 512]},
    ]


def scenario(num_replicas: int, ingress: str, duration_s: float) -> Scenario:
    num_ingress = max(2, num_replicas // 4)
    skew = {client: shares(i % num_ingress, num_ingress) for i, client in enumerate(CLIENTS)}
    return Scenario.model_validate(
        {
            "name": f"{num_replicas} replicas, {ingress}",
            "duration_s": duration_s,
            "workload": {"kind": "mix", "parts": clients(num_replicas)},
            "cluster": {
                "replicas": num_replicas,
                "kv_tokens": KV_TOKENS,
                "prefix_cache_tokens": 4_096,
                "num_ingress": num_ingress,
                "ingress_skew": skew if ingress == "skewed" else {},
            },
            # Nobody is refused: systems without a common queue have no common limit either.
            "dispatch": {"max_waiting": 10**6, "max_waiting_per_client": 10**6},
        }
    )


def shares(own: int, num_ingress: int) -> list[float]:
    """``OWN_SHARE`` by the client's own ingress, the rest evenly by the others."""
    others = (1.0 - OWN_SHARE) / (num_ingress - 1)
    return [OWN_SHARE if i == own else others for i in range(num_ingress)]


def job(num_replicas: int, ingress: str, system: System, seed: int, duration_s: float) -> Job:
    base = with_policy(scenario(num_replicas, ingress, duration_s), system.word)
    dispatch = base.dispatch.model_copy(update={"reserve_output_tokens": system.reserve})
    return Job(base.model_copy(update={"dispatch": dispatch}), seed)


# ---------------------------------------------------------------------------------------------------------- figures

Figures = dict[str, float | None]
"""None where a system has none, as the bound of those without an authority."""

HEADINGS = {
    "gap_seen": "gap seen",
    "worst_gap": "worst gap",
    "gap_per_m": "gap / M",
    "bound": "bound",
    "bound_per_m": "bound / M",
    "gap_to_bound": "gap / bound",
    "staleness_share": "S / (U + S)",
    "difference": "diff avg /s",
    "jain": "Jain",
    "tokens_per_s": "tokens/s",
    "ttft_p50": "TTFT p50 s",
    "ttft_p99": "TTFT p99 s",
    "rare_p50": "rare p50 s",
    "rare_p99": "rare p99 s",
    "idle_share": "idle share",
}
"""``gap seen``: see :func:`gap_seen`. ``worst gap``: of clients that wait at the authority, as the bound has it, or,
where there is none, at any replica. ``diff``: VTC's service difference. ``rare``: TTFT of the client of that name.
``idle``: replica time without a step while somebody waited."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one cluster, over its seeds."""

    num_replicas: int
    ingress: str
    system: str
    figures: dict[str, Estimate | None]
    runs: tuple[Figures, ...]
    """By seed."""

    def mean(self, figure: str) -> float | None:
        value = self.figures[figure]
        return None if value is None else value.mean


def figures_of(record: RunRecord) -> Figures:
    """By the names of ``HEADINGS``, and ``cpu_s``."""
    measures = measure(record)
    sum_m = record.num_replicas * KV_TOKENS
    rare = next((one.ttft for one in measures.clients if one.client == "rare"), None)
    has_bound = record.bound > 0
    return {
        "gap_seen": gap_seen(record),
        "worst_gap": record.worst_gap,
        "gap_per_m": record.worst_gap / sum_m,
        "bound": record.bound if has_bound else None,
        "bound_per_m": record.bound / sum_m if has_bound else None,
        "gap_to_bound": record.worst_gap / record.bound if has_bound else None,
        "staleness_share": record.staleness / (record.unit + record.staleness) if has_bound else None,
        "difference": measures.difference.avg if measures.difference else None,
        "jain": jain_of_greedy(record),
        "tokens_per_s": measures.tokens_per_s,
        "ttft_p50": measures.ttft.p50 if measures.ttft else None,
        "ttft_p99": measures.ttft.p99 if measures.ttft else None,
        "rare_p50": rare.p50 if rare else None,
        "rare_p99": rare.p99 if rare else None,
        "idle_share": measures.idle_share,
        "wall_s": record.wall_s,
    }


def jain_of_greedy(record: RunRecord) -> float:
    """Jain's index of service / weight from the end of the warm-up on, among the clients that always ask for more."""
    start_s = min(WARM_UP_S, record.duration_s / 2)
    start = next(service for at_s, service in record.service if at_s >= start_s)
    end = record.service[-1][1]
    return jain([end.get(client, 0.0) - start.get(client, 0.0) for client in GREEDY])


def gap_seen(record: RunRecord) -> float:
    """The worst difference of service / weight between two clients over a time in which each always had a request
    without a first token: the same yardstick for every system, read once in ``sample_s``."""
    waits: dict[str, list[tuple[float, float]]] = {}
    for request in record.requests:
        begin_s = request.arrival.arrival_s
        until_s = next((at_s for at_s in (request.first_token_s, request.finished_s) if at_s is not None), math.inf)
        mine = waits.setdefault(request.arrival.client, [(begin_s, begin_s)])
        if begin_s > mine[-1][1]:
            mine.append((begin_s, until_s))
        else:
            mine[-1] = (mine[-1][0], max(mine[-1][1], until_s))
    gaps = PairGaps(len(waits))
    for (begin_s, before), (end_s, after) in pairwise(record.service):
        for client, intervals in waits.items():
            start_s, until_s = intervals[bisect_right(intervals, (begin_s, math.inf)) - 1]
            always = start_s <= begin_s and until_s >= end_s
            if client in gaps and not always:
                gaps.leave(client)
            elif client not in gaps and always:
                gaps.join(client, before.get(client, 0.0))
        gaps.move(after)
    return gaps.worst


def row_of(num_replicas: int, ingress: str, system: str, records: Sequence[RunRecord]) -> Row:
    runs = tuple(map(figures_of, records))
    return Row(num_replicas, ingress, system, estimates(runs, [*HEADINGS, "wall_s"]), runs)


def estimates(runs: Sequence[Figures], names: Sequence[str]) -> dict[str, Estimate | None]:
    """Of each figure over the runs that have it."""
    return {name: estimate([value for run in runs if (value := run[name]) is not None]) for name in names}


# ------------------------------------------------------------------------------------------------------------ output


def render(rows: Sequence[Row]) -> str:
    """A table for each cluster: figures down, systems across."""
    parts = []
    for num_replicas, ingress in dict.fromkeys((row.num_replicas, row.ingress) for row in rows):
        mine = [row for row in rows if (row.num_replicas, row.ingress) == (num_replicas, ingress)]
        lines = [
            {"figure": heading} | {row.system: cell(row.figures[name]) for row in mine}
            for name, heading in HEADINGS.items()
        ]
        num_seeds = len(mine[0].runs)
        title = f"{num_replicas} replicas, ingress {ingress}, {num_seeds} seeds (mean ± 95 % interval)"
        parts.append(title + "\n" + table(lines, {key: key for key in ("figure", *(row.system for row in mine))}))
    return "\n".join(parts)


def cell(value: Estimate | None) -> str:
    if value is None:
        return "-"
    decimals = 0 if abs(value.mean) >= 1000 else 1 if abs(value.mean) >= 100 else 3
    text = f"{value.mean:,.{decimals}f}"
    return text if not value.half_width else f"{text} ± {value.half_width:,.{decimals}f}"


def claims(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What the design promises, and whether these runs keep it."""
    made = []
    ours = [row for row in rows if SYSTEMS[row.system].is_ours]
    worst = max(ours, key=lambda row: max(run["gap_to_bound"] or 0.0 for run in row.runs), default=None)
    if worst is not None:
        share = max(run["gap_to_bound"] or 0.0 for run in worst.runs)
        made.append((f"no gap of ours exceeds its bound: the worst is {share:.0%} of it ({worst.system})", share <= 1))
    for system, ingress in dict.fromkeys((row.system, row.ingress) for row in ours):
        mine = [row for row in ours if (row.system, row.ingress) == (system, ingress)]
        gaps = [row.mean("gap_per_m") or 0.0 for row in mine]
        shown = ", ".join(f"{gap:.3f} on {row.num_replicas}" for gap, row in zip(gaps, mine, strict=True))
        grows = any(more > GROWTH * less for less, more in pairwise(gaps))
        made.append((f"{system}, {ingress}: gap / M does not grow with replicas: {shown}", not grows))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 64], help="default 2 8 64")
    parser.add_argument("--ingress", nargs="+", choices=INGRESS, default=INGRESS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, per run (default 120)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/ablation.json"))
    options = parser.parse_args(argv)
    settings = list(product(options.replicas, options.ingress, options.systems))
    jobs = [job(n, i, SYSTEMS[s], 1 + k, options.seconds) for n, i, s in settings for k in range(options.seeds)]
    records = run_jobs(jobs, options.jobs)
    rows = [
        row_of(*setting, records[k * options.seeds : (k + 1) * options.seeds]) for k, setting in enumerate(settings)
    ]
    print(render(rows))
    kept = True
    for text, holds in claims(rows):
        print(f"{'kept  ' if holds else 'MISSED'}  {text}")
        kept = kept and holds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe_machine(), "seconds": options.seconds, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
