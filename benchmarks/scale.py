"""How much can one authority decide? A Dispatcher with 100,000 known and 10,000 waiting clients and 1,000 replicas.

    python -m benchmarks.scale [--quick] [--policies vtc vtc+moving_mean dlpm] [--out out/scale.json]
    python -m benchmarks.scale --decisions [--quick] [--policies vtc]

CPU time of one process, in microseconds per event and events per second: a grant (pick, charge, lease), a submit, a
replica's report of a step (32 requests run there), and the reports in which requests start and finish. Then how a grant
grows with waiting clients and with replicas, what a client costs in bytes, how long one call can block the others, and
how long a save holds up the event loop while it writes to a SQLite file. ``--decisions``: grants alone, with 8 and 64
replicas, once every client had its turn.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.crowd import BATCH, KV_TOKENS, SLOTS, Crowd, Size, Work, client_name, dispatcher_of
from benchmarks.machine import describe_machine
from fairserve.cluster.saver import Saver
from fairserve.dispatch.cut import Cut
from fairserve.dispatch.messages import RouterCall, StepReport, Submit, Totals
from fairserve.dispatch.store import SqliteStore
from fairserve.fairness.hierarchy import forget_paths

POLICIES = ("vtc", "vtc+moving_mean", "dlpm")
FULL = Size(num_known=100_000, num_waiting=10_000, num_replicas=1_000)
CLIENTS, REPLICAS = (1_000, 10_000, 100_000), (10, 100, 1_000)
FEW_REPLICAS = (8, 64)
STEPS_PER_S = 30
"""Of a replica: how many it makes, and so how many reports it would send at the most."""

Row = dict[str, Any]


def speed(size: Size, num_grants: int) -> Row:
    """One setting, timed."""
    crowd = Crowd(size)
    crowd.run(num_grants)
    row: Row = {"policy": size.policy, "levels": size.levels, "known": size.num_known, "waiting": size.num_waiting}
    row |= {"replicas": size.num_replicas, "timed_grants": crowd.grants.num}
    works = {"grant": crowd.grants, "submit": crowd.submits, "start": crowd.started, "step": crowd.steps}
    for name, work in (works | {"finish": crowd.finished}).items():
        row[f"{name}_us"], row[f"{name}_per_s"] = _median_us(work), 1e6 / _median_us(work)
    row["replicas_per_core"] = row["step_per_s"] / STEPS_PER_S
    row |= pauses(crowd)
    row |= saves(crowd)
    crowd.dispatcher.check()
    return row


def decisions(policy: str, part: int, num_grants: int) -> list[Row]:
    """A grant with few replicas, whose rounds are short, and with more; ``part``: one of so many."""
    rows = []
    for num_replicas in FEW_REPLICAS:
        crowd = Crowd(Size(FULL.num_known // part, FULL.num_waiting // part, num_replicas, policy))
        crowd.run(num_grants, num_steps=1, max_rounds=10_000, num_before=FULL.num_waiting // part)
        row: Row = {"policy": policy, "levels": 1, "waiting": crowd.size.num_waiting, "replicas": num_replicas}
        rows.append(row | {"grant_us": _median_us(crowd.grants), "grant_per_s": 1e6 / _median_us(crowd.grants)})
        crowd.dispatcher.check()
    return rows


def pauses(crowd: Crowd) -> Row:
    """Seconds for which nothing else is done: a collection of all garbage, a snapshot, a tick without news."""
    dispatcher = crowd.dispatcher
    return {
        "gc_s": _cpu_s(gc.collect),
        "snapshot_s": _cpu_s(dispatcher.dump),
        "snapshot_json_s": _cpu_s(lambda: json.dumps(dispatcher.dump())),
        "tick_s": _cpu_s(lambda: dispatcher.tick(crowd.now_s)),
    }


REPEATS = 5


def saves(crowd: Crowd) -> Row:
    """Of cuts of everything, and of what changed since every replica has reported once: CPU seconds of all and of the
    longest slice; seconds by the wall for which the event loop was held up at the most while one was taken and written,
    and a loop that has nothing else to do. Of ``REPEATS`` the least, so that a neighbour's burst counts little."""
    crowd.grant()
    crowd.start()
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        store, saver = SqliteStore(Path(folder) / "c.sqlite"), Saver(lambda: "here", 1, time.time, time.monotonic)

        def held_up_s(act: Callable[[], Any], prepare: Callable[[], object]) -> float:
            waits = []
            for _ in range(REPEATS):
                prepare()
                waits.append(asyncio.run(_longest_wait_s(act)))
            return min(waits)

        def save() -> Any:
            return saver.save(store, lambda: crowd.dispatcher)

        row["quiet_s"] = held_up_s(lambda: asyncio.sleep(0.5), lambda: None)
        row["whole_loop_s"] = held_up_s(save, saver.moved)
        row["part_loop_s"] = held_up_s(save, crowd.step)
    for name, is_whole in (("part", False), ("whole", True)):
        cuts = []
        for _ in range(REPEATS):
            crowd.step()
            cuts.append(_slices(crowd.dispatcher.cutter.steps(is_whole=is_whole)))
        row[f"{name}_rows"] = len(cuts[0][0].nodes)
        row[f"{name}_slice_s"] = min(max(seconds) for _, seconds in cuts)
        row[f"{name}_cut_s"] = min(sum(seconds) for _, seconds in cuts)
    return row


