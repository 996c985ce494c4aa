"""What does one authority buy, on 2, 8 and 64 replicas? Per-replica queues behind load balancers, and fairserve.

    python -m benchmarks.ablation [--replicas 2 8 64] [--seeds 3] [--jobs 2] [--seconds 120]

The same clients, demand in proportion to the replicas, two ingresses for every eight replicas. Ingress balanced: every
client comes in everywhere. Skewed: nine tenths of a client's requests by one ingress, its own. The systems:

- ``vtc @ round_robin``, ``vtc @ least_loaded``: VTC on every replica by itself, each request pushed to one at once;
- ``dlpm @ d2lpm``: D2LPM as published (arXiv 2501.14312), a deficit per client and replica at each ingress, DLPM
  behind;
- ``vtc``: fairserve, where requests wait at the authority. Its measured bound 2 (U + S) is printed.

With one authority the gap may grow with the memory of the cluster (U, at most w_q * the sum of M) and with staleness S,
and with nothing else. So beside the gap stand the gap over the KV tokens of all replicas, the bound over them, and the
part of S in the bound. Without one, the gap of clients that wait at some replica all the time grows with time as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from fairserve.fairness.bounds import jain
from fairserve.simulate.command import Job, run_jobs
from fairserve.simulate.measures import measure
from fairserve.simulate.records import RunRecord
from fairserve.simulate.report import write
from fairserve.simulate.run import with_policy
from fairserve.simulate.scenario import Scenario
from fairserve.simulate.seeds import Estimate, estimate

SYSTEMS = ("vtc@round_robin", "vtc@least_loaded", "dlpm@d2lpm", "vtc")
INGRESS = ("balanced", "skewed")
KV_TOKENS = 10_000
OWN_SHARE = 0.9
"""Of a client's requests, those that come in by its own ingress when ingress is skewed."""
GREEDY = {"gold": 4.0, "silver": 2.0, "bronze": 1.0, "longshort": 1.0}
"""Clients that ask for more than their share in every second, and their weights: Jain's index is theirs."""
WARM_UP_S = 20.0

FIGURES = {
    "worst_gap": "worst gap",
    "gap_per_m": "gap / sum M",
    "bound": "bound",
    "bound_per_m": "bound / sum M",
    "gap_to_bound": "gap / bound",
    "staleness_share": "S / (U + S)",
    "difference": "diff avg /s",
    "jain": "Jain",
    "tokens_per_s": "tokens/s",
    "ttft_p50": "TTFT p50 s",
    "ttft_p99": "TTFT p99 s",
    "rare_ttft_p99": "rare p99 s",
    "idle_share": "idle share",
}
"""Figure -> heading. ``rare``: TTFT of the client that asks for less than its share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one cluster, over its seeds."""

    num_replicas: int
    ingress: str
    system: str
    figures: dict[str, Estimate | None]
    runs: tuple[dict[str, float | None], ...]


def clients(num_replicas: int) -> list[dict[str, Any]]:
    """The parts of the workload; rates in requests/s. One replica serves about 1.5 such requests a second.

    ``longshort`` alternates: where it has an ingress to itself, one that deals its requests in turn puts all the long
    ones on the same half of the replicas. The prompts of ``client-0`` begin with one of two documents: whoever follows
    cached prefixes sends them all to few replicas. ``shift`` comes and goes; ``rare`` sends little, and large.
    """
    n = float(num_replicas)
    long = {"phase": 0.0, "num_input": 1024, "num_output": 256}
    short = {"phase": 0.5, "num_input": 64, "num_output": 16}
    turns = [{"kind": "even", "client": "longshort", "rate": 0.15 * n} | size for size in (long, short)]
    shift = {"weight": 2.0, "rate": 0.6 * n, "on_s": 15.0, "off_s": 15.0, "spacing": "poisson"}
    return [
        {"kind": "poisson", "client": "gold", "weight": 4.0, "rate": 0.9 * n},
        {"kind": "poisson", "client": "silver", "weight": 2.0, "rate": 0.5 * n},
        {"kind": "poisson", "client": "bronze", "rate": 0.4 * n},
        *turns,
        {
            "kind": "shared_prefix",
            "rates": [0.4 * n],
            "system_tokens": 512,
            "num_templates": 2,
            "template_tokens": 512,
            "turns": 1,
            "question_tokens": [16, 64],
            "answer_tokens": [32, 96],
        },
        {"kind": "on_off", "client": "shift"} | shift,
        {"kind": "poisson", "client": "rare", "rate": 0.02 * n, "num_input": [256, 2048], "num_output": [256, 512]},
    ]


CLIENTS = ("gold", "silver", "bronze", "longshort", "client-0", "shift", "rare")


