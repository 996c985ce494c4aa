"""From the record of a run to its figures.

Amounts are seconds, model tokens, and service / weight. None stands where a run has no data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fairserve.fairness.bounds import jain
from fairserve.fairness.cost import CostFunction
from fairserve.simulate.delays import Percentiles, covered, delays, end_of_wait, first_token, grant, last_token
from fairserve.simulate.records import RequestRecord, RunRecord
from fairserve.simulate.service_curves import NOT_SERVED, Array, Grid, ServiceCurves

BACKLOGGED_SHARE = 0.9
"""A client counts as backlogged if in this part of the time after the warm-up at least one of its requests waited."""


@dataclass(frozen=True, slots=True)
class Difference:
    """VTC's service difference over the samples of the grid, service / weight per second; ``var`` its variance."""

    max: float
    avg: float
    var: float


@dataclass(frozen=True, slots=True)
class ClientMeasures:
    """One client. ``num_requests`` is all that it wanted to send, calls that were cut included."""

    client: str
    weight: float
    num_requests: int
    num_finished: int
    num_refused: int
    num_cut: int
    num_input: int
    num_cached: int
    num_output: int
    service: float
    """Service / weight received in the whole run."""
    waiting_share: float
    """Part of the time after the warm-up in which at least one of its requests waited."""
    ttft: Percentiles | None
    latency: Percentiles | None
    queueing: Percentiles | None

    def figures(self) -> dict[str, float | None]:
        """Every number by its name; parts as ``ttft.p50``."""
        return _flat(self)


@dataclass(frozen=True, slots=True)
class Measures:
    """One run of one policy with one seed."""

    scenario: str
    policy: str
    seed: int
    duration_s: float
    num_requests: int
    num_finished: int
    num_unfinished: int
    num_cancelled: int
    difference: Difference | None
    difference_with_refused: Difference | None
    """The same with refused and cut requests as demand: what a policy gains by refusing shows here."""
    accumulated_difference: float | None
    """The largest sample of max_i - min_i of service since the warm-up. Clients that ask for little count too, so it
    means something only where all clients ask for more than their share."""
    worst_gap: float
    """Between two clients over an interval in which both wait."""
    bound: float | None
    """2 (U + S) as measured, see fairness/bounds.py; None where the run has none. Policies without counters are not
    held to it: there it says what VTC would allow."""
    gap_to_bound: float | None
    jain: float | None
    """Jain's index of service / weight after the warm-up, among backlogged clients; None for fewer than two."""
    num_backlogged: int
    """Clients with something waiting in ``BACKLOGGED_SHARE`` of the time from the end of the warm-up to duration_s."""
    ttft: Percentiles | None
    """Arrival to first token, of all that were neither refused, nor cut, nor cancelled before it."""
    latency: Percentiles | None
    """Arrival to last token, of finished and unfinished requests."""
    queueing: Percentiles | None
    """Arrival to grant."""
    tokens_per_s: float
    """Input and output, over the time to the last finish (at least duration_s where requests are unfinished)."""
    output_tokens_per_s: float
    num_input: int
    num_output: int
    cached_share: float | None
    """Of the input tokens, those found in a prefix cache."""
    num_wasted_tokens: int
    num_refused: int
    num_cut: int
    num_throttled_interactions: int
    """Interactions whose first call was refused: they never began."""
    num_cut_interactions: int
    """Interactions that had begun and were ended by the refusal of a later call."""
    idle_share: float
    """Replica time without a step while some request waited anywhere, over all replica time."""
    utilisation: float
    """Replica time spent in steps, over all replica time."""
    num_preempted: int
    num_recomputed: int
    num_lifts: int
    num_lapsed: int
    refused: Mapping[str, int]
    """Refused requests by reason."""
    clients: tuple[ClientMeasures, ...]
    """By name."""

    def of(self, client: str) -> ClientMeasures:
        """Raises:
        KeyError: no such client sent anything.
        """
        for measures in self.clients:
            if measures.client == client:
                return measures
        raise KeyError(client)

    def figures(self) -> dict[str, float | None]:
        """Every number by its name; parts as ``ttft.p50``, ``difference.avg``, ``refused.rate_limited``."""
        return _flat(self) | {f"refused.{reason}": float(count) for reason, count in self.refused.items()}


PARTS: dict[str, type[Percentiles] | type[Difference]] = {
    "difference": Difference,
    "difference_with_refused": Difference,
    "ttft": Percentiles,
    "latency": Percentiles,
    "queueing": Percentiles,
}
NOT_FIGURES = {"scenario", "policy", "seed", "client", "clients", "refused"}


def figure_names(of: type[Measures] | type[ClientMeasures] = Measures) -> list[str]:
    """The names that ``figures()`` always has, in its order (reasons of refusal come on top)."""
    names: list[str] = []
    for field in fields(of):
        if field.name in PARTS:
            names.extend(f"{field.name}.{part.name}" for part in fields(PARTS[field.name]))
        elif field.name not in NOT_FIGURES:
            names.append(field.name)
    return names


