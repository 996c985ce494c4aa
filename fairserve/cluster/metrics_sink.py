"""Where metrics go: Ray, nowhere, or into a test's hands. Importing this does not import Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fairserve.config import MetricsConfig
from fairserve.metric_table import COMMON_LABEL, SERVE_LABELS, Kind, Metric


class MetricsSink(Protocol):
    """Takes what is measured. ``labels`` are the metric's own, all of them. Calls are cheap and raise nothing."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """A gauge's value; Ray forgets one that is not set again for 20 s."""
        ...

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter; nothing happens for 0."""
        ...

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One value of a histogram."""
        ...


class NoMetrics:
    """Metrics are off."""

    def set(self, metric: Metric, value: float, **labels: str) -> None: ...
    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None: ...
    def observe(self, metric: Metric, value: float, **labels: str) -> None: ...


class RecordedMetrics:
    """Keeps everything, for tests; refuses what the table does not define."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        """Keyed by the metric's name and its labels' values, in the table's order."""
        self.counters: dict[tuple[str, ...], float] = {}
        self.histograms: dict[tuple[str, ...], list[float]] = {}

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.gauges[_key(metric, "gauge", labels)] = value

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        assert amount >= 0, f"{metric.name} cannot fall"
        if amount:
            key = _key(metric, "counter", labels)
            self.counters[key] = self.counters.get(key, 0.0) + amount

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.histograms.setdefault(_key(metric, "histogram", labels), []).append(value)

    @property
    def names(self) -> frozenset[str]:
        """Of every metric that has a value."""
        return frozenset(key[0] for kind in (self.gauges, self.counters, self.histograms) for key in kind)


def _key(metric: Metric, kind: Kind, labels: dict[str, str]) -> tuple[str, ...]:
    assert metric.kind == kind, f"{metric.name} is a {metric.kind}"
    assert labels.keys() == set(metric.labels), f"{metric.name} has labels {metric.labels}, not {tuple(labels)}"
    return (metric.name, *(labels[label] for label in metric.labels))


class RayMetrics:
    """Through ``ray.util.metrics``; each Ray metric is made at its first value, so an unused one can be pickled.

    ``tags``: values of the labels that every metric of this process has. One call takes about 3 us of CPU.
    """

    def __init__(self, tags: Mapping[str, str]) -> None:
        self._tags = dict(tags)
        self._record: dict[str, Callable[..., None]] = {}

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        (self._record.get(metric.name) or self._make(metric))(value, labels)

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        if amount > 0:
            (self._record.get(metric.name) or self._make(metric))(amount, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        (self._record.get(metric.name) or self._make(metric))(value, labels)

    def _make(self, metric: Metric) -> Callable[..., None]:
        from ray.util import metrics

        keys = (*metric.labels, *self._tags)
        made: Any
        record: Callable[..., None]
        if metric.kind == "gauge":
            made = metrics.Gauge(metric.name, metric.meaning, keys)
            record = made.set
        elif metric.kind == "counter":
            made = metrics.Counter(metric.name, metric.meaning, keys)
            record = made.inc
        else:
            made = metrics.Histogram(metric.name, metric.meaning, list(metric.boundaries), keys)
            record = made.observe
        made.set_default_tags(self._tags)
        self._record[metric.name] = record
        return record


NO_METRICS = NoMetrics()


def actor_metrics(config: MetricsConfig, counters: str) -> MetricsSink | None:
    """For the counter actor of this name; None when metrics are off."""
    return RayMetrics({COMMON_LABEL: counters}) if config.enabled else None


def deployment_metrics(config: MetricsConfig, counters: str) -> MetricsSink:
    """For the Serve replica that this process is, under Serve's own labels; nothing for any other process.

    ``ray.serve.metrics`` would add the same labels, and look up the request's context at every call besides.
    """
    if not config.enabled:
        return NO_METRICS
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
        values = (context.deployment, context.replica_tag, context.app_name)
    except RayServeException:  # a driver that holds a handle, and with it a router
        return NO_METRICS
    return RayMetrics({COMMON_LABEL: counters, **dict(zip(SERVE_LABELS, values, strict=True))})
