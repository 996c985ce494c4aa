"""One picture per run: what every client received over time, and how far apart clients were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairserve.errors import ConfigError
from fairserve.fairness.cost import CostFunction
from fairserve.simulate.records import RunRecord
from fairserve.simulate.service_curves import Array, Grid, ServiceCurves

MAX_LINES = 12
"""Clients drawn as a line, those that received most over all columns; the others share a grey band."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart by every kind of colour vision; the dashes make 12 of them."""
DASHES = ("-", (0, (4, 2)))
NUM_SAMPLES = 200
SUFFIXES = (".png", ".svg")


def draw(runs: Sequence[RunRecord], path: Path, cost: CostFunction | None = None) -> None:
    """Write a PNG or SVG, by the suffix of ``path``: a column per run (one, or a few to compare on the same scales),
    service / weight over time above, VTC's service difference below.

    Raises:
        ConfigError: another suffix, no run, a run without length, or no matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a chart is written as {' or '.join(SUFFIXES)}, not as {path.name!r}")
    if not runs:
        raise ConfigError("nothing to draw: give at least one run")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("charts need matplotlib: pip install 'fairserve[bench]'") from error

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fairserve"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4 * len(runs), 7.2), layout="constrained")
        panels = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
        all_curves = [ServiceCurves(run, cost) for run in runs]
        drawn = _most_served(runs, all_curves)
        for (above, below), run, curves in zip(panels.T, runs, all_curves, strict=True):
            _draw_service(above, run, curves, drawn)
            _draw_difference(below, run, curves)
        unit = "tokens, an output token twice" if cost is None else "units of the cost function"
        panels[0][0].set_ylabel(f"service / weight received\n({unit})")
        panels[0][0].yaxis.set_major_formatter("{x:,.0f}")
        panels[1][0].set_ylabel("difference\n(service / weight per s)")
        panels[0][0].set_ylim(0, 1.25 * panels[0][0].get_ylim()[1])  # room for the legend
        panels[1][0].set_ylim(bottom=0)
        for panel in panels.flat:
            panel.grid(alpha=0.25)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the date, the same run gives the same bytes.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def service_over_time(run: RunRecord, curves: ServiceCurves) -> tuple[Array, Array]:
    """(times in s, (clients, times) of service / weight), in the order of ``curves.clients``: the run's own samples, or
    without them what the records say."""
    if not run.service:
        times = np.linspace(0.0, run.duration_s, NUM_SAMPLES + 1)
        return times, curves.delivered(times)
    samples = [(time_s, service) for time_s, service in run.service if time_s <= run.duration_s]
    rows = [[service.get(client, 0.0) for _, service in samples] for client in curves.clients]
    return np.array([time_s for time_s, _ in samples]), np.array(rows, dtype=np.float64).reshape(-1, len(samples))


def _most_served(runs: Sequence[RunRecord], all_curves: Sequence[ServiceCurves]) -> list[str]:
    """The clients that have a line, the same colour in every column."""
    service: dict[str, float] = {}
    for run, curves in zip(runs, all_curves, strict=True):
        for client, received in zip(curves.clients, curves.delivered([run.duration_s])[:, 0], strict=True):
            service[client] = service.get(client, 0.0) + float(received)
    return sorted(service, key=lambda client: (-service[client], client))[:MAX_LINES]


def _draw_service(panel: Any, run: RunRecord, curves: ServiceCurves, drawn: Sequence[str]) -> None:
    times, service = service_over_time(run, curves)
    panel.set_title(_as_text(f"{run.scenario}, {run.policy}, seed {run.seed}"), loc="left", fontweight="bold")
    panel.set_xlim(0, run.duration_s)
    if not service.size:
        return
    rows = dict(zip(curves.clients, service, strict=True))
    for place, client in enumerate(drawn):
        if client in rows:
            colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS)]
            panel.plot(times, rows[client], color=colour, linestyle=dashes, linewidth=1.8, label=_as_text(client))
    others = np.array([rows[client] for client in rows if client not in drawn])
    if len(others):
        label = f"{len(others)} others, least to most"
        panel.fill_between(times, others.min(axis=0), others.max(axis=0), color="#999999", alpha=0.4, label=label)
    panel.legend(loc="upper left", frameon=False, fontsize=8, ncols=2 if len(drawn) > 6 else 1)


def _draw_difference(panel: Any, run: RunRecord, curves: ServiceCurves) -> None:
    grid = Grid.of(run.duration_s, NUM_SAMPLES)
    panel.plot(grid.times_s, curves.difference(grid), color="#000000", linewidth=1.6)
    title = f"service difference over {grid.window_s:g} s"
    if run.bound > 0:
        title += f"; worst gap while waiting {run.worst_gap:,.0f}, bound {run.bound:,.0f}"
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel("time, s")


def _as_text(name: str) -> str:
    """As matplotlib takes it literally: a $ opens a formula, and what begins with _ stays out of a legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