def measure(run: RunRecord, cost: CostFunction | None = None, grid: Grid | None = None) -> Measures:
    """All figures of ``run``. ``cost`` is VTC's n_in + 2 n_out unless given; ``grid`` is made for duration_s.

    Raises:
        ConfigError: the run has no length.
    """
    grid = Grid.of(run.duration_s) if grid is None else grid
    curves = ServiceCurves(run, cost)
    came_in = [record for record in run.requests if record.outcome not in NOT_SERVED]
    outcomes = Counter(record.outcome for record in run.requests)
    clients = _clients(run, curves, grid.warm_up_s)
    received = curves.delivered([grid.warm_up_s, run.duration_s])
    backlogged = [
        float(received[row, 1] - received[row, 0])
        for row, client in enumerate(clients)
        if client.waiting_share >= BACKLOGGED_SHARE
    ]
    num_input = sum(record.num_input for record in came_in)
    num_output = sum(record.num_output for record in came_in)
    busy_span_s = _busy_span_s(came_in, run.duration_s)
    replica_s = run.num_replicas * curves.end_s
    throttled, cut = _refused_interactions(run.requests)
    return Measures(
        scenario=run.scenario,
        policy=run.policy,
        seed=run.seed,
        duration_s=run.duration_s,
        num_requests=len(run.requests),
        num_finished=outcomes["finished"],
        num_unfinished=outcomes["unfinished"],
        num_cancelled=outcomes["cancelled"],
        difference=_difference(curves.difference(grid)) if came_in else None,
        difference_with_refused=_difference(curves.difference(grid, with_refused=True)) if run.requests else None,
        accumulated_difference=float(curves.accumulated(grid).max()) if came_in else None,
        worst_gap=run.worst_gap,
        bound=run.bound if run.bound > 0 else None,
        gap_to_bound=run.worst_gap / run.bound if run.bound > 0 else None,
        jain=jain(backlogged) if len(backlogged) > 1 else None,
        num_backlogged=len(backlogged),
        ttft=delays(came_in, first_token, curves.end_s),
        latency=delays(came_in, last_token, curves.end_s),
        queueing=delays(came_in, grant, curves.end_s),
        tokens_per_s=(num_input + num_output) / busy_span_s,
        output_tokens_per_s=num_output / busy_span_s,
        num_input=num_input,
        num_output=num_output,
        cached_share=sum(record.num_cached for record in came_in) / num_input if num_input else None,
        num_wasted_tokens=run.num_wasted_tokens,
        num_refused=outcomes["refused"],
        num_cut=outcomes["cut"],
        num_throttled_interactions=throttled,
        num_cut_interactions=cut,
        idle_share=run.idle_while_waiting_s / replica_s,
        utilisation=run.busy_s / replica_s,
        num_preempted=run.num_preempted,
        num_recomputed=run.num_recomputed,
        num_lifts=run.num_lifts,
        num_lapsed=run.num_lapsed,
        refused=dict(sorted(Counter(r.reason or "refused" for r in run.requests if r.outcome == "refused").items())),
        clients=clients,
    )


def _clients(run: RunRecord, curves: ServiceCurves, warm_up_s: float) -> tuple[ClientMeasures, ...]:
    records: dict[str, list[RequestRecord]] = {client: [] for client in curves.clients}
    for record in run.requests:
        records[record.arrival.client].append(record)
    service = curves.delivered([curves.end_s])[:, 0]
    made = []
    for (client, ours), received in zip(records.items(), service, strict=True):
        came_in = [record for record in ours if record.outcome not in NOT_SERVED]
        outcomes = Counter(record.outcome for record in ours)
        waits = ((r.arrival.arrival_s, end_of_wait(r, curves.end_s)) for r in came_in)
        made.append(
            ClientMeasures(
                client=client,
                weight=ours[-1].arrival.weight,
                num_requests=len(ours),
                num_finished=outcomes["finished"],
                num_refused=outcomes["refused"],
                num_cut=outcomes["cut"],
                num_input=sum(record.num_input for record in came_in),
                num_cached=sum(record.num_cached for record in came_in),
                num_output=sum(record.num_output for record in came_in),
                service=float(received),
                waiting_share=covered(waits, warm_up_s, run.duration_s) / (run.duration_s - warm_up_s),
                ttft=delays(came_in, first_token, curves.end_s),
                latency=delays(came_in, last_token, curves.end_s),
                queueing=delays(came_in, grant, curves.end_s),
            )
        )
    return tuple(made)


def _difference(samples: Array) -> Difference:
    return Difference(float(samples.max()), float(samples.mean()), float(samples.var()))


def _busy_span_s(came_in: Sequence[RequestRecord], duration_s: float) -> float:
    """From 0 to the last finish; to the end of the run at least, if something is unfinished or nothing was done."""
    last = max((record.finished_s for record in came_in if record.finished_s is not None), default=0.0)
    is_open = last <= 0 or any(record.outcome == "unfinished" for record in came_in)
    return max(last, duration_s) if is_open else last


def _refused_interactions(records: Iterable[RequestRecord]) -> tuple[int, int]:
    """(throttled, cut). A request that stands alone is no interaction."""
    throttled: set[tuple[str, str]] = set()
    refused_later: set[tuple[str, str]] = set()
    for record in records:
        arrival = record.arrival
        if record.outcome == "refused" and arrival.interaction:
            (throttled if arrival.call_index == 0 else refused_later).add((arrival.client, arrival.interaction))
    return len(throttled), len(refused_later - throttled)


def _flat(item: Measures | ClientMeasures) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for name in figure_names(type(item)):
        whole, _, part = name.partition(".")
        value: Any = getattr(item, whole)
        if part:
            value = None if value is None else getattr(value, part)
        figures[name] = None if value is None else float(value)
    return figures