async def _longest_wait_s(act: Callable[[], Any]) -> float:
    """For which a loop that wants to run every millisecond cannot."""
    task = asyncio.ensure_future(act())
    longest_s = 0.0
    while not task.done():
        began_s = time.perf_counter()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, time.perf_counter() - began_s - 0.001)
    await task
    return longest_s


def _slices(steps: Generator[None, None, Cut]) -> tuple[Cut, list[float]]:
    seconds: list[float] = []
    while True:
        began_s = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            return end.value, [*seconds, time.thread_time() - began_s]
        seconds.append(time.thread_time() - began_s)


def memory(num_clients: int, levels: int, policy: str = "vtc") -> Row:
    """Bytes per client: known (served once, by one replica), waiting with one request on top of it, and for each
    further replica that has served it; all caches included, Python's own strings too."""
    forget_paths()
    gc.collect()
    tracemalloc.start()
    try:
        dispatcher = dispatcher_of(policy)
        sizes = [_traced()]
        _serve_all(dispatcher, num_clients, levels)
        sizes.append(_traced())
        for start in range(0, num_clients, BATCH):
            ids = range(start, min(start + BATCH, num_clients))
            submits = tuple(Submit(f"later-{i}", client_name(i, levels), 100, 100) for i in ids)
            dispatcher.route(RouterCall("router", 1, 10**6 + start, 1, submits, grants_ack=10**9), 3.0)
        sizes.append(_traced())
        totals = {client_name(i, levels): Totals(100, 0, 1, 102.0) for i in range(num_clients)}
        dispatcher.report(StepReport("another", 1, 1, 1, 0, 0, KV_TOKENS, SLOTS, totals=totals), 4.0)
        del totals
        sizes.append(_traced())
    finally:
        tracemalloc.stop()
    known, waiting, served = (round((b - a) / num_clients) for a, b in pairwise(sizes))
    return {"policy": policy, "levels": levels, "known": known, "waiting": waiting, "per_replica": served}


def _serve_all(dispatcher: Any, num_clients: int, levels: int) -> None:
    """Every client sends one request, which is granted, runs and ends; then the replica is full."""
    seq = 0

    def report(free_slots: int, **what: Any) -> None:
        nonlocal seq
        seq += 1
        dispatcher.report(StepReport("one", 1, seq, 1, KV_TOKENS, free_slots, KV_TOKENS, SLOTS, **what), 1.0)

    report(SLOTS)
    for start in range(0, num_clients, BATCH):
        ids = range(start, min(start + BATCH, num_clients))
        submits = tuple(Submit(f"first-{i}", client_name(i, levels), 100, 100) for i in ids)
        call = RouterCall("router", 1, start + 1, 1, submits, grants_ack=start)
        dispatcher.route(call, 1.0)
        names = tuple(f"first-{i}" for i in ids)
        totals = {client_name(i, levels): Totals(100, 0, 1, 102.0) for i in ids}
        report(0, received=names, started=names, totals=totals)
        report(SLOTS, finished=names, outputs=dict.fromkeys(names, 1))
    report(0)
    assert dispatcher.num_granted == num_clients and not dispatcher.leases


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _cpu_s(act: Callable[[], object]) -> float:
    began_s = time.process_time()
    act()
    return time.process_time() - began_s


