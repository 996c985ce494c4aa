"""`make paper`: the workloads of the VTC paper under every scheduler, on the paper's engine, beside what was published.

The scheduler is fairserve's own dispatcher (fairserve/simulate/paper_engine.py says what is simulated). Exits 1 when a
statement does not hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe_machine
from benchmarks.paper_cases import CASES, SCHEDULERS, Case, Row, twin_of_default
from benchmarks.paper_claims import CaseResult, claims
from benchmarks.table import Claim
from fairserve.assembly import make_dispatcher
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.errors import ConfigError
from fairserve.simulate.measures import Measures, measure
from fairserve.simulate.paper_engine import simulate_paper
from fairserve.simulate.report import render_table, write
from fairserve.simulate.run import oracle
from fairserve.simulate.seeds import Summary, summarise
from fairserve.simulate.service_curves import ServiceCurves
from fairserve.simulate.workloads import WORKLOADS

TRACE = Path(__file__).parent / "data" / "vtc_arena_27clients_600s.csv.gz"
SYNTHETIC = "synthetic"
DISPATCH = DispatchConfig(
    lookahead=0, reserve_output_tokens=None, max_waiting=1_000_000, max_waiting_per_client=1_000_000
)
"""Nobody is turned away because too many wait: the artifact's queue has no limit."""
DIFFERENCES = ("difference.max", "difference.avg", "difference.var", "accumulated_difference")
OTHERS = ("tokens_per_s", "num_refused", "worst_gap", "bound", "jain", "ttft.p50", "ttft.p99")


@dataclass(frozen=True, slots=True)
class Task:
    """One run. ``trace``: of the arena, "" for the synthetic one."""

    case: str
    row: str
    seed: int
    trace: str


@dataclass(frozen=True, slots=True)
class Done:
    measures: Measures
    ratio: float | None
    """Service of client-0 over client-1's in the case's window."""


def run_one(task: Task) -> Done:
    """A workload's arrivals are the published ones, or drawn from the seed where it has chance left; the steps' times
    and the oracle's mistakes are drawn from the seed."""
    case, row = CASES[task.case], SCHEDULERS[task.row]
    parameters = dict(case.parameters)
    if case.workload == "arena" and task.trace:
        parameters["file"] = task.trace
    run = simulate_paper(
        WORKLOADS[case.workload](random.Random(f"{task.seed} workload"), **parameters),
        partial(_dispatcher, row.fairness),
        scenario=case.name,
        seed=task.seed,
        duration_s=case.horizon_s,
        foretell=oracle(row.noise or 0.0, task.seed),
        tracks_outputs=row.fairness.prediction != "none",
    )
    run.policy = row.name
    if not row.has_bound:
        run.bound = 0.0
    ratio = None
    if case.window_s is not None:
        delivered = ServiceCurves(run).delivered(case.window_s)
        ratio = float((delivered[0, 1] - delivered[0, 0]) / (delivered[1, 1] - delivered[1, 0]))
    return Done(measure(run), ratio)


def _dispatcher(fairness: FairnessConfig, capacity: Capacity) -> Dispatcher:
    return make_dispatcher(fairness, DISPATCH, epoch=1, capacity=capacity)


def run_all(cases: Sequence[Case], rows: Sequence[str], seeds: int, jobs: int, trace: str) -> Iterator[CaseResult]:
    """One result per case, as soon as its runs are done; with 1 job, in this process."""
    tasks = [
        Task(case.name, row.name, seed, trace) for case in cases for row in _chosen(case, rows) for seed in range(seeds)
    ]
    if jobs == 1:
        yield from _gather(tasks, map(run_one, tasks), trace)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from _gather(tasks, pool.map(run_one, tasks), trace)


def _gather(tasks: Sequence[Task], done: Iterator[Done], trace: str) -> Iterator[CaseResult]:
    runs: dict[str, list[Done]] = defaultdict(list)
    for num, (task, one) in enumerate(zip(tasks, done, strict=True), 1):
        runs[task.row].append(one)
        if num == len(tasks) or tasks[num].case != task.case:
            case = CASES[task.case]
            summaries = {row: summarise([each.measures for each in ours]) for row, ours in runs.items()}
            ratios = {
                row: sum(each.ratio for each in ours if each.ratio is not None) / len(ours)
                for row, ours in runs.items()
                if case.window_s is not None
            }
            yield CaseResult(case, summaries, ratios, is_synthetic=case.workload == "arena" and not trace)
            runs.clear()


def _chosen(case: Case, rows: Sequence[str]) -> list[Row]:
    """``rpm`` stands for all limits, and ``default`` for its twin."""
    wanted = {twin_of_default() if name == "default" else name for name in rows} | set(rows)
    return [
        row for row in case.schedulers() if not rows or row.name in wanted or row.fairness.policy in wanted & {"rpm"}
    ]


