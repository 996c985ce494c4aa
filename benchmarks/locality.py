"""What do cached prefixes buy, and what do they cost in fairness? VTC, DLPM, D2LPM and a router that looks at prefixes
alone, simulated.

    python -m benchmarks.locality [--replicas 4 8] [--seeds 5] [--workloads tree mooncake] [--jobs 2]

Every replica has a prefix cache and continuous batching; ``SYSTEMS`` differ in what is granted next and where. Plain
VTC looks at service and room only. Demand is three times what is served and more, so that every client always waits.
Cached input costs nothing (``fairness.cost.cached_fraction`` 0, the live default): gaps, bound and Jain's index are of
computed service. tokens/s count what clients see: input, cached or not, and output.

- ``tree``: eight clients with binary trees of thought, 15 calls each. Every prompt is the client's instructions (256
  tokens), a problem (1,024 to 2,048) and all thoughts (16 to 48 each) on the way to it; two clients ask for twice as
  much as the others. Wider trees leave plain VTC more hits, and less to gain.
- ``mooncake``: sessions of two and more calls of Mooncake's conversation trace (FAST'25; ``data/README.md``), lengths
  divided by 8 so that they fit a replica, arrivals compressed, whole sessions given to six clients by chance.

Exit 1 when a promise is missed: at least 1.5 times plain VTC's tokens/s with Jain's index of at least 0.95 on the tree,
and no gap above its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.ablation import cell, estimates
from benchmarks.machine import describe_machine
from benchmarks.scale import table
from fairserve.fairness.bounds import jain
from fairserve.fairness.cost import CostFunction, WeightedTokens
from fairserve.simulate.command import Job, run_jobs
from fairserve.simulate.measures import measure
from fairserve.simulate.records import RunRecord
from fairserve.simulate.run import with_policy
from fairserve.simulate.scenario import Scenario
from fairserve.simulate.seeds import Estimate
from fairserve.simulate.service_curves import ServiceCurves

TRACE = Path(__file__).parent / "data" / "mooncake_sessions.jsonl.gz"
SYSTEMS = ("vtc", "dlpm", "d2lpm", "fcfs @ longest_prefix")
"""As ``fairserve simulate`` takes them. In the last each request goes at once to the replica that knows most of its
prompt, and is served in the order of arrival."""
PLAIN = "vtc"
MIN_GAIN, MIN_JAIN = 1.5, 0.95
PROMISED = "tree"
WARM_UP_S = 20.0
REPLICA = {"kv_tokens": 40_000, "max_num_seqs": 32, "prefix_cache_tokens": 20_000}
"""60,000 tokens of KV cache: what running requests may hold, and what is left to remember prompts by."""
QUANTUM = 4_000.0
"""About two prompts of the tree of which nothing is cached."""


def tree(num_replicas: int) -> dict[str, Any]:
    rate = 0.08 * num_replicas
    return {
        "kind": "tree_of_thought",
        "rates": [2 * rate] * 2 + [rate] * 6,
        "system_tokens": 256,
        "problem_tokens": [1024, 2048],
        "branching": 2,
        "depth": 4,
        "thought_tokens": [16, 48],
        "level_s": 5.0,
    }


def mooncake(num_replicas: int) -> dict[str, Any]:
    return {
        "kind": "trace",
        "file": str(TRACE),
        "format": "mooncake",
        "length_divisor": 8,
        "max_tokens": 6_000,
        "time_scale": 0.2 / num_replicas,
        "tenants": {"gold": 2.0, "silver": 2.0, "ann": 1.0, "bob": 1.0, "cem": 1.0, "dan": 1.0},
    }


WORKLOADS = {"tree": tree, "mooncake": mooncake}


def scenario(workload: str, num_replicas: int, duration_s: float) -> Scenario:
    return Scenario.model_validate(
        {
            "name": workload,
            "duration_s": duration_s,
            "workload": WORKLOADS[workload](num_replicas),
            "cluster": REPLICA | {"replicas": num_replicas},
            "fairness": {"quantum": QUANTUM, "replica_quantum": 4 * QUANTUM},
            "dispatch": {"max_waiting": 10**6, "max_waiting_per_client": 10**6},
        }
    )


# ---------------------------------------------------------------------------------------------------------- figures

Figures = dict[str, float | None]
HEADINGS = {
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "hit_rate": "hit rate",
    "jain": "Jain",
    "jain_tokens": "Jain, all tokens",
    "num_backlogged": "backlogged",
    "worst_gap": "worst gap",
    "bound": "bound",
    "ttft_p50": "TTFT p50 s",
    "ttft_p99": "TTFT p99 s",
    "utilisation": "busy",
}
"""``hit rate``: of the input tokens, those found cached. ``Jain``: of what clients got after ``WARM_UP_S``; ``all
tokens``: cached input counted like computed. ``backlogged``: clients of whom a request waited at the authority in 90 %
of the time. ``TTFT``: the age at the end where no token came. ``busy``: replica time spent in steps."""


@dataclass(frozen=True, slots=True)
class Row:
    workload: str
    num_replicas: int
    system: str
    figures: dict[str, Estimate | None]
    runs: tuple[Figures, ...]
    """By seed."""

    def mean(self, figure: str) -> float:
        value = self.figures[figure]
        return 0.0 if value is None else value.mean


def figures_of(record: RunRecord) -> Figures:
    seen = measure(record, WeightedTokens(cached_fraction=1.0))
    return {
        "tokens_per_s": seen.tokens_per_s,
        "requests_per_s": seen.num_finished / record.duration_s,
        "hit_rate": seen.cached_share,
        "jain": jain_of_all(record, WeightedTokens(cached_fraction=0.0)),
        "jain_tokens": jain_of_all(record, WeightedTokens(cached_fraction=1.0)),
        "num_backlogged": float(seen.num_backlogged),
        "worst_gap": record.worst_gap,
        "bound": record.bound if record.bound > 0 else None,
        "ttft_p50": seen.ttft.p50 if seen.ttft else None,
        "ttft_p99": seen.ttft.p99 if seen.ttft else None,
        "utilisation": seen.utilisation,
        "wall_s": record.wall_s,
    }


def jain_of_all(record: RunRecord, cost: CostFunction) -> float:
    """Jain's index of service from the end of the warm-up on, by this cost, among all clients: each asks for more than
    its share all the time."""
    curves = ServiceCurves(record, cost)
    received = curves.delivered([min(WARM_UP_S, record.duration_s / 2), record.duration_s])
    return jain([float(after - before) for before, after in received])


def row_of(workload: str, num_replicas: int, system: str, records: Sequence[RunRecord]) -> Row:
    runs = tuple(map(figures_of, records))
    return Row(workload, num_replicas, system, estimates(runs, [*HEADINGS, "wall_s"]), runs)


def render(rows: Sequence[Row]) -> str:
    """A table for each workload and cluster: figures down, systems across."""
    parts = []
    for workload, num in dict.fromkeys((row.workload, row.num_replicas) for row in rows):
        mine = [row for row in rows if (row.workload, row.num_replicas) == (workload, num)]
        lines = [
            {"figure": heading} | {row.system: cell(row.figures[name]) for row in mine}
            for name, heading in HEADINGS.items()
        ]
        title = f"{workload}, {num} replicas, {len(mine[0].runs)} seeds (mean ± 95 % interval)"
        parts.append(title + "\n" + table(lines, {key: key for key in ("figure", *(row.system for row in mine))}))
    return "\n".join(parts)


def claims(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What is promised, and whether these runs keep it; a gain that is not promised is told all the same."""
    made = []
    for row in rows:
        plain = next(
            (
                other
                for other in rows
                if (other.workload, other.num_replicas, other.system) == (row.workload, row.num_replicas, PLAIN)
            ),
            None,
        )
        where = f"{row.workload}, {row.num_replicas} replicas: {row.system}"
        if plain is not None and row.system in ("dlpm", "d2lpm"):
            gain, fair = row.mean("tokens_per_s") / plain.mean("tokens_per_s"), row.mean("jain")
            holds = row.workload != PROMISED or (gain >= MIN_GAIN and fair >= MIN_JAIN)
            made.append((f"{where} {gain:.2f} times plain VTC's tokens/s with Jain {fair:.3f}", holds))
        shares = [gap / bound for run in row.runs if (bound := run["bound"]) and (gap := run["worst_gap"]) is not None]
        if shares:
            made.append((f"{where}: worst gap {max(shares):.0%} of its bound", max(shares) <= 1))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="locality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8], help="default 4 8")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help=f"default {', '.join(SYSTEMS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, per run (default 120)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=NUMBER", help="of [fairness], as quantum=4000")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/locality.json"))
    options = parser.parse_args(argv)
    changes = {key: float(number) for key, _, number in (word.partition("=") for word in options.set)}
    settings = list(product(options.workloads, options.replicas, options.systems))
    jobs = [
        Job(changed(scenario(workload, num, options.seconds), system, changes), 1 + seed)
        for workload, num, system in settings
        for seed in range(options.seeds)
    ]
    records = run_jobs(jobs, options.jobs)
    rows = [row_of(*of, records[k * options.seeds : (k + 1) * options.seeds]) for k, of in enumerate(settings)]
    print(render(rows))
    kept = True
    for text, holds in claims(rows):
        print(f"{'kept  ' if holds else 'MISSED'}  {text}")
        kept = kept and holds
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": describe_machine(), "seconds": options.seconds, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if kept else 1


def changed(base: Scenario, system: str, changes: dict[str, float]) -> Scenario:
    one = with_policy(base, system)
    fairness = one.fairness.model_dump() | changes
    return one.model_copy(update={"fairness": type(one.fairness).model_validate(fairness)})


if __name__ == "__main__":
    sys.exit(main())
