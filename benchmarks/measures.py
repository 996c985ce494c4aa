"""From records and samples to the numbers that the table and the chart show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.load import Record, Run
from benchmarks.workload import CLIENTS


@dataclass(frozen=True, slots=True)
class Quantile:
    """Seconds. ``at_least``: the request had not come so far when the run ended, so the true value is larger."""

    value_s: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>' if self.at_least else ''}{self.value_s:.2f}"


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """One client in one run. ``service`` is in the units of the cost function, tokens are model tokens."""

    client: str
    weight: float
    num_sent: int
    num_finished: int
    num_failed: int
    num_input: int
    num_output: int
    service: float
    ttft_p50: Quantile | None
    ttft_p99: Quantile | None
    queueing_p50: Quantile | None
    queueing_p99: Quantile | None


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. ``worst_gap`` is service / weight between two clients that both waited throughout an interval, and
    ``bound`` what VTC allows; both None where the counter actor was not asked."""

    policy: str
    duration_s: float
    clients: list[ClientFigures]
    tokens_per_s: float
    output_tokens_per_s: float
    worst_gap: float | None
    bound: float | None

    def of(self, client: str) -> ClientFigures:
        return next(figures for figures in self.clients if figures.client == client)


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """A run and the policy it was made under."""

    policy: str
    run: Run

    def to_json(self) -> dict[str, Any]:
        return {"policy": self.policy, "figures": asdict(figures_of(self)), **asdict(self.run)}


def quantile(values: Sequence[tuple[float, bool]], share: float) -> Quantile | None:
    """The nearest-rank quantile of (seconds, whether only at least so many); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Quantile(*ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def time_to_first_token(records: Sequence[Record], duration_s: float) -> list[tuple[float, bool]]:
    """For every request that was not refused: seconds to its first text, or its age at the end where none came.

    Leaving the latter out would flatter the policy that lets requests wait longest.
    """
    return [
        (record.first_s - record.submit_s, False)
        if record.first_s is not None
        else (duration_s - record.submit_s, True)
        for record in records
        if record.error is None
    ]


def queueing(records: Sequence[Record], duration_s: float) -> list[tuple[float, bool]]:
    """The same for the wait that the server reported; nothing where it reports none."""
    if all(record.queue_s is None for record in records):
        return []
    return [
        (record.queue_s, False) if record.queue_s is not None else (duration_s - record.submit_s, True)
        for record in records
        if record.error is None
    ]


def delivered(run: Run, client: str, field: str) -> float:
    """What the counter actor says ``client`` got during the run: ``service``, ``num_input`` or ``num_output``.

    Without its answers, the usage of finished requests stands in, at 1 per input and 2 per output token.
    """
    if run.samples:
        first, last = (sample["clients"].get(client, {}).get(field, 0) for sample in (run.samples[0], run.samples[-1]))
        return float(last - first)
    ours = [record for record in run.records if record.client == client]
    num_input, num_output = sum(record.num_input for record in ours), sum(record.num_output for record in ours)
    return float({"service": num_input + 2 * num_output, "num_input": num_input, "num_output": num_output}[field])


def figures_of(made: PolicyRun, clients: Sequence[str] = CLIENTS) -> Figures:
    """All numbers of one run."""
    run = made.run
    rows = [_client_figures(run, client) for client in clients]
    num_output = sum(row.num_output for row in rows)
    last = run.samples[-1] if run.samples else {}
    return Figures(
        policy=made.policy,
        duration_s=run.duration_s,
        clients=rows,
        tokens_per_s=(num_output + sum(row.num_input for row in rows)) / run.duration_s,
        output_tokens_per_s=num_output / run.duration_s,
        worst_gap=last.get("worst_gap"),
        bound=last.get("bound"),
    )


def service_curve(run: Run, client: str) -> tuple[list[float], list[float]]:
    """(seconds since the start, service received by then), for the chart."""
    if not run.samples:
        ours = [record for record in run.records if record.client == client and record.finish_s is not None]
        ours.sort(key=lambda record: record.finish_s or 0.0)
        times, total = [0.0], [0.0]
        for record in ours:
            times.append(record.finish_s or 0.0)
            total.append(total[-1] + record.num_input + 2 * record.num_output)
        return times, total
    before = run.samples[0]["clients"].get(client, {}).get("service", 0.0)
    return (
        [sample["t_s"] for sample in run.samples],
        [sample["clients"].get(client, {}).get("service", before) - before for sample in run.samples],
    )


def _client_figures(run: Run, client: str) -> ClientFigures:
    ours = [record for record in run.records if record.client == client]
    first_token = time_to_first_token(ours, run.duration_s)
    waited = queueing(ours, run.duration_s)
    known = run.samples[-1]["clients"].get(client, {}) if run.samples else {}
    return ClientFigures(
        client=client,
        weight=known.get("weight", 1.0),
        num_sent=len(ours),
        num_finished=sum(record.finish_s is not None for record in ours),
        num_failed=sum(record.error is not None for record in ours),
        num_input=int(delivered(run, client, "num_input")),
        num_output=int(delivered(run, client, "num_output")),
        service=delivered(run, client, "service"),
        ttft_p50=quantile(first_token, 0.5),
        ttft_p99=quantile(first_token, 0.99),
        queueing_p50=quantile(waited, 0.5),
        queueing_p99=quantile(waited, 0.99),
    )
