"""The picture: service over time of every client, one panel per policy on the same scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measures import PolicyRun, figures_of, service_curve
from benchmarks.workload import CLIENTS, GREEDY, ON_OFF, STEADY

COLOURS = {GREEDY: "#D55E00", STEADY: "#0072B2", ON_OFF: "#009E73"}
"""Okabe and Ito's palette, told apart by every kind of colour vision; the dashes help in grey."""
DASHES = {GREEDY: "-", STEADY: "--", ON_OFF: "-."}
TITLES = {"fcfs": "First come, first served", "vtc": "fairserve (VTC)"}


def draw(runs: Sequence[PolicyRun], path: Path) -> None:
    """Write a PNG with one panel per run, side by side."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(
        1, len(runs), figsize=(5.6 * len(runs), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, made in zip(panels[0], runs, strict=True):
        figures = figures_of(made)
        for client in CLIENTS:
            times, service = service_curve(made.run, client)
            first_token = figures.of(client).ttft_p50
            label = f"{client}: first token after {first_token} s (p50)" if first_token else client
            panel.plot(times, service, DASHES[client], color=COLOURS[client], linewidth=2.2, label=label)
        panel.set_title(TITLES.get(made.policy, made.policy), loc="left", fontweight="bold")
        panel.set_xlabel("time, s")
        panel.set_xlim(0, made.run.duration_s)
        panel.grid(alpha=0.25)
        panel.legend(loc="upper left", frameon=False, fontsize=9.5)
    # Room for the legend above the lines, and one scale for all panels.
    panels[0][0].set_ylim(0, 1.25 * max(panel.get_ylim()[1] for panel in panels[0]))
    panels[0][0].set_ylabel("service received\n(1 per input token, 2 per output token)")
    figure.suptitle(
        "One client floods two modest ones, ten requests to one; '>': still waiting at the end",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
