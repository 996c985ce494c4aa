"""Every query of every dashboard finds data in a real Prometheus, once everything in the table has happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fairserve.metric_table import METRICS
from fairserve.observe.grafana import dashboards
from tests.observe.prometheus_kit import PROGRAM, WHY_NOT, Prometheus, exporting, prometheus, wait_until
from tests.observe.promql import filled

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
QUERIES = [
    filled(query.expr.text, interval="5s")
    for dashboard in dashboards()
    for panel in dashboard.panels
    for query in panel.queries
]
MARKS = [filled(mark.expr.text) for dashboard in dashboards() for mark in dashboard.marks]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes a page with every series of the table."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with exporting(METRICS) as target, prometheus(folder, [target]) as server:
        yield server


def test_every_query_and_every_annotation_finds_data(full: Prometheus) -> None:
    wait_until(lambda: not full.without_data([*QUERIES, *MARKS]), 60)
    assert full.without_data([*QUERIES, *MARKS]) == []


def test_a_query_of_what_nobody_exports_finds_none(full: Prometheus) -> None:
    assert full.without_data(["max(ray_fairserve_jain_indx)"]) == ["max(ray_fairserve_jain_indx)"]


def test_shares_of_all_clients_add_up_to_one(full: Prometheus) -> None:
    received, due = (
        filled(query.expr.text, interval="5s")
        for dashboard in dashboards()
        for panel in dashboard.panels
        if panel.title == "Share received against share due"
        for query in panel.queries
    )
    assert wait_until(lambda: len(full.values(received)) == 2, 60)
    assert sum(full.values(received)) == pytest.approx(1)
    assert full.values(due) == [0.5, 0.5]
