"""The fairness bounds in many random runs each: ``python -m tests.properties.run_bounds``.

Prints, for every bound, how many runs there were, how many broke it, and the worst ratio of gap to bound, with the seed
that shows it. Exit status 1 when any bound was broken. ``bound_runs`` says what a run is; the same seeds give the same
figures on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import describe_machine
from tests.properties.bound_runs import FAMILIES, Check

CHUNK = 50


@dataclass
class Row:
    """One bound over all its runs. ``seconds``: processor time of the runs, shared by the bounds of one family."""

    bound: str
    family: str
    runs: int = 0
    violations: int = 0
    worst_ratio: float = 0.0
    worst_seed: int = 0
    mean_ratio: float = 0.0
    seconds: float = 0.0

    def add(self, seed: int, ratio: float, holds: bool) -> None:
        self.runs += 1
        self.violations += not holds
        self.mean_ratio += (ratio - self.mean_ratio) / self.runs
        if ratio > self.worst_ratio:
            self.worst_ratio, self.worst_seed = ratio, seed


def run_chunk(family: str, seeds: Sequence[int]) -> tuple[list[tuple[int, str, float, bool]], float]:
    """The worst check of each bound (a hierarchy checks it in several groups) for each seed; and processor seconds."""
    began_s = time.process_time()
    results = []
    for seed in seeds:
        worst: dict[str, Check] = {}
        for check in FAMILIES[family](seed):
            if check.bound not in worst or check.ratio > worst[check.bound].ratio:
                worst[check.bound] = check
        results += [(seed, bound, check.ratio, check.holds) for bound, check in worst.items()]
    return results, time.process_time() - began_s


def run_family(family: str, num_runs: int, pool: Executor | None) -> list[Row]:
    """Without a pool: here."""
    chunks = [range(first, min(first + CHUNK, num_runs)) for first in range(0, num_runs, CHUNK)]
    rows: dict[str, Row] = {}
    seconds = 0.0
    for results, chunk_s in (pool.map if pool else map)(run_chunk, [family] * len(chunks), chunks):
        seconds += chunk_s
        for seed, bound, ratio, holds in results:
            rows.setdefault(bound, Row(bound, family)).add(seed, ratio, holds)
            if not holds:
                print(f"BROKEN  {bound}: ratio {ratio:.3f}, family {family}, seed {seed}", file=sys.stderr, flush=True)
    for row in rows.values():
        row.seconds = round(seconds, 1)
    return list(rows.values())


def table(rows: Sequence[Row]) -> Iterator[str]:
    line = "{:58} {:>7} {:>10} {:>11} {:>10} {:>6} {:>8}"
    yield line.format("bound", "runs", "violations", "worst ratio", "mean ratio", "seed", "cpu s")
    for row in rows:
        worst, mean = f"{row.worst_ratio:.3f}", f"{row.mean_ratio:.3f}"
        yield line.format(row.bound, row.runs, row.violations, worst, mean, row.worst_seed, f"{row.seconds:.0f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_bounds", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000, help="random runs per bound (default 10000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--bound", choices=sorted(FAMILIES), help="only the bounds of this family of runs")
    parser.add_argument("--seed", type=int, help="only this one run of --bound, with every check printed")
    parser.add_argument("--out", type=Path, help="folder for bounds-DATE.json, for example benchmarks/results")
    options = parser.parse_args(argv)
    if options.runs < 1 or options.jobs < 1:
        parser.error("--runs and --jobs must be at least 1")
    if options.seed is not None:
        if options.bound is None:
            parser.error("--seed needs --bound")
        return _show(options.bound, options.seed)
    rows: list[Row] = []
    began_s = time.monotonic()
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else nullcontext() as pool:
        for family in [options.bound] if options.bound else FAMILIES:
            rows += run_family(family, options.runs, pool)
            print(f"{family}: done after {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(rows)))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"bounds-{datetime.now(UTC):%Y-%m-%d}.json"
        data = {"machine": describe_machine(), "runs": options.runs, "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(data, indent=1) + "\n")
    return 1 if any(row.violations for row in rows) else 0


def _show(family: str, seed: int) -> int:
    checks = FAMILIES[family](seed)
    for check in checks:
        verdict = "holds" if check.holds else "BROKEN"
        print(f"{check.bound:58} gap {check.gap:10.2f}  limit {check.limit:10.2f}  ratio {check.ratio:.3f}  {verdict}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
