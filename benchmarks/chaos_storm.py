"""One storm: clients, faults and a watcher on a running application, and what was left of every token afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import ray

from benchmarks.chaos_audit import Audit, Tokens, audit, plus, total
from benchmarks.chaos_faults import CUT as CUT_OFF
from benchmarks.chaos_faults import STOP, Fault, Injector, Processes
from benchmarks.chaos_load import OUTCOMES, Client, Crowd, Record
from benchmarks.chaos_witness import Made, read_witnesses, witness_folder
from fairserve.fairness.bounds import GapMonitor

SAMPLE_S = 0.2
FRESH_S = 1.0
"""A replica whose newest report is younger is in touch."""
QUIET_S = 180.0
MAX_DETAILS = 50


@dataclass(frozen=True, slots=True)
class Sample:
    """One question to the counter actor; ``gap`` None when it did not answer. ``at_s``: Unix time."""

    at_s: float
    epoch: int = 0
    gap: float | None = None
    ages_s: Mapping[str, float] = field(default_factory=dict)
    """Since the newest report of each replica."""


@dataclass(slots=True)
class Watcher:
    """Asks the counter actor for its status all the time, and keeps gaps of its own across the actor's lives.

    A client counts as waiting while the clients' side has a request out that brought no byte yet: the actor does not
    know of those that were let through without it. Amounts are service / weight.
    """

    actor: Callable[[], Any]
    clients: Sequence[Client]
    is_waiting: Callable[[str], bool]
    samples: list[Sample] = field(default_factory=list)
    lives: dict[int, dict[str, float]] = field(default_factory=dict)
    """Worst gap, bound and staleness by epoch, as the actor itself says."""
    newest: dict[str, Any] = field(default_factory=dict)
    gaps: GapMonitor = field(default_factory=GapMonitor)
    _handle: Any = None

    async def run(self) -> None:
        while True:
            began_s = time.time()
            status = await self.ask()
            if status is None:
                self.samples.append(Sample(began_s))
                await asyncio.sleep(SAMPLE_S / 2)
            else:
                self._take(status)
                await asyncio.sleep(SAMPLE_S)

    async def ask(self, timeout_s: float = 1.0) -> dict[str, Any] | None:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(self.actor)
            status: dict[str, Any] = await asyncio.wait_for(self._handle.status.remote(), timeout_s)
        except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._handle = None
            return None
        return status

    def _take(self, status: dict[str, Any]) -> None:
        self.newest = status
        rows = {client.name: status["clients"].get(client.name) for client in self.clients}
        service = {name: row["service"] / row["weight"] for name, row in rows.items() if row is not None}
        self.gaps.observe(service, self.is_waiting)
        gap, _ = self.gaps.current()
        ages_s = {name: replica["report_age_s"] for name, replica in status["replicas"].items()}
        self.samples.append(Sample(time.time(), status["epoch"], gap, ages_s))
        life = {name: status[name] for name in ("worst_gap", "bound", "staleness")}
        self.lives[status["epoch"]] = life


@dataclass(slots=True)
class Outcome:
    """What a storm left."""

    seconds: float
    faults: list[Fault]
    counts: dict[str, int]
    details: dict[str, int]
    """What callers saw of requests that did not finish."""
    num_unconnected: int
    num_door_deaths: int
    """Processes of ingresses and proxies that ended, killed by the storm or by Serve when it came back."""
    lost: list[str]
    tokens: Audit
    lives: dict[int, dict[str, float]]
    fault_free: dict[str, float]
    """Bound, worst gap and staleness at the end of the time before the first fault."""
    worst_gap: float
    """As the watcher saw it, across the actor's lives."""
    longest_away_s: float
    """The longest time for which the counter actor did not answer."""
    longest_silence_s: float
    """The longest time in which no replica made a token, while there was a proxy."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def storm(
    url: str,
    model: str,
    clients: Sequence[Client],
    injector: Injector,
    processes: Processes,
    *,
    seconds: float,
    calm_s: float,
    seed: int,
    cards: Iterable[tuple[str, str]],
    pause_s: tuple[float, float],
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """``calm_s`` without faults, then one fault after another until ``seconds`` are over; then silence and an audit."""
    crowd = Crowd(url, model, clients, seed, injector.was_cut)
    watcher = Watcher(processes.counter_actor, clients, crowd.is_waiting)
    fault_free: dict[str, float] = {}
    began_s = time.time()

    async def work() -> None:
        await asyncio.sleep(calm_s)
        fault_free.update({name: watcher.newest[name] for name in ("worst_gap", "bound", "staleness")})
        fault_free["own_gap"] = watcher.gaps.worst
        rng = random.Random(seed)
        for kind, how in cards:
            if time.time() - began_s >= seconds:
                break
            fault = await injector.inject(kind, how)
            say(f"{time.time() - began_s:5.0f} s  {kind} {how}{'' if fault else ': nobody to do it to'}")
            await asyncio.sleep(rng.uniform(*pause_s) if fault else 0.5)
        await asyncio.sleep(max(0.0, began_s + seconds - time.time()))

    watching = asyncio.create_task(watcher.run())
    doors = asyncio.create_task(injector.watch_doors())
    try:
        await crowd.run(work())
        loaded_s = time.time()
        say("waiting until all is quiet")
        await _quiet(watcher, processes)
    finally:
        watching.cancel()
        doors.cancel()
        await asyncio.gather(watching, doors, return_exceptions=True)
    crowd.blame_doors()
    made = await asyncio.to_thread(read_witnesses, witness_folder())
    books, charged = await asyncio.to_thread(_ledger, processes.counter_actor())
    alive = [process.name.rpartition("#")[2] for process in processes.of("replica")]
    _time_faults(injector.faults, watcher.samples, made, fault_free["bound"], began_s + seconds)
    _time_proxies(injector.faults, crowd.records)
    counts = Counter(record.outcome for record in crowd.records)
    times_s = sorted(at_s for one in made.values() for at_s in one.times_s if began_s <= at_s <= loaded_s)
    shut = [(f.at_s, f.at_s + (f.back_s or 0.0)) for f in injector.faults if f.kind == "proxy"]
    return Outcome(
        seconds=seconds,
        faults=injector.faults,
        counts={name: counts[name] for name in OUTCOMES},
        details=dict(Counter(f"{r.outcome}: {r.detail[:80]}" for r in crowd.records if r.detail)),
        num_unconnected=crowd.num_unconnected,
        num_door_deaths=len(injector.door_deaths_s),
        lost=[
            f"{r.client} {r.id or '(no id)'} sent at {r.sent_s - began_s:.1f} s, ended at {r.end_s - began_s:.1f} s: "
            f"{r.detail}"
            for r in crowd.records
            if r.outcome == "lost"
        ][:MAX_DETAILS],
        tokens=audit(made, books, charged, alive, crowd.records),
        lives=watcher.lives,
        fault_free=fault_free,
        worst_gap=watcher.gaps.worst,
        longest_away_s=_away(watcher.samples),
        longest_silence_s=_silence(times_s, shut),
    )


async def _quiet(watcher: Watcher, processes: Processes) -> None:
    """Nothing waits, runs or is granted anywhere, every living replica is in touch, and nothing has changed between two
    looks a second apart.

    Raises:
        TimeoutError: it does not come to that.
    """
    last: Any = None
    async with asyncio.timeout(QUIET_S):
        while True:
            status = await watcher.ask(5.0)
            if status is not None:
                replicas = status["replicas"].values()
                busy = status["waiting"] or status["leases"] or any(r["running"] or r["waiting"] for r in replicas)
                alive = await asyncio.to_thread(processes.of, "replica")
                busy = busy or not {one.name.rpartition("#")[2] for one in alive} <= status["replicas"].keys()
                now = status["epoch"], status["clients"], sorted(status["replicas"])
                if not busy and now == last:
                    return
                last = None if busy else now
            await asyncio.sleep(1.2)


def _ledger(actor: Any) -> tuple[dict[str, Tokens], Tokens]:
    """By replica, and of all clients together."""
    data = ray.get(actor.__ray_call__.remote(_dump_ledger), timeout=30)
    books: dict[str, Tokens] = {}
    for replica, _, _, totals in data["books"]:
        books[replica] = plus(books.get(replica, (0, 0)), total((row[0], row[2]) for row in totals.values()))
    return books, total((row[0], row[2]) for row in data["totals"].values())


def _dump_ledger(service: Any) -> Any:
    return service.dispatcher.ledger.dump()


def _time_faults(faults: list[Fault], samples: list[Sample], made: dict[str, Made], bound: float, end_s: float) -> None:
    ungranted_s = sorted(at_s for one in made.values() for at_s in one.ungranted_s)
    ends_s = [fault.at_s for fault in faults[1:]] + [end_s]
    for fault, until_s in zip(faults, ends_s, strict=True):
        window = [sample for sample in samples if fault.at_s <= sample.at_s < until_s]
        bad = [i for i, sample in enumerate(window) if sample.gap is None or sample.gap > bound]
        fault.fair_s = 0.0
        if bad:
            fault.is_censored = bad[-1] == len(window) - 1
            fault.fair_s = window[min(bad[-1] + 1, len(window) - 1)].at_s - fault.at_s
        if fault.kind == "replica" and fault.how in (STOP, CUT_OFF):
            name = fault.victim.rpartition("#")[2]
            later = (s for s in samples if s.at_s > fault.over_s and s.ages_s.get(name, FRESH_S) < FRESH_S)
            back = next(later, None)
            fault.merged_s = None if back is None else back.at_s - fault.over_s
            if fault.how == CUT_OFF and name in made:
                fault.num_alone = sum(fault.at_s < at_s < fault.over_s for at_s in made[name].times_s)
        if fault.kind == "actor":
            first = next((at_s for at_s in ungranted_s if fault.at_s <= at_s < until_s), None)
            fault.degraded_s = None if first is None else first - fault.at_s
            silent = [i for i, sample in enumerate(window) if sample.gap is None]
            if silent and silent[-1] + 1 < len(window):
                fault.back_s = window[silent[-1] + 1].at_s - fault.at_s


def _time_proxies(faults: list[Fault], records: list[Record]) -> None:
    for fault in faults:
        if fault.kind == "proxy":
            firsts_s = [r.first_s for r in records if r.sent_s > fault.at_s and r.first_s is not None]
            fault.back_s = min(firsts_s) - fault.at_s if firsts_s else None


def _away(samples: Sequence[Sample]) -> float:
    answered_s = [sample.at_s for sample in samples if sample.gap is not None]
    return max((b - a for a, b in pairwise(answered_s)), default=0.0)


def _silence(times_s: Sequence[float], shut: Sequence[tuple[float, float]]) -> float:
    """The longest of the pauses that no interval of ``shut`` touches."""
    pauses = [(a, b) for a, b in pairwise(times_s) if not any(begins <= b and a <= ends for begins, ends in shut)]
    return max((b - a for a, b in pauses), default=0.0)
