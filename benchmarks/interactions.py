"""Rate limits against throttled interactions: who is turned away, and what was computed for nothing (FairServe).

    python -m benchmarks.interactions [--seeds 5] [--jobs 2] [--limits 20,50,100] [--replicas 4,6,8] [--out out]

The packaged scenario ``fairserve``: 3,000 calls in 72 s with FairServe's published profile (arXiv 2411.15997; one of
some 400 users sends a fifth of them), on simulated replicas. ``load`` is the replica time that all calls take under
FCFS over the replica time of the 72 s. Each run goes on until all calls are over.

**rpm(n)**: FCFS behind n requests a minute per user, whatever the load and wherever in an interaction. **OIT n**: the
same limit, enforced under overload alone and on first calls alone (``fairness.throttle``), under wsc with predicted
lengths or under vtc: when the call is picked and fits nowhere, as published, or, ``at arrival``, as soon as it comes. A
caller whose call is refused gives its interaction up: it sends no further call of it, and what was computed for the
others is wasted. ``40 may wait``: the same with queues of 40 calls per user; a full queue takes no call at all, so it
refuses in the middle of interactions too, and that is counted like any other refusal.

**Claims**, at every load and limit: OIT under wsc wastes no token, and it ends at most a tenth of the interactions that
RPM ends. The paper's stored results say 71 against 1,502 at 50 a minute, and 0 wasted prompt tokens against 31,315. An
interaction has ended if one of its calls was refused: *throttled* before anything was done for it, *cut short* later.
Exits 1 when a claim does not hold.

The second claim is one about load and time, not about limits. At arrival, whoever is past its rate begins nothing new
while overload lasts, as under RPM. At the pick it is refused only what would be its turn. Near a load of 1 it is hardly
ever refused anything. Nor is it in the longest queues, but for a poor reason: the calls come in 72 s, and most of the
busiest user's first calls are picked when the 60 s that are counted are over. (On 4 replicas, at 50 a minute, 0 to 13
interactions were refused; counting without end, 37 to 41: three seeds.) In between the tenth is out of reach.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.table import Claim
from fairserve.errors import ConfigError
from fairserve.simulate.delays import delays, first_token
from fairserve.simulate.measures import Measures, measure
from fairserve.simulate.records import RequestRecord, RunRecord
from fairserve.simulate.report import render_table, write
from fairserve.simulate.run import run, with_policy
from fairserve.simulate.scenario import Scenario, read_scenario
from fairserve.simulate.seeds import Summary, estimate, summarise
from fairserve.simulate.service_curves import NOT_SERVED

SCENARIO = "fairserve"
BUSY_S = 72.0
"""In which all calls come; differences of service and Jain's index are taken over it."""
UNTIL_S = 1_800.0
"""By when the queue has drained, whatever the load."""
FEWER = 10.0
"""RPM is to end so many times more interactions."""
SHORT_QUEUE = 40
OIT_POLICIES = ("wsc+moving_mean", "vtc")
TURNED_AWAY = ("num_throttled_interactions", "num_cut_interactions", "num_refused", "calls not sent", "queue full")
WASTED = ("wasted prompt", "wasted output")
SPEED = ("tokens_per_s", "ttft.p50", "ttft.p99", "others TTFT p50 s", "others TTFT p99 s", "difference.avg", "jain")
NOTES = (
    "calls not sent: later calls of interactions that were given up; queue full: calls refused because too many waited",
    "others: all users but the busiest; diff and jain: in the 72 s, jain only among users that always wait",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What decides. ``limit``: requests a minute of one user."""

    name: str
    policy: str
    limit: int | None = None
    is_throttled: bool = False
    """The limit is OIT's; else it is RPM's."""
    at: str = "pick"
    """When OIT looks."""
    max_waiting: int | None = None
    """Of one user; None: the default."""

    def scenario(self, num_replicas: int, num_requests: int | None) -> Scenario:
        words = [f"cluster.replicas={num_replicas}", f"duration_s={UNTIL_S}", f"workload.duration_s={BUSY_S}"]
        words += [f"fairness.throttle.client_limit={self.limit if self.is_throttled else 'null'}"]
        words += [f"fairness.throttle.at={self.at}"]
        words += [] if num_requests is None else [f"workload.num_requests={num_requests}"]
        words += [] if self.max_waiting is None else [f"dispatch.max_waiting_per_client={self.max_waiting}"]
        return with_policy(read_scenario(SCENARIO, words), self.policy)


def rows_for(limits: Sequence[int]) -> list[Row]:
    """No limit at all first; then by limit."""
    rows = [Row("fcfs", "fcfs"), Row("vtc", "vtc")]
    for limit in limits:
        rows.append(Row(rpm(limit), rpm(limit), limit))
        rows += [Row(oit(limit, policy), policy, limit, is_throttled=True) for policy in OIT_POLICIES]
        early = Row(oit(limit, at="arrival"), OIT_POLICIES[0], limit, is_throttled=True, at="arrival")
        short = f"{oit(limit)}, {SHORT_QUEUE} may wait"
        rows += [early, Row(short, OIT_POLICIES[0], limit, is_throttled=True, max_waiting=SHORT_QUEUE)]
    return rows


def rpm(limit: int) -> str:
    return f"rpm({limit})"


def oit(limit: int, policy: str = OIT_POLICIES[0], at: str = "pick") -> str:
    return f"{policy}, OIT {limit}" + (f" at {at}" if at != "pick" else "")


# -------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Task:
    row: Row
    num_replicas: int
    seed: int
    num_requests: int | None = None

    def run(self) -> Done:
        record = run(self.row.scenario(self.num_replicas, self.num_requests), self.seed, label=self.row.name)
        return Done(measure(replace(record, duration_s=BUSY_S)), extras(record))


@dataclass(frozen=True, slots=True)
class Done:
    measures: Measures
    extras: Mapping[str, float]


def extras(record: RunRecord) -> dict[str, float]:
    """Figures that are of interest here alone, by their headings."""
    prompt, output = wasted(record.requests)
    others = [one for one in record.requests if one.arrival.client != busiest(record.requests)]
    ttft = delays((one for one in others if one.outcome not in NOT_SERVED), first_token, record.duration_s)
    full = sum(one.reason in ("client_queue_full", "cluster_queue_full") for one in record.requests)
    return {
        "wasted prompt": prompt,
        "wasted output": output,
        "calls not sent": sum(one.outcome == "cut" for one in record.requests),
        "queue full": full,
        "others TTFT p50 s": ttft.p50 if ttft else 0.0,
        "others TTFT p99 s": ttft.p99 if ttft else 0.0,
        "load": record.busy_s / (record.num_replicas * BUSY_S),
    }


def wasted(requests: Sequence[RequestRecord]) -> tuple[int, int]:
    """Prompt and output tokens computed for interactions of which some call was refused, before it or after."""
    ended = {one.arrival.interaction for one in requests if one.outcome == "refused"} - {""}
    lost = [one for one in requests if one.arrival.interaction in ended]
    return sum(one.num_input for one in lost), sum(one.num_output for one in lost)


def busiest(requests: Sequence[RequestRecord]) -> str:
    """The user that sends most."""
    num: dict[str, int] = defaultdict(int)
    for one in requests:
        num[one.arrival.client] += 1
    return max(sorted(num), key=num.__getitem__)


def summary_of(runs: Sequence[Done]) -> Summary:
    """Of one row at one load, the extras among its figures."""
    summary = summarise([one.measures for one in runs])
    extra = {name: estimate([one.extras[name] for one in runs]) for name in runs[0].extras}
    return replace(summary, figures={**summary.figures, **extra})


def run_all(tasks: Sequence[Task], num_processes: int) -> dict[int, dict[str, Summary]]:
    """By number of replicas and name of the row, in the order of the tasks."""
    if num_processes == 1:
        done = [task.run() for task in tasks]
    else:
        with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
            done = list(pool.map(Task.run, tasks))
    groups: dict[int, dict[str, list[Done]]] = defaultdict(lambda: defaultdict(list))
    for task, one in zip(tasks, done, strict=True):
        groups[task.num_replicas][task.row.name].append(one)
    return {size: {name: summary_of(runs) for name, runs in rows.items()} for size, rows in groups.items()}


# ------------------------------------------------------------------------------------------------------------ output


def claims(summaries: Mapping[str, Summary], limits: Sequence[int]) -> list[Claim]:
    """What is claimed of one load, as far as these runs can tell."""
    made = []
    for limit in limits:
        ours, theirs = summaries[oit(limit)], summaries[rpm(limit)]
        lost, lost_by_rpm = (_total(one, *WASTED) for one in (ours, theirs))
        text = f"{limit} a minute: {lost:,.0f} tokens wasted under OIT, {lost_by_rpm:,.0f} under RPM (claimed: 0)"
        made.append(Claim(text, kept=lost == 0))
        num, num_by_rpm = (_total(one, *TURNED_AWAY[:2]) for one in (ours, theirs))
        times = f"{num_by_rpm / num:.1f} times fewer" if num else "none at all"
        text = f"{limit} a minute: {num:,.1f} interactions ended under OIT, {num_by_rpm:,.1f} under RPM: {times}"
        made.append(Claim(f"{text} (claimed: {FEWER:g} times)", kept=num_by_rpm >= FEWER * num))
    return made


def _total(summary: Summary, *figures: str) -> float:
    """Sum of the means over the seeds. None of these is negative: a 0 is a 0 in every seed."""
    return sum(summary.mean(figure) or 0.0 for figure in figures)


def load_text(num_replicas: int, summaries: Mapping[str, Summary]) -> str:
    """Whom it hit, then what it cost: one table would be too wide."""
    shown = list(summaries.values())
    load = summaries["fcfs"].mean("load") or 0.0
    parts = [f"== {num_replicas} replicas, load {load:.2f}"]
    parts += [render_table(shown, columns).rstrip() for columns in ((*TURNED_AWAY, *WASTED), SPEED)]
    if open_rows := [name for name, one in summaries.items() if one.mean("num_unfinished")]:
        parts.append(f"not over after {UNTIL_S:g} s, so too little is counted: {', '.join(open_rows)}")
    return "\n\n".join(parts)


def as_json(summaries: Mapping[str, Summary], made: Sequence[Claim]) -> dict[str, Any]:
    names = (*TURNED_AWAY, *WASTED, *SPEED, "load", "num_finished", "num_unfinished")
    figures = {
        row: {name: None if (value := one.figures[name]) is None else _rounded(asdict(value)) for name in names}
        for row, one in summaries.items()
    }
    return {"rows": figures, "claims": [asdict(claim) for claim in made]}


def _rounded(value: Mapping[str, float | None]) -> dict[str, float | None]:
    """To 6 digits; whole numbers stay whole."""
    return {name: float(f"{number:.6g}") if isinstance(number, float) else number for name, number in value.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="interactions", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--limits", default="20,50,100", help="requests a minute of one user (default 20,50,100)")
    parser.add_argument("--replicas", default="4,6,8", help="sizes of the cluster (default 4,6,8)")
    parser.add_argument("--requests", type=int, help="calls in the 72 s (default: as packaged; published: 10000)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for interactions.json (default out)")
    options = parser.parse_args(argv)
    try:
        limits, sizes = _numbers(options.limits, "--limits"), _numbers(options.replicas, "--replicas")
        if min(options.seeds, options.jobs) < 1:
            raise ConfigError(f"--seeds and --jobs must be at least 1, not {options.seeds} and {options.jobs}")
        return report(limits, sizes, options)
    except ConfigError as error:
        print(f"interactions: {error}", file=sys.stderr)
        return 2


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"{option} is a list of different whole numbers such as 20,50, not {text!r}")
    return [int(word) for word in words]


def report(limits: Sequence[int], sizes: Sequence[int], options: argparse.Namespace) -> int:
    """Run everything, print it, write the data, and say what does not hold."""
    began_s = time.perf_counter()
    tasks = [
        Task(row, size, seed, options.requests)
        for size in sizes
        for row in rows_for(limits)
        for seed in range(options.seeds)
    ]
    loads, missed = {}, 0
    for size, summaries in run_all(tasks, options.jobs).items():
        made = claims(summaries, limits)
        print(load_text(size, summaries) + "\n")
        for claim in made:
            print(f"{'holds ' if claim.kept else 'MISSED'} {claim.text}")
        print()
        missed += sum(not claim.kept for claim in made)
        loads[str(size)] = as_json(summaries, made)
    print("\n".join(NOTES))
    settings = {"seeds": options.seeds, "limits": list(limits), "requests": options.requests, "scenario": SCENARIO}
    path = options.out / "interactions.json"
    write(path, {"machine": describe_machine(), "settings": settings, "replicas": loads})
    print(f"{path}, {time.perf_counter() - began_s:.0f} s; {missed} claims missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
