"""Panels, rows and dashboards as small values; :mod:`fairserve.observe.grafana_json` says them in Grafana's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fairserve.metric_table import Metric
from fairserve.observe.grafana_query import Expr

WIDTH = 24
"""Grid columns of a dashboard."""
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
Step = tuple[float | None, str]
"""From this value on, this colour; the first step's value is None."""
PLAIN: tuple[Step, ...] = ((None, GREEN),)


def from_zero(yellow: float, red: float) -> tuple[Step, ...]:
    """The more, the worse."""
    return ((None, GREEN), (yellow, YELLOW), (red, RED))


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. ``legend`` may name labels, as in ``{{client}}``; a table's is the column's heading."""

    expr: Expr
    legend: str
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. ``note`` comes before the table's meanings in its description; ``words``: a value's text and colour.

    ``empty_until``: the event without which there is no series to show, such as "a request is refused".
    """

    kind: Literal["stat", "timeseries", "table"]
    title: str
    queries: tuple[Query, ...]
    width: int
    height: int = 8
    note: str = ""
    empty_until: str = ""
    steps: tuple[Step, ...] = PLAIN
    words: tuple[tuple[float, str, str], ...] = ()
    is_stacked: bool = False
    max_value: float | None = None
    decimals: int | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        found = {metric.name: metric for query in self.queries for metric in query.expr.metrics}
        return tuple(found.values())

    @property
    def description(self) -> str:
        """Of the note, what must happen first, and the table's meaning of every metric that is read."""
        lines = [self.note] if self.note else []
        if self.empty_until:
            lines.append(f"Empty until {self.empty_until}.")
        return "\n\n".join([*lines, *(f"`{metric.prometheus}`: {metric.meaning}." for metric in self.metrics)])


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Moments drawn over every graph: ``expr`` gives Unix times in milliseconds."""

    name: str
    expr: Expr
    colour: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """``uid`` never changes: links and overwriting go by it. ``probe``: a gauge that every service exports."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...]
    probe: Metric
    of_clients: Metric

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def stat(title: str, expr: Expr, **rest: Any) -> Panel:
    """One large number, coloured by its steps or words."""
    defaults: dict[str, Any] = {"width": 4, "height": 4}
    return Panel("stat", title, (Query(expr, title),), **(defaults | rest))


def lines(title: str, queries: Sequence[Query], *, width: int = 12, **rest: Any) -> Panel:
    return Panel("timeseries", title, tuple(queries), width, **rest)


def columns(title: str, queries: Sequence[Query], *, width: int = WIDTH, **rest: Any) -> Panel:
    """One row per value of the label that all queries are grouped by, one column per query."""
    return Panel("table", title, tuple(queries), width, **rest)
