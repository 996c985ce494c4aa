"""What an attacker gains: idling, bursts, false names, aborts, crumbs and lies, under five policies.

    python -m benchmarks.attacks [--seeds 5] [--jobs 2] [--only sybil] [--out out]

Two simulated replicas (step times of Llama-2-7B on an A10G), four honest clients and an attacker that together ask for
about 1.75 times what the replicas give, 180 s. Each attack (``attack_cases.py``) is run twice under every policy, with
the same seed and the same requests of the victims: once the attacker is honest, once it is not.

**Gain**: useful service that the attacker received / what it received as an honest client with the same demand, under
the same policy. Service is n_in + 2 n_out over the tokens that were really computed for it, under all its names, within
the attack's window (the whole run, or for a burst what follows it); input that it had to send again for the same answer
is not useful. 1.00: nothing gained. Only ``flood`` wants more than the honest client: under FCFS shares follow demand, so
the other rows cannot show it. A gain below 1 is a loss. The mean over the seeds, and half its 95 % interval.

**Victims**: service that the four received / what they received beside the honest client; and the TTFT p90, over the
requests that arrive in the window, of the two who ask for less than their share (requests without a first token count
with their age), again as a ratio. A scheduler owes a short wait only to these.

**Verdict** on ours: a gain of at most 1.05. An attack that can be made only once (idle, then burst) earns a *lead*,
not a rate: there the most that the attacker ever gained on a victim, from a moment at which both wait to the end, is
compared with the bound 2 (U + S) of ``fairness/bounds.py`` as that run measured it, seed by seed.

``published`` and ``published wsc`` are VTC and FairServe by the rules of their authors' code (``published.py``). rpm is
FCFS behind 50 requests a minute. Under ours, keys of one tenant are named tenant/key; the other policies know no
tenants. Labels and lengths foretold matter to some policies only: ``-`` stands where an attack changes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.attack_cases import ATTACKS, BURST_S, BUSY, DURATION_S, MODEST, Attack, is_attacker, useful_input
from benchmarks.machine import describe_machine
from benchmarks.published import (
    LIMITS,
    TOKENS,
    PublishedInteractions,
    PublishedVtc,
    PublishedVtcBook,
    PublishedWsc,
    PublishedWscBook,
)
from fairserve.assembly import make_dispatcher, make_local_book, policy_of
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest
from fairserve.fairness.policy import Policy
from fairserve.fairness.throttle import ThrottleSettings
from fairserve.simulate.cluster import simulate
from fairserve.simulate.delays import delays, end_of_wait, first_token
from fairserve.simulate.records import RunRecord
from fairserve.simulate.seeds import Estimate, estimate
from fairserve.simulate.setup import ClusterSetup, ReplicaSetup
from fairserve.simulate.step_time import PRESETS

MOST_GAIN = 1.05
SAMPLE_S = 0.5
OURS = ("vtc", "vtc+mean", "wsc")
COLUMNS: dict[str, dict[str, Any]] = {
    "fcfs": {"policy": "fcfs"},
    "rpm": {"policy": "rpm", "rpm_limit": 50},
    "published": {},
    "vtc": {},
    "vtc+mean": {"prediction": "moving_mean"},
    "published wsc": {"policy": "wsc"},
    "wsc": {"policy": "wsc"},
}
"""Policies, and what each changes in the default ``FairnessConfig``."""


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """One run, within the attack's window."""

    attacker: float
    """Useful service."""
    victims: float
    ttft_p90_s: float
    lead: float
    """The most that the attacker ever gained on a victim while both waited, up to the end."""
    bound: float
    worst_gap: float
    tokens_per_s: float
    num_refused: int
    num_preempted: int


