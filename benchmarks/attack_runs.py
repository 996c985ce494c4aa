"""One run of one attack under one policy: the cluster, and what is seen of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.attack_cases import ATTACKS, BUSY, DURATION_S, MODEST, Attack, is_attacker, useful_input
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
from fairserve.simulate.setup import ClusterSetup, ReplicaSetup
from fairserve.simulate.step_time import PRESETS

SAMPLE_S = 0.5
OURS = ("vtc", "vtc+mean", "wsc")
COLUMNS: dict[str, dict[str, Any]] = {
    "fcfs": {"policy": "fcfs"},
    "rpm": {"policy": "rpm", "rpm_limit": 50},
    "published": {},
    "vtc": {"prediction": "none"},
    "vtc+mean": {"prediction": "moving_mean"},
    "published wsc": {"policy": "wsc"},
    "wsc": {"policy": "wsc", "prediction": "moving_mean"},
}
"""Policies, and what each sets in ``FairnessConfig``."""
PUBLISHED: dict[str, tuple[Callable[[], Policy], Callable[[], LocalBook[GenerateRequest]]]] = {
    "published": (PublishedVtc, PublishedVtcBook),
    "published wsc": (PublishedWsc, PublishedWscBook),
}

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """One run, within a window."""

    attacker: float
    """Useful service."""
    victims: float
    """Service of the four."""
    rivals: float
    """Service of the two who, like the attacker, ask for more than their share."""
    ttft_p90_s: float
    """Of the other two."""
    lead: float
    """See :func:`lead`: against the victim for whom it is the largest."""
    bound: float
    worst_gap: float
    tokens_per_s: float
    num_refused: int


def setup_of(column: str, seed: int, attack: Attack) -> ClusterSetup:
    settings = {"throttle": {"client_limit": attack.client_limit}, "expected_service": dict(attack.expected)}
    fairness = FairnessConfig.model_validate({**COLUMNS[column], **settings})
    ours: tuple[Callable[[], Policy], Callable[[], LocalBook[GenerateRequest]]] = (
        partial(policy_of, fairness),
        partial(make_local_book, fairness),
    )
    make_policy, make_book = PUBLISHED.get(column, ours)

    def dispatcher(epoch: int) -> Dispatcher:
        if column not in PUBLISHED:
            return make_dispatcher(fairness, DispatchConfig(), epoch=epoch)
        throttle = ThrottleSettings(**fairness.throttle.model_dump())
        made = Dispatcher(make_policy(), TOKENS, LIMITS, epoch=epoch, throttle=throttle)
        made.interactions = PublishedInteractions()
        return made

    replica = ReplicaSetup(PRESETS["a10g-llama2-7b"])
    return ClusterSetup(
        replicas=(replica, replica),
        make_policy=make_policy,
        make_dispatcher=dispatcher,
        make_book=make_book,
        seed=seed,
        duration_s=DURATION_S,
        jitter=0.05,
        sample_s=SAMPLE_S,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """One run, for another process. The honest run of a world serves all its attacks, each in its own window."""

    attack: str
    column: str
    seed: int
    honest: bool
    windows: tuple[Window, ...]

    def run(self) -> dict[Window, Seen]:
        record = run(ATTACKS[self.attack], self.column, self.seed, honest=self.honest)
        return {window: look(record, window) for window in self.windows}


def run(attack: Attack, column: str, seed: int, *, honest: bool) -> RunRecord:
    arrivals = attack.arrivals(seed, honest=honest, knows_tenants=column in OURS)
    return simulate(setup_of(column, seed, attack), arrivals)


def look(record: RunRecord, window: Window) -> Seen:
    start_s, end_s = window
    names = {request.arrival.client for request in record.requests}
    mine, victims = {name for name in names if is_attacker(name)}, {name for name in names if not is_attacker(name)}
    modest = [one for one in record.requests if one.arrival.client in MODEST]
    ttft = delays([one for one in modest if start_s <= one.arrival.arrival_s < end_s], first_token, record.duration_s)
    again = sum(one.num_input - useful_input(one) for one in record.requests if one.arrival.arrival_s >= start_s)
    return Seen(
        attacker=received(record, mine, window) - again,
        victims=received(record, victims, window),
        rivals=received(record, BUSY, window),
        ttft_p90_s=ttft.p90 if ttft is not None else 0.0,
        lead=max(lead(record, mine, victim, start_s) for victim in BUSY),
        bound=record.bound,
        worst_gap=record.worst_gap,
        tokens_per_s=sum(one.num_input + one.num_output for one in record.requests) / record.duration_s,
        num_refused=sum(one.outcome in ("refused", "cut") for one in record.requests),
    )


def lead(record: RunRecord, clients: Iterable[str], victim: str, from_s: float) -> float:
    """The most that ``clients`` together gained on ``victim`` between any two moments while it waited without end, from
    ``from_s`` at the earliest. Nothing where it never did."""
    since_s = waits_since(record, victim, from_s)
    most, least = 0.0, float("inf")
    for at_s, service in record.service:
        if at_s >= since_s:
            ahead = sum(service.get(name, 0.0) for name in clients) - service.get(victim, 0.0)
            least = min(least, ahead)
            most = max(most, ahead - least)
    return most


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


def received(record: RunRecord, clients: Iterable[str], window: Window) -> float:
    """Service of all of them together; all weights are 1."""
    start, end = (_at(record, at_s) for at_s in window)
    return sum(end.get(name, 0.0) - start.get(name, 0.0) for name in clients)


def _at(record: RunRecord, at_s: float) -> dict[str, float]:
    """What everybody had received by then."""
    return next((service for sampled_s, service in record.service if sampled_s >= at_s), record.service[-1][1])