def _median_us(work: Work) -> float:
    """Of the rounds, so that a neighbour's burst counts little."""
    return 1e6 * statistics.median(work.rounds)


# ----------------------------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """``columns``: key -> heading."""
    cells = [list(columns.values())]
    cells += [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


SPEED = {
    "policy": "policy",
    "levels": "levels",
    "waiting": "waiting",
    "replicas": "replicas",
    "grant_us": "grant us",
    "grant_per_s": "grants/s",
    "submit_us": "submit us",
    "step_us": "step report us",
    "step_per_s": "step reports/s",
    "start_us": "start report us",
    "finish_us": "finish report us",
    "replicas_per_core": "replicas per core",
}
GROWTH = {key: SPEED[key] for key in ("policy", "levels", "waiting", "replicas", "grant_us", "grant_per_s", "step_us")}
DECISIONS = {key: SPEED[key] for key in ("policy", "waiting", "replicas", "grant_us", "grant_per_s")}
PAUSES = {
    "policy": "policy",
    "levels": "levels",
    "gc_s": "full gc s",
    "snapshot_s": "snapshot s",
    "snapshot_json_s": "and its JSON s",
    "tick_s": "tick s",
}
SAVES = {
    "policy": "policy",
    "levels": "levels",
    "whole_rows": "all nodes",
    "whole_slice_s": "longest slice s",
    "whole_cut_s": "cut s",
    "whole_loop_s": "loop held up s",
    "part_rows": "changed nodes",
    "part_slice_s": "longest slice s",
    "part_cut_s": "cut s",
    "part_loop_s": "loop held up s",
    "quiet_s": "(a quiet loop s)",
}
MEMORY = {
    "policy": "policy",
    "levels": "levels",
    "known": "bytes per known client",
    "waiting": "more when it waits",
    "per_replica": "more per replica that served it",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scale", description=__doc__.split("\n")[0])
    parser.add_argument("--policies", nargs="+", default=POLICIES, help=f"default {' '.join(POLICIES)}")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything: shows that it runs")
    parser.add_argument("--grants", type=int, default=64_000, help="timed grants per setting (default 64,000)")
    parser.add_argument("--decisions", action="store_true", help="only grants, with 8 and 64 replicas; writes nothing")
    parser.add_argument("--out", type=Path, default=Path("out/scale.json"))
    options = parser.parse_args(argv)
    part = 10 if options.quick else 1
    num_grants = options.grants // part
    if options.decisions:
        print(table([row for policy in options.policies for row in decisions(policy, part, num_grants)], DECISIONS))
        return 0

    def size(policy: str, levels: int, waiting: int, replicas: int, known: int = 0) -> Size:
        return Size(max(known, waiting) // part, waiting // part, max(1, replicas // part), policy, levels)

    results: dict[str, list[Row]] = {"speed": [], "clients": [], "replicas": [], "memory": []}
    for policy in options.policies:
        few = num_grants // 4 if policy in ("dlpm", "d2lpm") else num_grants
        for levels in (1, 3):
            full = size(policy, levels, FULL.num_waiting, FULL.num_replicas, FULL.num_known)
            results["speed"].append(speed(full, few))
        for num in CLIENTS:
            results["clients"].append(speed(size(policy, 1, num, 100), few // 4))
        for num in REPLICAS:
            results["replicas"].append(speed(size(policy, 1, 10_000, num), few // 4))
    for levels in (1, 3):
        results["memory"].append(memory(20_000 // part, levels))
    print(f"CPU time; {FULL.num_known // part:,} known clients; a report tells of {SLOTS} running requests\n")
    print(table(results["speed"], SPEED))
    print("what blocks everything else\n")
    print(table(results["speed"], PAUSES))
    print("a save: of everything, and of what changed; the loop held up by wall clock, the rest CPU\n")
    print(table(results["speed"], SAVES))
    print("a grant, by waiting clients and by replicas\n")
    print(table(results["clients"], GROWTH))
    print(table(results["replicas"], GROWTH))
    print(table(results["memory"], MEMORY))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
