"""A run's table as plain text and its data as JSON."""

from __future__ import annotations

import difflib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fairserve import __version__
from fairserve.errors import ConfigError
from fairserve.simulate.measures import figure_names
from fairserve.simulate.seeds import Estimate, Summary

HEADINGS = {
    "difference.max": "diff max /s",
    "difference.avg": "diff avg /s",
    "difference.var": "diff var",
    "difference_with_refused.avg": "diff avg /s, refused too",
    "accumulated_difference": "accumulated diff",
    "worst_gap": "worst gap",
    "gap_to_bound": "gap / bound",
    "num_backlogged": "backlogged",
    "ttft.p50": "TTFT p50 s",
    "ttft.p90": "TTFT p90 s",
    "ttft.p99": "TTFT p99 s",
    "latency.p50": "latency p50 s",
    "latency.p90": "latency p90 s",
    "latency.p99": "latency p99 s",
    "queueing.p50": "queueing p50 s",
    "queueing.p90": "queueing p90 s",
    "queueing.p99": "queueing p99 s",
    "tokens_per_s": "tokens/s",
    "output_tokens_per_s": "output tokens/s",
    "num_wasted_tokens": "wasted tokens",
    "num_throttled_interactions": "throttled",
    "num_cut_interactions": "cut short",
    "num_refused": "refused",
    "idle_share": "idle share",
    "cached_share": "cached share",
}
"""Headings of figures, with units; a figure without one goes by its name."""
COLUMNS = (
    "difference.avg",
    "difference.max",
    "worst_gap",
    "gap_to_bound",
    "jain",
    "ttft.p50",
    "ttft.p99",
    "tokens_per_s",
    "num_refused",
    "idle_share",
)
MAX_CLIENTS = 64
"""Clients that the JSON lists: those that received most."""

Published = Mapping[str, Mapping[str, float]]
"""policy -> figure -> the value that somebody published."""


def render_table(
    summaries: Sequence[Summary],
    columns: Sequence[str] = COLUMNS,
    published: Published | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Plain text, one row per summary, one column per figure: the mean over the seeds and its 95 % interval.

    A figure with published values for any of the policies has a column with them beside it. ``notes`` (policy -> one
    line) ends the row, under "why". Rows are named by policy, and by scenario too where there are several.

    Raises:
        ConfigError: no summary, or a column, policy or figure that does not exist.
    """
    if not summaries:
        raise ConfigError("nothing to show: give at least one summary")
    published, notes = published or {}, notes or {}
    _check_names(summaries, columns, published, notes)
    scenarios = list(dict.fromkeys(summary.scenario for summary in summaries))
    has_published = {name for row in published.values() for name in row}
    heading = (["scenario"] if len(scenarios) > 1 else []) + ["policy"]
    num_names = len(heading)
    for column in columns:
        heading += [HEADINGS.get(column, column)] + (["published"] if column in has_published else [])
    rows = [heading + (["why"] if notes else [])]
    for summary in summaries:
        row = ([summary.scenario] if len(scenarios) > 1 else []) + [summary.policy]
        for column in columns:
            row.append(_text(summary.figures.get(column)))
            if column in has_published:
                row.append(_number(published.get(summary.policy, {}).get(column)))
        rows.append(row + ([notes.get(summary.policy, "")] if notes else []))
    left = set(range(num_names)) | ({len(rows[0]) - 1} if notes else set())
    return "\n".join([_title(summaries, scenarios), "", *_aligned(rows, left)]) + "\n"


def as_json(summaries: Sequence[Summary], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What was run, with which versions, and per summary the estimates, every seed's figures and the clients
    (``MAX_CLIENTS`` of them), as plain values. None, never NaN, where there is no data.

    Nothing of the machine, its clock or its load is in it, and figures are cut to 6 significant digits: the same
    versions give the same bytes anywhere. ``settings`` go in as they are.
    """
    return {
        "versions": {"fairserve": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "settings": dict(settings or {}),
        "results": [_result(summary) for summary in summaries],
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as JSON, making folders as needed; the file is whole or not there.

    Raises:
        ConfigError: it holds a number that JSON has not (NaN, infinity), or something that is no plain value.
    """
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot write {path.name} as JSON: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_innermost_on_one_line(text) + "\n", encoding="utf-8")
    part.replace(path)


def _result(summary: Summary) -> dict[str, Any]:
    clients = summary.clients()
    most = sorted(clients, key=lambda client: -_mean(clients[client]["service"]))[:MAX_CLIENTS]
    result = {
        "scenario": summary.scenario,
        "policy": summary.policy,
        "seeds": list(summary.seeds),
        "duration_s": summary.runs[0].duration_s,
        "figures": {name: _estimate(value) for name, value in summary.figures.items()},
        "by_seed": [{"seed": run.seed, **run.figures()} for run in summary.runs],
        "num_clients": len(clients),
        "clients": {
            client: {name: _estimate(value) for name, value in clients[client].items()} for client in sorted(most)
        },
    }
    plain: dict[str, Any] = _plain(result)
    return plain


def _innermost_on_one_line(text: str) -> str:
    """JSON with line breaks stays the same JSON: those inside strings are escaped."""
    return re.sub(r"\{[^{}]*\}|\[[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text)


def _mean(value: Estimate | None) -> float:
    return 0.0 if value is None else value.mean


def _estimate(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _plain(value: Any) -> Any:
    """With floats cut to 6 significant digits, whole ones as integers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        if value == round(value):
            return int(value)
        return float(f"{value:.6g}")
    return value


def _check_names(
    summaries: Sequence[Summary], columns: Sequence[str], published: Published, notes: Mapping[str, str]
) -> None:
    figures = [*figure_names(), *(name for summary in summaries for name in summary.figures)]
    policies = [summary.policy for summary in summaries]
    for kind, wanted, known in (
        ("figure", [*columns, *(name for row in published.values() for name in row)], figures),
        ("policy in this table", [*published, *notes], policies),
    ):
        for name in wanted:
            if name not in known and not name.startswith("refused."):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(dict.fromkeys(known))}"
                raise ConfigError(f"there is no {kind} named {name!r}: {hint}")


def _title(summaries: Sequence[Summary], scenarios: Sequence[str]) -> str:
    numbers = sorted({len(summary.runs) for summary in summaries})
    seeds = (
        "1 seed" if numbers == [1] else f"{' or '.join(map(str, numbers))} seeds: mean ± 95 % interval (Student's t)"
    )
    return f"{', '.join(scenarios)}, {seeds}"


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """``left``: the columns that are text, the others are numbers."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _text(value: Estimate | None) -> str:
    if value is None:
        return "-"
    if not value.half_width:  # one seed, or the same in all
        return _number(value.mean)
    decimals = _decimals(value.mean, value.half_width)
    return f"{value.mean:,.{decimals}f} ± {value.half_width:,.{decimals}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.{_decimals(value)}f}"


def _decimals(value: float, half_width: float = 0.0) -> int:
    """As many as leave 3 or 4 digits; none for whole numbers."""
    if (value == round(value) and half_width == round(half_width)) or abs(value) >= 1000:
        return 0
    return 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
