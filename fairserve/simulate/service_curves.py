"""Service and demand of every client over time, and the differences that VTC's artifact makes of them.

Source: VTC (arXiv 2401.00588) section 5.1 and its artifact. From the artifact's stored runs these definitions give
every figure of its tables again (tests/simulate/test_measures.py). What the paper leaves open, and matching decided:

- the grid is made for the length of the experiment, 600 s, whenever the last request came: 19 samples 28.5 s apart, the
  first at 30 + 28.5 s, the last at 571.5 s;
- demand counts a request whole at its arrival (service is spread), with the output that it turns out to make;
- a refused request is no demand: RPM's figures depend on it, with it RPM(5) would score 265.8 in place of 83.6;
- accumulated differences start at the end of the warm-up, not at 0; the published figure is the largest of the samples;
- a client all of whose requests were refused does not exist;
- tokens/s is (input + output tokens) / time of the last finish, so the time to drain the queue counts.

Amounts are service / weight: with weights, fair shares are equal only after the division. For weight 1 it is the
artifact's figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairserve.errors import ConfigError
from fairserve.fairness.cost import CostFunction, WeightedTokens
from fairserve.simulate.records import RequestRecord, RunRecord

Array = NDArray[np.float64]

NOT_SERVED = frozenset({"refused", "cut"})
"""Outcomes of requests that never came in."""


@dataclass(frozen=True, slots=True)
class Grid:
    """When differences are sampled. Rates are taken over ``window_s`` around each of ``times_s``; seconds."""

    warm_up_s: float
    window_s: float
    times_s: tuple[float, ...]

    @classmethod
    def of(cls, duration_s: float, num_samples: int = 19) -> Grid:
        """The artifact's grid at 600 s; the same warm-up and window for every run of 120 s or more, and a quarter and
        half of the run for a shorter one. The samples divide what follows the warm-up evenly.

        Raises:
            ConfigError: ``duration_s`` is not positive or ``num_samples`` is below 1.
        """
        if not 0 < duration_s < float("inf") or num_samples < 1:
            raise ConfigError(
                f"cannot sample a run of {duration_s} s at {num_samples} times: duration_s must be a positive number "
                "and num_samples at least 1"
            )
        warm_up_s = min(30.0, duration_s / 4)
        step_s = (duration_s - warm_up_s) / (num_samples + 1)
        return cls(warm_up_s, 2 * warm_up_s, tuple(warm_up_s + step_s * k for k in range(1, num_samples + 1)))


class ServiceCurves:
    """What every client of a run asked for and got, as functions of time.

    The service of a request is spread evenly from its first token to its last; without a first token, from its grant.
    An unfinished request has received what its record says by the end of the run. A request whose only token was its
    first counts at that moment (the artifact leaves it out; its runs have none).
    """

    def __init__(self, run: RunRecord, cost: CostFunction | None = None) -> None:
        cost = WeightedTokens() if cost is None else cost
        self.end_s = end_of(run)
        self.clients = tuple(sorted({record.arrival.client for record in run.requests}))
        """Order of the rows of every result."""
        place = {client: row for row, client in enumerate(self.clients)}
        records = sorted(run.requests, key=lambda record: place[record.arrival.client])
        rows = np.array([place[record.arrival.client] for record in records], dtype=np.intp)
        self._first_of_client = np.searchsorted(rows, np.arange(len(self.clients)))
        self._start = np.array([_start(record, self.end_s) for record in records], dtype=np.float64)
        self._end = np.array([_end(record, self.end_s) for record in records], dtype=np.float64)
        self._service = np.array([_service(record, cost) for record in records], dtype=np.float64)
        self._arrival = np.array([record.arrival.arrival_s for record in records], dtype=np.float64)
        self._demand = np.array([_demand(record, cost) for record in records], dtype=np.float64)
        self._came_in = np.array([record.outcome not in NOT_SERVED for record in records], dtype=np.bool_)
        self._exists = self._per_client(self._came_in[:, None].astype(np.float64))[:, 0] > 0

    def delivered(self, times_s: Sequence[float] | Array) -> Array:
        """Service / weight that each client has received by each time: (clients, times)."""
        times = np.asarray(times_s, dtype=np.float64)
        span = np.maximum(self._end - self._start, 1e-9)
        done = np.clip((times - self._start[:, None]) / span[:, None], 0.0, 1.0)
        return self._per_client(done * self._service[:, None])

    def service_rate(self, times_s: Sequence[float] | Array, window_s: float) -> Array:
        """service_i(t), per second over [t - window_s / 2, t + window_s / 2]: (clients, times)."""
        times = np.asarray(times_s, dtype=np.float64)
        return (self.delivered(times + window_s / 2) - self.delivered(times - window_s / 2)) / window_s

    def demand_rate(self, times_s: Sequence[float] | Array, window_s: float, *, with_refused: bool = False) -> Array:
        """demand_i(t), per second over the same window, of requests that arrive in it: (clients, times)."""
        distance = np.abs(np.asarray(times_s, dtype=np.float64) - self._arrival[:, None])
        counted = distance <= window_s / 2
        if not with_refused:
            counted &= self._came_in[:, None]
        return self._per_client(counted * self._demand[:, None]) / window_s

    def difference(self, grid: Grid, *, with_refused: bool = False) -> Array:
        """sum_j min(max_k service_k - service_j, |demand_j - service_j|) at every time of ``grid``, per second."""
        if not self.clients:
            return np.zeros(len(grid.times_s))
        service = self.service_rate(grid.times_s, grid.window_s)
        unmet = np.abs(self.demand_rate(grid.times_s, grid.window_s, with_refused=with_refused) - service)
        return np.asarray(np.minimum(service.max(axis=0) - service, unmet).sum(axis=0))

    def accumulated(self, grid: Grid) -> Array:
        """max_i - min_i of the service received since the warm-up ended, at every time of ``grid``."""
        if not self._exists.any():
            return np.zeros(len(grid.times_s))
        service = (self.delivered(grid.times_s) - self.delivered([grid.warm_up_s]))[self._exists]
        return np.asarray(service.max(axis=0) - service.min(axis=0))

    def _per_client(self, amounts: Array) -> Array:
        """Sums of (requests, times) over the requests of each client."""
        if not self.clients:
            return np.zeros((0, amounts.shape[1]))
        return np.asarray(np.add.reduceat(amounts, self._first_of_client, axis=0))


def end_of(run: RunRecord) -> float:
    """When the last thing happened: the run's length, or the last finish where the run went on until all was served."""
    finishes = (record.finished_s for record in run.requests if record.finished_s is not None)
    return max(run.duration_s, max(finishes, default=0.0))


def _start(record: RequestRecord, end_s: float) -> float:
    moments = (record.first_token_s, record.granted_s, record.finished_s)
    return next((moment for moment in moments if moment is not None), end_s)


def _end(record: RequestRecord, end_s: float) -> float:
    return end_s if record.finished_s is None else record.finished_s


def _service(record: RequestRecord, cost: CostFunction) -> float:
    if not record.num_input and not record.num_output:
        return 0.0
    return cost.service(record.num_input, record.num_output, record.num_cached) / record.arrival.weight


def _demand(record: RequestRecord, cost: CostFunction) -> float:
    """What it would have received unhindered: its whole length, or as far as its caller stays. Cached input is no
    demand, as it is no service."""
    arrival = record.arrival
    length = arrival.length if arrival.cancel_after is None else min(arrival.length, arrival.cancel_after)
    return cost.service(arrival.num_input, length, record.num_cached) / arrival.weight