def scenario(num_replicas: int, ingress: str, duration_s: float) -> Scenario:
    num_ingress = max(2, num_replicas // 4)
    skew = {client: _shares(i % num_ingress, num_ingress) for i, client in enumerate(CLIENTS)}
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


def _shares(own: int, num_ingress: int) -> list[float]:
    """``OWN_SHARE`` by the client's own ingress, the rest evenly by the others."""
    others = (1.0 - OWN_SHARE) / (num_ingress - 1)
    return [OWN_SHARE if i == own else others for i in range(num_ingress)]


def figures_of(record: RunRecord, num_replicas: int) -> dict[str, float | None]:
    """By the names of ``FIGURES``. The bound is None where the system has none."""
    measures = measure(record)
    sum_m = num_replicas * KV_TOKENS
    ttft, rare = measures.ttft, measures.of("rare").ttft
    has_bound = record.bound > 0
    return {
        "worst_gap": record.worst_gap,
        "gap_per_m": record.worst_gap / sum_m,
        "bound": record.bound if has_bound else None,
        "bound_per_m": record.bound / sum_m if has_bound else None,
        "gap_to_bound": record.worst_gap / record.bound if has_bound else None,
        "staleness_share": record.staleness / (record.unit + record.staleness) if has_bound else None,
        "difference": measures.difference.avg if measures.difference else None,
        "jain": jain_of_greedy(record),
        "tokens_per_s": measures.tokens_per_s,
        "ttft_p50": ttft.p50 if ttft else None,
        "ttft_p99": ttft.p99 if ttft else None,
        "rare_ttft_p99": rare.p99 if rare else None,
        "idle_share": measures.idle_share,
        "wall_s": record.wall_s,
    }


def jain_of_greedy(record: RunRecord) -> float:
    """Jain's index of service / weight from the end of the warm-up on, among the clients that always ask for more."""
    start = next(service for at_s, service in record.service if at_s >= min(WARM_UP_S, record.duration_s / 2))
    end = record.service[-1][1]
    return jain([end.get(client, 0.0) - start.get(client, 0.0) for client in GREEDY])


def run_all(num_replicas: Sequence[int], num_seeds: int, num_processes: int, duration_s: float) -> list[Row]:
    """Every system on every cluster, with every seed."""
    places = [(size, ingress, system) for size in num_replicas for ingress in INGRESS for system in SYSTEMS]
    jobs = [
        Job(with_policy(scenario(size, ingress, duration_s), system), seed)
        for size, ingress, system in places
        for seed in range(num_seeds)
    ]
    records = run_jobs(jobs, num_processes)
    rows = []
    for i, (size, ingress, system) in enumerate(places):
        runs = tuple(figures_of(record, size) for record in records[i * num_seeds : (i + 1) * num_seeds])
        means = {}
        for figure in FIGURES:
            values = [value for run in runs if (value := run[figure]) is not None]
            means[figure] = estimate(values) if values else None
        rows.append(Row(size, ingress, system, means, runs))
    return rows


def table(rows: Sequence[Row]) -> str:
    cells = [["replicas", "ingress", "system", *FIGURES.values()]]
    for row in rows:
        figures = [_text(row.figures[figure]) for figure in FIGURES]
        cells.append([str(row.num_replicas), row.ingress, row.system, *figures])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _text(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:,.0f}" if abs(value.mean) >= 100 else f"{value.mean:.3g}"


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is stated, and whether it holds."""
    ours = [row for row in rows if row.system == "vtc"]
    ratios = [run["gap_to_bound"] or 0.0 for row in ours for run in row.runs]
    found = [
        (f"worst gap within the bound in all {len(ratios)} runs: at most {max(ratios):.2f} of it", max(ratios) <= 1)
    ]
    per_m = [(row.num_replicas, run["gap_per_m"] or 0.0) for row in ours for run in row.runs]
    least, most = min(size for size, _ in per_m), max(size for size, _ in per_m)
    small = max(gap for size, gap in per_m if size == least)
    large = max(gap for size, gap in per_m if size == most)
    text = f"worst gap / sum of M does not grow: {small:.3g} on {least} replicas, {large:.3g} on {most}"
    found.append((text, large <= small))
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ablation", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated seconds of each run")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args(words)
    if min(*options.replicas, options.seeds, options.jobs) < 1 or options.seconds < 60:
        parser.error("--replicas, --seeds and --jobs must be at least 1, --seconds at least 60")
    rows = run_all(options.replicas, options.seeds, options.jobs, options.seconds)
    print(table(rows))
    found = verdicts(rows)
    for text, holds in found:
        print("holds " if holds else "MISSED", text)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"replicas": options.replicas, "seeds": options.seeds, "seconds": options.seconds}
    results = [
        {"replicas": row.num_replicas, "ingress": row.ingress, "system": row.system, "runs": list(row.runs)}
        for row in rows
    ]
    write(options.out / "ablation.json", {"machine": describe_machine(), "settings": settings, "rows": results})
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main())
