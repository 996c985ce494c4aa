"""What a PromQL expression reads, held against the metric table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser

from fairserve.metric_table import METRICS, Metric

BY_SERIES: dict[str, Metric] = {series: metric for metric in METRICS for series in metric.series}
RATES = {"rate", "increase", "irate"}


def filled(expr: str, counters: str = "counters", interval: str = "1m") -> str:
    """``expr`` with Grafana's variables put in, for all clients."""
    names = {"$__rate_interval": interval, "$counters": counters, "$client": ".*"}
    for name, value in names.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"an unknown variable in {expr}"
    return expr


def faults(expr: str) -> list[str]:
    """One sentence for everything that the table does not back. ``expr`` must be ``filled``; a ValueError says that it
    is not PromQL."""
    return list(_faults(promql_parser.parse(expr), is_in_rate=False))


def series_of(expr: str) -> set[str]:
    return set(_series(promql_parser.parse(expr)))


def _children(node: Any) -> Iterator[Any]:
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield child
    yield from getattr(node, "args", None) or []


def _series(node: Any) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for child in _children(node):
        yield from _series(child)


def _labels(node: Any) -> set[str]:
    """That some series below ``node`` may have."""
    found: set[str] = set()
    for name in _series(node):
        if name in BY_SERIES:
            found |= set(BY_SERIES[name].all_labels) | ({"le"} if name.endswith("_bucket") else set())
    return found


def _faults(node: Any, *, is_in_rate: bool) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield from _selector_faults(node, is_in_rate)
    if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
        yield from (f"no {label} to group by" for label in node.modifier.labels if label not in _labels(node))
    is_rate = isinstance(node, promql_parser.Call) and node.func.name in RATES
    for child in _children(node):
        yield from _faults(child, is_in_rate=is_in_rate or is_rate)


def _selector_faults(node: Any, is_in_rate: bool) -> Iterator[str]:
    metric = BY_SERIES.get(node.name)
    if metric is None:
        yield f"{node.name} is not in the table"
        return
    yield from (
        f"{node.name} has no label {matcher.name}"
        for matcher in node.matchers.matchers
        if matcher.name not in metric.all_labels
    )
    if (metric.kind == "gauge") == is_in_rate:
        yield f"{node.name} is a {metric.kind}" + (" in a rate" if is_in_rate else " without a rate")
