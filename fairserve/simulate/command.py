"""``fairserve simulate``: scenarios under policies, as a table, and as JSON and a chart where a folder is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from fairserve.errors import ConfigError
from fairserve.simulate.chart import draw
from fairserve.simulate.measures import measure
from fairserve.simulate.records import Arrival, RunRecord
from fairserve.simulate.replay import UNTOLD, Recorded, changes, read_decisions
from fairserve.simulate.report import as_json, render_table, write
from fairserve.simulate.run import run, with_policy
from fairserve.simulate.scenario import BUILTIN, Scenario, read_scenario
from fairserve.simulate.seeds import Summary, summarise


@dataclass(frozen=True, slots=True)
class Job:
    """One run, for another process."""

    scenario: Scenario
    seed: int
    arrivals: tuple[Arrival, ...] | None = None
    noise: float = 0.0
    label: str | None = None

    def run(self) -> RunRecord:
        return run(self.scenario, self.seed, arrivals=self.arrivals, noise=self.noise, label=self.label)


def run_jobs(jobs: Sequence[Job], num_processes: int) -> list[RunRecord]:
    """All of them, in order, ``num_processes`` at a time."""
    if num_processes <= 1 or len(jobs) == 1:
        return [job.run() for job in jobs]
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        return list(pool.map(Job.run, jobs))


def list_scenarios() -> str:
    """The packaged scenarios, one a line."""
    return "\n".join(f"{name:20} {read_scenario(name).about}" for name in BUILTIN)


def simulate_command(
    source: str,
    policies: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    num_seeds: int = 1,
    num_processes: int = 1,
    out: Path | None = None,
    replay: Path | None = None,
) -> str:
    """Run ``source`` (a packaged scenario or a TOML file) under each policy; the text to print.

    With ``replay`` the workload is that of a decision log, and the first row is what really happened.

    Raises:
        ConfigError: anything that is wrong with the scenario, a policy or a file; it is named.
    """
    if num_seeds < 1 or num_processes < 1:
        raise ConfigError(f"at least one seed and one process are needed, not {num_seeds} and {num_processes}")
    base = read_scenario(source, overrides)
    recorded = None if replay is None else read_decisions(replay, base.dispatch.prefix_block_tokens)
    if recorded is not None:
        base = base.model_copy(update={"name": recorded.live.scenario, "duration_s": recorded.live.duration_s})
    scenarios = [with_policy(base, word) for word in policies] or [base]
    arrivals = None if recorded is None else recorded.arrivals
    jobs = [Job(scenario, base.seed + i, arrivals) for scenario in scenarios for i in range(num_seeds)]
    if out is not None:
        _make_folder(out)
    records = run_jobs(jobs, num_processes)
    groups = [records[i : i + num_seeds] for i in range(0, len(records), num_seeds)]
    summaries = [summarise([measure(record) for record in group]) for group in groups]
    if recorded is not None:
        summaries.insert(0, _told(recorded))
    parts = [render_table(summaries).rstrip()]
    if recorded is not None:
        parts += [_what_changed(recorded, group[0]) for group in groups]
    if recorded is not None and recorded.num_unknown:
        num = f"{recorded.num_unknown} of {len(recorded.arrivals)} requests"
        parts.append(f"{num} have no answer of known length in the log: taken to run to max_tokens")
    if out is not None:
        parts.append(_keep(out, base, summaries, [group[0] for group in groups]))
    return "\n\n".join(parts)


def _make_folder(out: Path) -> None:
    """Before the runs, which may take long."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}: {error.strerror}") from error


def _told(recorded: Recorded) -> Summary:
    """What really happened; nothing in place of a figure that the log cannot give."""
    summary = summarise([measure(recorded.live)])
    return replace(summary, figures={key: None if key in UNTOLD else value for key, value in summary.figures.items()})


def _keep(out: Path, base: Scenario, summaries: Sequence[Summary], first_runs: Sequence[RunRecord]) -> str:
    name = base.name or "scenario"
    files = [out / f"{name}.json"]
    write(files[0], as_json(summaries, base.model_dump(mode="json")))
    try:
        draw(first_runs, out / f"{name}.png")
        files.append(out / f"{name}.png")
    except ConfigError as error:
        print(f"no chart: {error}", file=sys.stderr)
    return "\n".join(str(file) for file in files)


def _what_changed(recorded: Recorded, other: RunRecord) -> str:
    """Mean wait per client, as it was and as it would have been."""
    rows = [("client", "requests", "wait live s", f"wait s under {other.policy}")]
    for client, change in changes(recorded.live, other).items():
        waits = f"{change['wait_live_s']:.2f}", f"{change['wait_simulated_s']:.2f}"
        rows.append((client, f"{change['num']:.0f}", *waits))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
