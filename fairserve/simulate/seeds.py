"""Several seeds of one scenario under one policy, as one figure with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fairserve.errors import ConfigError
from fairserve.simulate.measures import Measures

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 97.5 % quantile of Student's t, for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean over ``num`` seeds, and half the width of its 95 % interval by Student's t; None for a single seed.

    Of 100 such sets of seeds, about 95 have an interval that holds the mean of all seeds, if the figure is nearly
    normal. One with two modes deserves to be looked at seed by seed.
    """

    mean: float
    half_width: float | None
    num: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


@dataclass(frozen=True, slots=True)
class Summary:
    """One scenario under one policy over its seeds."""

    scenario: str
    policy: str
    runs: tuple[Measures, ...]
    """In order of their seeds."""
    figures: Mapping[str, Estimate | None]
    """By the names of ``Measures.figures``; None where no seed has data. ``num`` of an estimate may be below the number
    of seeds; a reason of refusal that a seed does not have counts as 0 there."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def mean(self, figure: str) -> float | None:
        """Raises:
        KeyError: there is no figure of this name.
        """
        estimate = self.figures[figure]
        return None if estimate is None else estimate.mean

    def clients(self) -> dict[str, dict[str, Estimate | None]]:
        """The same for every client, by its name, over the seeds in which it sent something."""
        figures: dict[str, list[dict[str, float | None]]] = {}
        for run in self.runs:
            for client in run.clients:
                figures.setdefault(client.client, []).append(client.figures())
        return {client: _estimates(each) for client, each in sorted(figures.items())}


def summarise(runs: Sequence[Measures]) -> Summary:
    """
    Raises:
        ConfigError: no runs, runs of several scenarios or policies, or one seed twice.
    """
    if not runs:
        raise ConfigError("nothing to summarise: give the measures of at least one run")
    if len(kinds := sorted({(run.scenario, run.policy) for run in runs})) > 1:
        names = ", ".join(f"{scenario} under {policy}" for scenario, policy in kinds)
        raise ConfigError(f"a summary is of one scenario and one policy, these runs are of {len(kinds)}: {names}")
    ordered = tuple(sorted(runs, key=lambda run: run.seed))
    if len({run.seed for run in ordered}) < len(ordered):
        seeds = ", ".join(str(run.seed) for run in ordered)
        raise ConfigError(f"a seed that counts twice narrows the interval for nothing; the seeds are {seeds}")
    scenario, policy = kinds[0]
    return Summary(scenario, policy, ordered, _estimates([run.figures() for run in ordered]))


def estimate(values: Sequence[float]) -> Estimate | None:
    """None of nothing."""
    if not values:
        return None
    mean, num = statistics.fmean(values), len(values)
    if num == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, t_975(num - 1) * statistics.stdev(values) / math.sqrt(num), num)


def t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: from the table up to 30 degrees of freedom (>= 1), beyond by the first three
    terms of its expansion round the normal quantile, right to 5 digits."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _estimates(figures: Sequence[Mapping[str, float | None]]) -> dict[str, Estimate | None]:
    names = dict.fromkeys(name for each in figures for name in each)  # in order, each once
    estimates = {}
    for name in names:
        missing = 0.0 if name.startswith("refused.") else None
        values = (each.get(name, missing) for each in figures)
        estimates[name] = estimate([value for value in values if value is not None])
    return estimates
