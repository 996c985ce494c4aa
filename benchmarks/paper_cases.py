"""What `make paper` runs, and what was published about it.

The published figures are those of the stored results of the VTC artifact (Ying1123/VTC-artifact at 192c2e2,
``fair_bench/*/all_results_*.jsonl``: one run each, one A10G, Llama-2-7B, M = 10,000), computed from the times of every
request with ``fairserve.simulate.measures``; where the paper has a table of them (arena, overload, overload_multi) they
are the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairserve.config import FairnessConfig

# ------------------------------------------------------------------------------------------------------- schedulers


@dataclass(frozen=True, slots=True)
class Row:
    """One scheduler. ``noise``: of the oracle, as a fraction of the length, where there is an oracle."""

    name: str
    fairness: FairnessConfig
    noise: float | None = None

    @property
    def has_bound(self) -> bool:
        """Its counters keep the bound of fairness/bounds.py."""
        return self.fairness.policy == "vtc"


def _row(name: str, *, noise: float | None = None, **fairness: Any) -> Row:
    return Row(name, FairnessConfig.model_validate({"prediction": "none"} | fairness), noise)


RPM = {f"rpm({limit})": _row(f"rpm({limit})", policy="rpm", rpm_limit=limit) for limit in (5, 10, 15, 20, 30)}
SCHEDULERS: Mapping[str, Row] = {
    row.name: row
    for row in (
        _row("fcfs", policy="fcfs"),
        *RPM.values(),
        _row("round_robin", policy="round_robin"),
        _row("lcf", policy="lcf"),
        _row("drr", policy="drr"),
        _row("dlpm", policy="dlpm"),
        _row("wsc", policy="wsc"),
        _row("vtc", policy="vtc"),
        _row("vtc+moving_mean", policy="vtc", prediction="moving_mean"),
        _row("vtc+oracle(50%)", policy="vtc", prediction="foretold", noise=0.5),
        _row("vtc+oracle", policy="vtc", prediction="foretold", noise=0.0),
        Row("default", FairnessConfig()),
    )
}
"""By name. ``default`` is fairserve as it comes; the oracle of ``vtc+oracle(50%)`` is wrong by up to 50 %."""

# -------------------------------------------------------------------------------------------------------- workloads

FIGURES = (
    "difference.max",
    "difference.avg",
    "difference.var",
    "tokens_per_s",
    "num_refused",
    "accumulated_difference",
)
"""What a row of ``Case.published`` holds, in this order; None where the published run is not comparable."""

Numbers = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One workload: ``workload`` with ``parameters``. ``rows`` None for all schedulers."""

    name: str
    workload: str
    published: Mapping[str, Numbers] = field(default_factory=dict)
    departs: Mapping[str, str] = field(default_factory=dict)
    """Rows whose average difference is no target, each with the reason."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What else a reader will wonder about, by row."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    horizon_s: float = 600.0
    """The artifact samples [0, 600 s], however long the workload is; ours follows, and goes to the end of a longer."""
    rows: tuple[str, ...] | None = None
    least_tokens: float = 0.97
    """Of FCFS's tokens/s, what VTC must reach at least."""
    window_s: tuple[float, float] | None = None
    """A stretch in which client-0 should receive as much as client-1 and, under LCF, receives more."""

    def published_of(self, row: str) -> dict[str, float]:
        numbers = self.published.get(row, ())
        return {name: number for name, number in zip(FIGURES, numbers, strict=False) if number is not None}

    def schedulers(self) -> list[Row]:
        """``default`` is left out where it is another row's twin."""
        if self.rows is not None:
            return [SCHEDULERS[name] for name in self.rows]
        rows = [row for row in SCHEDULERS.values() if self.workload == "arena" or row.name not in RPM]
        return [row for row in rows if row.name != "default" or twin_of_default() is None]


def twin_of_default() -> str | None:
    """The row that has the settings fairserve comes with."""
    default = SCHEDULERS["default"]
    return next((row.name for row in SCHEDULERS.values() if row.fairness == default.fairness and row != default), None)


