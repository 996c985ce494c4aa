"""What `make paper` states about a workload, each statement with whether it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from benchmarks.paper_cases import RPM, SCHEDULERS, Case
from benchmarks.table import Claim
from fairserve.simulate.seeds import Summary

APART = 1.2
"""Published averages that differ by this factor must come in the same order here."""
TOLERANCE = 0.15
"""Of an average difference, against the published one: one run there, the mean of the seeds here."""
SMALL = 3.0
"""Service/s: a difference below it is no difference."""
TOKENS_TOLERANCE = 0.05
REFUSED_TOLERANCE = 3
"""Requests that come just as a minute ends."""
LEAST_GAIN = 20.0
"""Times that FCFS's accumulated difference must be VTC's, on overload (published: 26)."""
EQUAL, UNEQUAL = 1.1, 1.2
"""Service of client-0 over client-1's after demand has shifted: at most so under VTC, at least so under LCF."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """All rows of one workload. ``ratios``: service of client-0 over client-1's in ``Case.window_s``, by row."""

    case: Case
    summaries: Mapping[str, Summary]
    ratios: Mapping[str, float]
    is_synthetic: bool = False
    """The arena trace was not there: what was published is of another."""

    def mean(self, row: str, figure: str) -> float:
        """Raises:
        KeyError: no such row was run.
        """
        value = self.summaries[row].mean(figure)
        assert value is not None, (row, figure)
        return value

    def published(self, row: str, figure: str) -> float | None:
        return None if self.is_synthetic else self.case.published_of(row).get(figure)

    def targets(self, figure: str) -> dict[str, tuple[float, float]]:
        """(published, ours) of the rows that were run, were published and are not excused."""
        pairs = {}
        for row in self.summaries:
            published = self.published(row, figure)
            if published is not None and row not in self.case.departs:
                pairs[row] = (published, self.mean(row, figure))
        return pairs

    def has(self, *rows: str) -> bool:
        return all(row in self.summaries for row in rows)


def claims(result: CaseResult) -> list[Claim]:
    return [claim for make in MAKERS for claim in make(result)]


def order(result: CaseResult) -> Iterator[Claim]:
    """The published order of the average differences."""
    pairs = []
    for (one, (low, ours)), (other, (high, theirs)) in combinations(result.targets("difference.avg").items(), 2):
        if max(low, high) >= APART * min(low, high):
            pairs.append((one, other, (low < high) == (ours < theirs)))
    if pairs:
        wrong = [f"{one} and {other}" for one, other, is_right in pairs if not is_right]
        text = f"published order: {len(pairs) - len(wrong)} of {len(pairs)} pairs that lie {APART - 1:.0%} apart"
        yield Claim(text + (f"; the other way round: {', '.join(wrong)}" if wrong else ""), not wrong)


def targets(result: CaseResult) -> Iterator[Claim]:
    """How far the average differences and the tokens/s are from the published ones."""
    for figure, name, tolerance, slack in (
        ("difference.avg", "average difference", TOLERANCE, SMALL),
        ("tokens_per_s", "tokens/s", TOKENS_TOLERANCE, 0.0),
    ):
        rows = result.targets(figure)
        if rows:
            off = {row: ours / published - 1 for row, (published, ours) in rows.items()}
            missed = [row for row, (pub, ours) in rows.items() if abs(ours - pub) > max(tolerance * pub, slack)]
            worst = max(off, key=lambda row: abs(off[row]))
            text = f"{name} against the published: {worst} {off[worst]:+.1%}"
            text += ", the others closer" if len(rows) > 1 else ""
            text += f" (allowed: {tolerance:.0%}" + (f", or {slack:g})" if slack else ")")
            yield Claim(text + (f"; missed by {', '.join(missed)}" if missed else ""), not missed)


def fairer(result: CaseResult) -> Iterator[Claim]:
    if result.has("fcfs", "vtc"):
        fcfs, vtc = (result.mean(row, "difference.avg") for row in ("fcfs", "vtc"))
        yield Claim(f"average difference: {fcfs:,.1f} under FCFS, {vtc:,.1f} under VTC", vtc < fcfs)
    if result.case.workload == "overload" and result.has("fcfs", "vtc"):
        fcfs, vtc = (result.mean(row, "accumulated_difference") for row in ("fcfs", "vtc"))
        text = (
            f"accumulated difference: {fcfs:,.0f} under FCFS, {vtc:,.0f} under VTC: {fcfs / max(vtc, 1e-9):.0f} times"
        )
        yield Claim(f"{text} (promised: {LEAST_GAIN:.0f})", fcfs >= LEAST_GAIN * vtc)


def shift(result: CaseResult) -> Iterator[Claim]:
    if result.case.window_s is not None and result.has("vtc", "lcf"):
        start_s, end_s = result.case.window_s
        vtc, lcf = result.ratios["vtc"], result.ratios["lcf"]
        text = f"{start_s:.0f} to {end_s:.0f} s, where both ask for as much: client-0 receives {lcf:.2f} times as much "
        text += f"as client-1 under LCF, {vtc:.2f} times under VTC (published: 1.30 and 1.00)"
        yield Claim(text, lcf >= UNEQUAL and 1 / EQUAL <= vtc <= EQUAL)


def throughput(result: CaseResult) -> Iterator[Claim]:
    if result.has("fcfs", "vtc"):
        ratio = result.mean("vtc", "tokens_per_s") / result.mean("fcfs", "tokens_per_s")
        least = result.case.least_tokens
        yield Claim(f"tokens/s of VTC over FCFS: {ratio:.1%} (promised: {least:.0%})", ratio >= least)


def refusals(result: CaseResult) -> Iterator[Claim]:
    """RPM refuses as many as published, and pays for its looks."""
    rows = {row: ours for row, ours in result.targets("num_refused").items() if row in RPM}
    if rows:
        text = ", ".join(f"{row} {ours:.0f} (published {published:.0f})" for row, (published, ours) in rows.items())
        right = all(abs(published - ours) <= REFUSED_TOLERANCE for published, ours in rows.values())
        yield Claim(f"refused of 1,500: {text}", right)
    if result.has("rpm(5)", "vtc") and not result.is_synthetic:
        ratio = result.mean("rpm(5)", "tokens_per_s") / result.mean("vtc", "tokens_per_s")
        yield Claim(f"tokens/s of rpm(5) over VTC: {ratio:.1%} (published: 43.7%)", ratio < 0.5)


def bounds(result: CaseResult) -> Iterator[Claim]:
    rows = [summary for row, summary in result.summaries.items() if SCHEDULERS[row].has_bound]
    runs = [(run, run.worst_gap, run.bound or 0.0) for summary in rows for run in summary.runs]
    if runs:
        run, gap, bound = max(runs, key=lambda each: each[1] / max(each[2], 1e-9))
        text = f"worst gap over bound, VTC with and without prediction, {len(runs)} runs: at most "
        text += f"{gap / max(bound, 1e-9):.2f} ({run.policy}: {gap:,.0f} of {bound:,.0f})"
        yield Claim(text, all(gap <= bound for _, gap, bound in runs))


MAKERS = (order, targets, fairer, shift, throughput, refusals, bounds)