# ------------------------------------------------------------------------------------------------------------ output


def table_text(result: CaseResult) -> str:
    """The table in two halves, for width; then what a reader will wonder about."""
    case, summaries = result.case, list(result.summaries.values())
    lines: list[str] = []
    for columns in (DIFFERENCES, OTHERS):
        published = {row: _some(case.published_of(row), columns) for row in result.summaries}
        shown = {} if result.is_synthetic else {row: each for row, each in published.items() if each}
        title, _, table = render_table(summaries, columns, shown).partition("\n\n")
        lines += ([] if lines else [title, ""]) + [table]
    if result.is_synthetic:
        lines.append("synthetic arena: the trace is not here, so nothing that was published can be set beside it")
    reasons: dict[str, list[str]] = {}
    for row, why in [*case.departs.items(), *case.notes.items()]:
        if row in result.summaries:
            reasons.setdefault(why, []).append(row)
    lines += [f"why {', '.join(rows)}: {why}" for why, rows in reasons.items()]
    return "\n".join(lines)


def _some(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: figures[name] for name in names if name in figures}


def as_json(result: CaseResult, made: Sequence[Claim]) -> dict[str, Any]:
    """Per row: mean and half width over the seeds, each seed's average difference, and what was published."""

    def row_json(row: str, summary: Summary) -> dict[str, Any]:
        averages = [run.difference.avg if run.difference else None for run in summary.runs]
        return {
            "figures": {name: _rounded(summary.figures[name]) for name in (*DIFFERENCES, *OTHERS)},
            "average_difference_by_seed": [None if each is None else round(each, 2) for each in averages],
            "published": {} if result.is_synthetic else result.case.published_of(row),
            "why": result.case.departs.get(row, ""),
        }

    return {
        "workload": result.case.workload,
        "parameters": dict(result.case.parameters),
        "is_synthetic": result.is_synthetic,
        "rows": {row: row_json(row, summary) for row, summary in result.summaries.items()},
        "claims": [asdict(claim) for claim in made],
    }


def _rounded(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    half = None if value.half_width is None else float(f"{value.half_width:.4g}")
    return {"mean": float(f"{value.mean:.6g}"), "half_width": half}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="paper", description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default="", help=f"of {', '.join(CASES)} (default all)")
    parser.add_argument("--policies", default="", help=f"of {', '.join(SCHEDULERS)}; rpm for all limits (default all)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for paper.json (default out)")
    parser.add_argument("--trace", default="", help=f"arena trace, or {SYNTHETIC} (default {TRACE.name} if it is here)")
    options = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        cases = [CASES[name] for name in _names(options.workloads, CASES, "workload")] or list(CASES.values())
        rows = _names(options.policies, [*SCHEDULERS, "rpm"], "policy")
        if min(options.seeds, options.jobs) < 1:
            raise ConfigError(f"--seeds and --jobs must be at least 1, not {options.seeds} and {options.jobs}")
        return report(run_all(cases, rows, options.seeds, options.jobs, _trace(options.trace)), console, options)
    except ConfigError as error:
        console.print(f"paper: {error}", markup=False)
        return 2


def _names(words: str, known: Any, what: str) -> list[str]:
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return names


def _trace(word: str) -> str:
    if word == SYNTHETIC or (not word and not TRACE.exists()):
        return ""
    path = Path(word) if word else TRACE
    if not path.is_file():
        raise ConfigError(f"there is no trace {path}; leave --trace out, or say --trace {SYNTHETIC}")
    return str(path)


def report(results: Iterator[CaseResult], console: Console, options: argparse.Namespace) -> int:
    """Print every table with its claims as it comes, write the data, and say what does not hold."""
    began_s = time.perf_counter()
    twin = twin_of_default()
    if twin is not None:
        console.print(f"fairserve as it comes is row {twin}", markup=False)
    console.print("none of these workloads shares prefixes, so dlpm decides as drr does", markup=False)
    data, missed = {}, []
    for result in results:
        made = claims(result)
        console.print("\n" + table_text(result), markup=False)
        for claim in made:
            console.print(f"{'holds ' if claim.kept else 'MISSED'} {claim.text}", markup=False)
        data[result.case.name] = as_json(result, made)
        missed += [f"{result.case.name}: {claim.text}" for claim in made if not claim.kept]
    settings = {"seeds": options.seeds, "workloads": options.workloads, "policies": options.policies}
    path = options.out / "paper.json"
    write(path, {"machine": describe_machine(), "settings": settings, "cases": data})
    console.print(f"\n{path}, {time.perf_counter() - began_s:.0f} s", markup=False)
    for line in missed:
        console.print(f"MISSED {line}", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
