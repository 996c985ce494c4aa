"""What the demo prints: a table per policy, then the comparison in plain sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.measures import Figures, Quantile
from benchmarks.workload import MODEST

MIN_TTFT_GAIN = 5.0
"""The modest clients' TTFT p50 under VTC is to be so many times better than under FCFS."""
MIN_TOKENS_RATIO = 0.97
"""Tokens/s under VTC over tokens/s under FCFS."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence about the comparison, and whether what fairserve promises was kept."""

    text: str
    kept: bool


def policy_table(figures: Figures) -> Table:
    """One row per client; times in seconds."""
    table = Table(title=f"{figures.policy.upper()}, {figures.duration_s:.0f} s", title_justify="left")
    table.add_column("client")
    columns = ["weight", "sent", "finished", "tokens in", "tokens out", "service"]
    for name in [*columns, "TTFT p50 s", "TTFT p99 s", "queueing p50 s", "queueing p99 s"]:
        table.add_column(name, justify="right")
    for row in figures.clients:
        sent = f"{row.num_sent}" + (f" ({row.num_failed} failed)" if row.num_failed else "")
        counts = [f"{row.weight:g}", sent, *(f"{n:,.0f}" for n in (row.num_finished, row.num_input, row.num_output))]
        times = [row.ttft_p50, row.ttft_p99, row.queueing_p50, row.queueing_p99]
        table.add_row(row.client, *counts, f"{row.service:,.0f}", *(_text(value) for value in times))
    rates = f"{figures.tokens_per_s:.1f} tokens/s in all, {figures.output_tokens_per_s:.1f} of them output"
    table.caption = rates + "; " + _gap_text(figures)
    table.caption_justify = "left"
    return table


def claims(fcfs: Figures, vtc: Figures) -> list[Claim]:
    """What the demo is to show, as far as these two runs can tell."""
    made = []
    for client in MODEST:
        before, after = fcfs.of(client).ttft_p50, vtc.of(client).ttft_p50
        if before is None or after is None:
            made.append(Claim(f"{client}: no request came through, nothing to compare", kept=False))
            continue
        gain = before.value_s / max(after.value_s, 1e-9)
        text = f"{client}: TTFT p50 {before} s under FCFS, {after} s under VTC: "
        text += f"{'at least ' if before.at_least else ''}{gain:.1f} times better (promised: {MIN_TTFT_GAIN:g})"
        made.append(Claim(text, kept=gain >= MIN_TTFT_GAIN and not after.at_least))
    made.append(tokens_claim([(fcfs.tokens_per_s, vtc.tokens_per_s)]))
    if vtc.worst_gap is not None and vtc.bound is not None:
        text = (
            f"VTC: service of clients that both waited differed by at most {vtc.worst_gap:,.0f}, bound {vtc.bound:,.0f}"
        )
        made.append(Claim(text, kept=vtc.worst_gap <= vtc.bound))
    return made


def tokens_claim(pairs: Sequence[tuple[float, float]]) -> Claim:
    """The ratio of tokens/s over (FCFS, VTC) pairs; the median and, of several, each one and an interval for it."""
    ratios = [vtc / max(fcfs, 1e-9) for fcfs, vtc in pairs]
    ratio = statistics.median(ratios)
    if len(pairs) == 1:
        text = f"tokens/s: {pairs[0][0]:.1f} under FCFS, {pairs[0][1]:.1f} under VTC: {ratio:.1%}"
    else:
        each = ", ".join(f"{one:.1%}" for one in ratios)
        text = f"tokens/s of VTC over FCFS, {len(pairs)} alternating pairs: median {ratio:.1%} of {each}"
        interval = median_interval(ratios)
        if interval is not None:
            low, high, confidence = interval
            text += f"; the true median within {low:.1%} to {high:.1%} ({confidence:.0%} confidence)"
    return Claim(f"{text} (promised: {MIN_TOKENS_RATIO:.0%})", kept=ratio >= MIN_TOKENS_RATIO)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float] | None:
    """The narrowest interval between two ranks, as many from either end, that holds the true median with at least this
    confidence, and the confidence that it has; whatever the distribution. None for too few values (six for 95 %)."""
    ordered, num = sorted(values), len(values)
    for rank in range(num // 2, 0, -1):
        below = sum(math.comb(num, i) for i in range(rank)) / 2**num
        if 1 - 2 * below >= confidence:
            return ordered[rank - 1], ordered[num - rank], 1 - 2 * below
    return None


def _gap_text(figures: Figures) -> str:
    if figures.worst_gap is None or figures.bound is None:
        return "worst service gap unknown (no counter actor)"
    return f"worst service gap while both were backlogged {figures.worst_gap:,.0f}, VTC's bound {figures.bound:,.0f}"


def _text(value: Quantile | None) -> str:
    return "-" if value is None else str(value)