LOCK_STEP = (
    "equal requests of few clients start and end together, so that the difference is near 0 or above 100, by chance"
)
ONE_DRAW = "an oracle that errs by chance: the published run is one draw of it"
COUNTS = "it counts requests, whatever they cost"
TYPICAL = "it counts requests of typical size, and a client of small ones pays for typical ones"

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            "arena",
            "arena",
            {
                "fcfs": (759.97, 433.53, 32112.0, 776.9, 0, 154034),
                "rpm(5)": (143.86, 83.58, 1020.5, 340.4, 919, 24692),
                "rpm(10)": (217.65, 128.24, 2767.4, 531.9, 600, 52422),
                "rpm(15)": (343.08, 161.06, 5188.8, 625.8, 447, 78289),
                "rpm(20)": (446.76, 195.72, 7449.8, 694.4, 342, 107856),
                "rpm(30)": (693.66, 309.45, 24221.4, 747.3, 176, 142777),
                "lcf": (750.49, 323.82, 29088.9, 778.4, 0, 119733),
                "vtc": (368.40, 251.66, 6549.1, 778.8, 0, 145560),
                "vtc+moving_mean": (365.46, 240.33, 5321.6, 773.4, 0, 142376),
                "vtc+oracle": (329.46, 227.51, 4475.8, 780.6, 0, 143687),
            },
            notes={
                "rpm(5)": "looks fairest by refusing most: what was refused is no demand in the artifact's figure",
                "round_robin": "as good as VTC here, because all clients' requests are alike on average",
            },
        ),
        Case(
            "overload",
            "overload",
            {
                "fcfs": (None, None, None, 875.6, 0, 237738),
                "vtc": (192.89, 103.77, 6981.3, 893.2, 0, 9050),
                "vtc+oracle(50%)": (33.98, 12.54, 111.9, 904.2, 0, 1789),
                "vtc+oracle": (5.87, 0.51, 1.7, 895.0, 0, 377),
            },
            departs={"vtc": LOCK_STEP, "vtc+oracle(50%)": ONE_DRAW, "vtc+oracle": LOCK_STEP},
            notes={"fcfs": "its published run lasted 600 s, with other demand after 360 s: see overload_600s"},
        ),
        Case(
            "overload_600s",
            "overload",
            {"fcfs": (447.37, 439.00, 30.6, 875.6, 0, 237738)},
            parameters={"duration_s": 600.0},
            rows=("fcfs", "vtc"),
        ),
        Case(
            "overload_multi",
            "overload_multi",
            {
                "fcfs": (247.88, 230.81, 1083.7, 874.9, 0, 34823),
                "vtc": (322.16, 162.20, 5151.3, 875.2, 0, 2976),
                "vtc+oracle(50%)": (99.43, 66.32, 487.1, 875.5, 0, 1277),
                "vtc+oracle": (43.24, 36.34, 56.5, 875.2, 0, 746),
            },
            departs={"vtc": LOCK_STEP, "vtc+oracle(50%)": ONE_DRAW},
        ),
        Case(
            "overload_weighted",
            "overload_weighted",
            notes={
                "fcfs": "weights 1 to 4 and equal demand; the published runs have demand 1 to 4, so they are no measure"
            },
        ),
        Case(
            "proportional",
            "proportional",
            {
                "fcfs": (157.24, 145.32, 70.4, 856.4, 0, 390417),
                "vtc": (25.72, 9.90, 41.5, 883.4, 0, 310537),
            },
            departs={"fcfs": "its published run was slow: 856 tokens/s for requests of which VTC's made 883"},
        ),
        Case(
            "on_off_less",
            "on_off_less",
            {
                "fcfs": (276.06, 115.84, 6774.5, 875.0, 0, 546184),
                "vtc": (69.46, 56.08, 248.3, 877.4, 0, 505162),
            },
        ),
        Case(
            "on_off_overload",
            "on_off_overload",
            {
                "fcfs": (1317.14, 433.48, 127849.2, 875.9, 0, 363415),
                "vtc": (222.74, 109.53, 4990.1, 879.3, 0, 7541),
            },
            departs={"vtc": LOCK_STEP},
        ),
        Case(
            "poisson_short_long",
            "poisson_short_long",
            {
                "fcfs": (354.87, 209.31, 8468.6, 1475.5, 0, 204786),
                "vtc": (132.68, 33.82, 839.3, 1444.6, 0, 5235),
            },
            notes={"round_robin": COUNTS, "wsc": TYPICAL},
        ),
        Case(
            "poisson_short_long_2",
            "poisson_short_long_2",
            {"vtc": (47.19, 13.67, 204.1, 1670.7, 0, 1281)},
            notes={
                "round_robin": COUNTS,
                "wsc": TYPICAL,
                "vtc": "FCFS mixes long prompts with long answers, which fill a batch better than either alone",
                "vtc+oracle": "answers of 512 tokens are charged when they start: charges are equal all the time, what "
                "was delivered swings with the batches of client-1",
            },
            least_tokens=0.85,
        ),
        Case(
            "poisson_short_long_2_300s",
            "poisson_short_long_2",
            {"fcfs": (1063.12, 693.26, 50766.4, 1923.1, 0, 605361)},
            parameters={"duration_s": 300.0},
            rows=("fcfs", "vtc"),
            least_tokens=0.85,
        ),
        Case(
            "poisson_on_off_overload",
            "poisson_on_off_overload",
            {
                "fcfs": (409.55, 140.38, 10644.1, 870.6, 0, 539916),
                "vtc": (106.29, 62.25, 887.6, 870.1, 0, 494036),
            },
        ),
        Case(
            "increase",
            "increase",
            {
                "fcfs": (89.83, 28.45, 839.6, 743.2, 0, 212399),
                "vtc": (23.20, 6.50, 55.4, 743.9, 0, 191891),
            },
            departs={"fcfs": "the published engine was 2.6 % slower in this run, so that the queue forms earlier"},
        ),
        Case(
            "dist_shift",
            "dist_shift",
            {
                "lcf": (186.00, 71.96, 4588.2, 898.7, 0, 351431),
                "vtc": (118.83, 30.87, 1346.4, 903.2, 0, 356222),
            },
            horizon_s=900.0,
            departs={"vtc": LOCK_STEP},
            window_s=(360.0, 600.0),
        ),
    )
}
