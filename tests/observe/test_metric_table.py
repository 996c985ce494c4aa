"""The table of metrics is whole, and its page says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fairserve.metric_table import BY_NAME, METRICS, Metric
from fairserve.observe.metrics import markdown

PAGE = Path(__file__).resolve().parents[2] / "deployments" / "monitoring" / "metrics.md"
ROWS = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@ROWS
def test_every_row_says_what_it_measures(metric: Metric) -> None:
    assert re.fullmatch("fairserve_[a-z_]+[a-z]", metric.name)
    assert not metric.name.endswith(("_total", "_bucket", "_sum", "_count")), "Prometheus puts that behind names itself"
    assert metric.meaning and metric.unit
    assert (metric.unit == "seconds") == metric.name.endswith("_seconds") or metric.unit == "Unix time"
    assert all(re.fullmatch("[a-z_]+", label) for label in metric.labels)


@ROWS
def test_a_histogram_and_only_a_histogram_has_boundaries_that_rise(metric: Metric) -> None:
    assert bool(metric.boundaries) == (metric.kind == "histogram")
    assert list(metric.boundaries) == sorted(set(metric.boundaries))
    assert all(boundary > 0 for boundary in metric.boundaries), "Ray refuses others"


def test_no_name_is_taken_twice_and_none_hides_in_the_series_of_another() -> None:
    assert len(BY_NAME) == len(METRICS)
    series = [one for metric in METRICS for one in metric.series]
    assert len(set(series)) == len(series)


def test_names_are_those_that_ray_gives_to_prometheus() -> None:
    assert BY_NAME["fairserve_lifts"].series == ("ray_fairserve_lifts_total",)
    assert BY_NAME["fairserve_waiting"].series == ("ray_fairserve_waiting",)
    assert BY_NAME["fairserve_request_seconds"].series[0] == "ray_fairserve_request_seconds_bucket"


def test_the_page_for_people_holds_the_table() -> None:
    assert markdown() in PAGE.read_text(), "renew it with: python -m fairserve.observe.metrics"