def setup_of(column: str, seed: int, attack: Attack) -> ClusterSetup:
    settings = {"throttle": {"client_limit": attack.client_limit}, "expected_service": dict(attack.expected)}
    fairness = FairnessConfig.model_validate({**COLUMNS[column], **settings})
    policies: dict[str, type[Policy]] = {"published": PublishedVtc, "published wsc": PublishedWsc}

    def make_policy() -> Policy:
        return policies[column]() if column in policies else policy_of(fairness)

    def dispatcher(epoch: int) -> Dispatcher:
        if column not in policies:
            return make_dispatcher(fairness, DispatchConfig(), epoch=epoch)
        throttle = ThrottleSettings(**fairness.throttle.model_dump())
        made = Dispatcher(make_policy(), TOKENS, LIMITS, epoch=epoch, throttle=throttle)
        made.interactions = PublishedInteractions()
        return made

    def book() -> LocalBook[GenerateRequest]:
        if column in policies:
            return PublishedVtcBook() if column == "published" else PublishedWscBook()
        return make_local_book(fairness)

    replica = ReplicaSetup(PRESETS["a10g-llama2-7b"])
    return ClusterSetup(
        replicas=(replica, replica),
        make_policy=make_policy,
        make_dispatcher=dispatcher,
        make_book=book,
        seed=seed,
        duration_s=DURATION_S,
        jitter=0.05,
        sample_s=SAMPLE_S,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """One run, for another process. The honest run of a world is the same for all its attacks."""

    attack: str
    column: str
    seed: int
    honest: bool

    def run(self) -> Seen:
        attack = ATTACKS[self.attack]
        arrivals = attack.arrivals(self.seed, honest=self.honest, knows_tenants=self.column in OURS)
        record = simulate(setup_of(self.column, self.seed, attack), arrivals)
        return look(record, attack.window_s)


def look(record: RunRecord, window_s: tuple[float, float]) -> Seen:
    start_s, end_s = window_s
    names = {request.arrival.client for request in record.requests}
    mine, victims = {name for name in names if is_attacker(name)}, {name for name in names if not is_attacker(name)}
    modest = [one for one in record.requests if one.arrival.client in MODEST and start_s <= one.arrival.arrival_s < end_s]
    ttft = delays(modest, first_token, end_s)
    again = sum(one.num_input - useful_input(one) for one in record.requests)
    tokens = sum(one.num_input + one.num_output for one in record.requests)
    return Seen(
        attacker=_service(record, mine, end_s) - _service(record, mine, start_s) - again,
        victims=_service(record, victims, end_s) - _service(record, victims, start_s),
        ttft_p90_s=ttft.p90 if ttft is not None else 0.0,
        lead=max((lead(record, mine, victim, start_s) for victim in BUSY), default=0.0),
        bound=record.bound,
        worst_gap=record.worst_gap,
        tokens_per_s=tokens / record.duration_s,
        num_refused=sum(one.outcome in ("refused", "cut") for one in record.requests),
        num_preempted=record.num_preempted,
    )


def lead(record: RunRecord, clients: Iterable[str], victim: str, from_s: float) -> float:
    """The most that ``clients`` together gained on ``victim`` up to any moment, since it began to wait without end (at
    ``from_s`` at the earliest). Nothing where it never did."""
    since_s = waits_since(record, victim, from_s)
    at_first = _service(record, clients, since_s) - _service(record, {victim}, since_s)
    leads = [
        sum(service.get(name, 0.0) for name in clients) - service.get(victim, 0.0) - at_first
        for at_s, service in record.service
        if at_s >= since_s
    ]
    return max(leads, default=0.0)


def waits_since(record: RunRecord, client: str, from_s: float) -> float:
    """The first moment, not before ``from_s``, from which some request of the client waits until the run ends."""
    since_s = record.duration_s
    waits = [
        (one.arrival.arrival_s, end_of_wait(one, record.duration_s))
        for one in record.requests
        if one.arrival.client == client and one.outcome not in ("refused", "cut")
    ]
    for begin_s, until_s in sorted(waits, key=lambda wait: -wait[1]):
        if until_s < since_s:
            break
        since_s = min(since_s, begin_s)
    return max(since_s, from_s)


def _service(record: RunRecord, clients: Iterable[str], at_s: float) -> float:
    """What they had received by then; all weights are 1."""
    for sampled_s, service in record.service:
        if sampled_s >= at_s:
            break
    return sum(service.get(name, 0.0) for name in clients)


# -- all runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One attack under one policy, over the seeds."""

    gain: Estimate
    victims: float
    """Ratio of what they received, mean over the seeds."""
    ttft: float
    """Ratio of the modest victims' TTFT p90."""
    honest: tuple[Seen, ...]
    attacked: tuple[Seen, ...]

    @property
    def keeps_the_bound(self) -> bool:
        return all(seen.lead <= seen.bound for seen in self.attacked)


def cell_of(honest: Sequence[Seen], attacked: Sequence[Seen]) -> Cell:
    pairs = list(zip(honest, attacked, strict=True))
    gain = estimate([after.attacker / before.attacker for before, after in pairs])
    assert gain is not None
    return Cell(
        gain,
        statistics.fmean(after.victims / before.victims for before, after in pairs),
        statistics.fmean(after.ttft_p90_s / before.ttft_p90_s for before, after in pairs),
        tuple(honest),
        tuple(attacked),
    )


def run_all(attacks: Sequence[Attack], num_seeds: int, num_processes: int) -> dict[tuple[str, str], Cell]:
    jobs: dict[Job, None] = {}
    seeds = range(1, num_seeds + 1)
    of_world: dict[tuple[Any, ...], str] = {}
    honest_name = {}
    for attack in attacks:
        key = (attack.world, attack.window_s, attack.client_limit)
        honest_name[attack.name] = of_world.setdefault(key, attack.name)
        for column in attack.columns:
            for seed in seeds:
                jobs[Job(honest_name[attack.name], column, seed, honest=True)] = None
                jobs[Job(attack.name, column, seed, honest=False)] = None
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        seen = dict(zip(jobs, pool.map(Job.run, jobs), strict=True))
    return {
        (attack.name, column): cell_of(
            [seen[Job(honest_name[attack.name], column, seed, honest=True)] for seed in seeds],
            [seen[Job(attack.name, column, seed, honest=False)] for seed in seeds],
        )
        for attack in attacks
        for column in attack.columns
    }


# -- report ------------------------------------------------------------------------------------------------------------


def table(attacks: Sequence[Attack], cells: Mapping[tuple[str, str], Cell]) -> str:
    """One row per attack; a cell is gain (and half its 95 % interval), victims' service, victims' TTFT p90."""
    columns = [name for name in COLUMNS if any(name in attack.columns for attack in attacks)]
    rows = [["gain / victims' service / TTFT p90", *columns]]
    for attack in attacks:
        rows.append([attack.name, *(_text(cells.get((attack.name, name))) for name in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = f"±{cell.gain.half_width:.2f}" if cell.gain.half_width is not None else ""
    return f"{cell.gain.mean:.2f}{spread} / {cell.victims:.2f} / {cell.ttft:.1f}"


def verdicts(attacks: Sequence[Attack], cells: Mapping[tuple[str, str], Cell]) -> dict[str, tuple[bool, str]]:
    """Per attack: does ours hold, and why."""
    made = {}
    for attack in attacks:
        ours = {name: cells[attack.name, name] for name in attack.columns if name in OURS}
        if attack.is_one_time:
            holds = all(cell.keeps_the_bound for cell in ours.values())
            most = {
                name: max(cell.attacked, key=lambda seen: seen.lead / max(seen.bound, 1.0))
                for name, cell in ours.items()
            }
            why = ", ".join(f"{name} lead {seen.lead:,.0f} of {seen.bound:,.0f}" for name, seen in most.items())
        else:
            holds = all(cell.gain.mean <= MOST_GAIN for cell in ours.values())
            why = ", ".join(f"{name} gains {cell.gain.mean:.2f}" for name, cell in ours.items())
        made[attack.name] = (holds, why)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="attacks", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of everything, each with another seed (default 5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--only", default="", help="only attacks with this in their name")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for attacks.json (default out)")
    options = parser.parse_args(argv)
    attacks = [attack for name, attack in ATTACKS.items() if options.only in name]
    if not attacks or options.seeds < 1 or options.jobs < 1:
        parser.error(f"nothing to run: the attacks are {'; '.join(ATTACKS)}")
    began_s = time.monotonic()
    cells = run_all(attacks, options.seeds, options.jobs)
    judged = verdicts(attacks, cells)
    print(table(attacks, cells), end="\n\n")
    for name, (holds, why) in judged.items():
        print(f"{'holds ' if holds else 'BROKEN'} {name}: {why}")
    print(f"\n{options.seeds} seeds, {time.monotonic() - began_s:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [{"attack": name, "policy": column, **asdict(cell)} for (name, column), cell in cells.items()]
    text = json.dumps({"machine": describe_machine(), "burst_s": BURST_S, "rows": rows}, indent=1)
    (options.out / "attacks.json").write_text(text + "\n")
    return 0 if all(holds for holds, _ in judged.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
