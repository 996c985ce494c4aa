"""PromQL made from rows of the metric table, so that a query cannot name what nobody exports.

Every query is narrowed to one service (variable ``counters``) and, where a metric has the label, to the chosen clients
(variable ``client``). Nothing is ever grouped by ``WorkerId`` or another of Ray's own labels: a restarted process must
not show as a second line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.metric_table import COMMON_LABEL, METRICS, Metric

RATE_OVER = "$__rate_interval"
"""Grafana puts in four scrape intervals or more, so that a rate never falls between two samples."""
SHARE = "share"
"""The unit of a ratio that is shown in percent."""


@dataclass(frozen=True, slots=True)
class Expr:
    """A PromQL expression. ``unit``: the table's word, with `` / s`` behind it for a rate, or :data:`SHARE`."""

    text: str
    unit: str

    def __truediv__(self, other: Expr) -> Expr:
        return Expr(f"{self.text} / {other.text}", SHARE)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The rows that it reads, in the table's order."""
        words = set(_words(self.text))
        return tuple(metric for metric in METRICS if words.intersection(metric.series))


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()


def select(metric: Metric, where: str = "", *, part: str = "") -> str:
    """The series of one metric; ``where`` is a further matcher, ``part`` is _bucket, _sum or _count."""
    matchers = [f'{COMMON_LABEL}="${COMMON_LABEL}"']
    if "client" in metric.labels:
        matchers.append('client=~"$client"')
    if where:
        matchers.append(where)
    return f"{metric.prometheus}{part}{{{', '.join(matchers)}}}"


def _group(how: str, by: tuple[str, ...], text: str) -> str:
    return f"{how} by ({', '.join(by)}) ({text})" if by else f"{how}({text})"


def value(metric: Metric, *by: str, how: str = "", where: str = "") -> Expr:
    """A gauge now. ``how``: sum, max or min over what the metric is not grouped by; by itself max where one actor says
    it, because an actor that died is still told of for some seconds, and sum over processes."""
    assert metric.kind == "gauge", f"{metric.name} is a {metric.kind}"
    how = how or ("max" if metric.source == "counter actor" else "sum")
    return Expr(_group(how, by, select(metric, where)), metric.unit)


def rate(metric: Metric, *by: str, where: str = "") -> Expr:
    """A counter's growth per second. The rate comes first: a restart resets a counter, never a sum of rates."""
    assert metric.kind == "counter", f"{metric.name} is a {metric.kind}"
    return Expr(_group("sum", by, f"rate({select(metric, where)}[{RATE_OVER}])"), f"{metric.unit} / s")


def quantile(share: float, metric: Metric, *by: str) -> Expr:
    """A quantile of a histogram, ``share`` in (0, 1)."""
    assert metric.kind == "histogram", f"{metric.name} is a {metric.kind}"
    buckets = _group("sum", (*by, "le"), f"rate({select(metric, part='_bucket')}[{RATE_OVER}])")
    return Expr(f"histogram_quantile({share:g}, {buckets})", metric.unit)


def age(metric: Metric) -> Expr:
    """Seconds since the newest Unix time of a gauge."""
    assert metric.unit == "Unix time", f"{metric.name} is in {metric.unit}"
    return Expr(f"time() - {value(metric).text}", "seconds")


def moment(metric: Metric) -> Expr:
    """A gauge of Unix times in milliseconds, as an annotation wants it."""
    assert metric.unit == "Unix time", f"{metric.name} is in {metric.unit}"
    return Expr(f"{value(metric).text} * 1000", "milliseconds")


def one_minus(expr: Expr) -> Expr:
    return Expr(f"1 - {expr.text}", expr.unit)


def while_positive(expr: Expr, condition: Expr, on: str) -> Expr:
    """Only the series whose ``condition`` of the same label ``on`` is above 0."""
    return Expr(f"({expr.text} and on ({on}) {condition.text} > 0)", expr.unit)


def each_per(expr: Expr, divisor: Expr, on: str, unit: str) -> Expr:
    """Divided series by series, matched by the label ``on``."""
    return Expr(f"{expr.text} / on ({on}) {divisor.text}", unit)


def part_of_all(expr: Expr) -> Expr:
    """Every series as a share of their sum."""
    return Expr(f"{expr.text} / scalar(sum({expr.text}))", SHARE)
