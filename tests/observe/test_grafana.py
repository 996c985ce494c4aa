"""Dashboards say what the metric table says, and what lies in the repository is the newest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairserve import metric_table as table
from fairserve.cli import main
from fairserve.metric_table import METRICS, RAY_LABELS
from fairserve.observe.grafana import FOLDER, dashboards, differences, documents, write
from fairserve.observe.grafana_json import GRAFANA_UNITS, dashboard_json
from fairserve.observe.grafana_panels import WIDTH, Dashboard, Panel, Query, Row, lines
from fairserve.observe.grafana_push import SOURCE_NAME, SOURCE_UID
from fairserve.observe.grafana_query import Expr, each_per, quantile, rate, value
from tests.observe.promql import faults, filled, series_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = documents()
NAMES = sorted(DOCUMENTS)


def expressions(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and PromQL of every panel's query and every annotation of a dashboard's JSON."""
    for panel in document["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in document["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]


def panels(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in document["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("name", NAMES)
def test_every_query_is_promql_and_reads_only_what_the_table_defines(name: str) -> None:
    found = {title: wrong for title, expr in expressions(DOCUMENTS[name]) if (wrong := faults(filled(expr)))}
    assert found == {}


@pytest.mark.parametrize(
    ("right", "planted", "fault"),
    [
        ("ray_fairserve_jain_index", "ray_fairserve_jain_indx", "ray_fairserve_jain_indx is not in the table"),
        ("ray_fairserve_lifts_total", "ray_fairserve_lifts", "ray_fairserve_lifts is not in the table"),
        ("by (reason)", "by (resaon)", "no resaon to group by"),
        ("by (outcome)", "by (WorkerId)", "no WorkerId to group by"),
        ('client=~"$client"', 'clients=~"$client"', "ray_fairserve_client_waiting has no label clients"),
    ],
)
def test_a_planted_typo_is_found(right: str, planted: str, fault: str) -> None:
    text = json.dumps(DOCUMENTS["fairserve-fairness.json"])
    assert json.dumps(right)[1:-1] in text
    document = json.loads(text.replace(json.dumps(right)[1:-1], json.dumps(planted)[1:-1]))
    assert fault in {wrong for _, expr in expressions(document) for wrong in faults(filled(expr))}


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("sum(ray_fairserve_grants_total)", "ray_fairserve_grants_total is a counter without a rate"),
        ("rate(ray_fairserve_waiting[1m])", "ray_fairserve_waiting is a gauge in a rate"),
    ],
)
def test_a_counter_without_a_rate_is_found_and_a_gauge_with_one(expr: str, fault: str) -> None:
    assert faults(expr) == [fault]


def test_what_is_not_promql_is_refused() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        faults("sum(ray_fairserve_waiting")


@pytest.mark.parametrize("name", NAMES)
def test_every_query_is_of_one_service_and_of_the_chosen_clients(name: str) -> None:
    for title, expr in expressions(DOCUMENTS[name]):
        for selector in expr.split("ray_fairserve_")[1:]:
            matchers = selector.split("{")[1].split("}")[0]
            assert 'counters="$counters"' in matchers, title
            if selector.startswith("client_"):
                assert 'client=~"$client"' in matchers, title


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_grouped_by_a_label_of_ray(name: str) -> None:
    text = " ".join(expr for _, expr in expressions(DOCUMENTS[name]))
    assert [label for label in RAY_LABELS if label in text] == []


def test_every_metric_of_the_table_is_on_a_dashboard() -> None:
    shown = {s for doc in DOCUMENTS.values() for _, expr in expressions(doc) for s in series_of(filled(expr))}
    assert [metric.name for metric in METRICS if not shown.intersection(metric.series)] == []


def test_every_unit_of_the_table_has_a_name_in_grafana() -> None:
    units = {metric.unit for metric in METRICS if metric.unit != "Unix time"}  # shown as ages
    assert units <= GRAFANA_UNITS.keys()
    assert {f"{metric.unit} / s" for metric in METRICS if metric.kind == "counter"} <= GRAFANA_UNITS.keys()


def test_a_panels_unit_is_its_metrics() -> None:
    seconds = lines("Wait", [Query(quantile(0.95, table.QUEUE_WAIT), "95 %")])
    tokens = lines("Tokens", [Query(rate(table.ENGINE_TOKENS, "kind"), "{{kind}}")])
    shown = panels(dashboard_json(a_dashboard(seconds, tokens)))
    units = [panel["fieldConfig"]["defaults"]["unit"] for panel in shown]
    axes = [panel["fieldConfig"]["defaults"]["custom"]["axisLabel"] for panel in shown]
    assert (units, axes) == (["s", "short"], ["", "tokens / s"])


def test_two_units_on_one_axis_are_refused() -> None:
    mixed = lines("Mixed", [Query(value(table.OLDEST_WAIT), "wait"), Query(value(table.WAITING), "requests")])
    with pytest.raises(AssertionError, match="Mixed: units"):
        dashboard_json(a_dashboard(mixed))


def test_a_gauge_of_the_one_actor_is_never_added_up_with_its_former_life() -> None:
    assert value(table.WAITING).text.startswith("max(")
    assert value(table.ENGINE_RUNNING, "replica").text.startswith("sum by (replica) (")


@pytest.mark.parametrize("name", NAMES)
def test_panels_are_told_in_the_tables_words(name: str) -> None:
    for panel in panels(DOCUMENTS[name]):
        read = {series for target in panel["targets"] for series in series_of(filled(target["expr"]))}
        wanted = {metric.meaning for metric in METRICS if read.intersection(metric.series)}
        assert wanted, panel["title"]
        assert all(meaning in panel["description"] for meaning in wanted), panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_side_by_side_within_the_grid(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DOCUMENTS[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DOCUMENTS[name]["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", NAMES)
def test_titles_and_letters_tell_panels_and_queries_apart(name: str) -> None:
    titles = [panel["title"] for panel in panels(DOCUMENTS[name])]
    assert len(titles) == len(set(titles))
    for panel in panels(DOCUMENTS[name]):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)) and len(letters) <= 26


def test_links_and_bookmarks_go_on_working() -> None:
    assert [document["uid"] for document in DOCUMENTS.values()] == ["fairserve-fairness", "fairserve-engine"]


@pytest.mark.parametrize("name", NAMES)
def test_the_data_source_is_chosen_in_grafana(name: str) -> None:
    variables = {variable["name"]: variable for variable in DOCUMENTS[name]["templating"]["list"]}
    assert list(variables) == ["datasource", "counters", "client"]
    assert variables["datasource"]["type"] == "datasource"
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels(DOCUMENTS[name]))


def test_a_data_source_that_was_made_is_the_one_that_dashboards_begin_with() -> None:
    for document in documents("our-prometheus").values():
        assert document["templating"]["list"][0]["current"]["value"] == "our-prometheus"


def test_a_new_epoch_is_an_annotation() -> None:
    for document in DOCUMENTS.values():
        marks = [mark for mark in document["annotations"]["list"] if "epoch_start_time" in mark.get("expr", "")]
        assert len(marks) == 1 and marks[0]["useValueForTime"] == "on"


def test_division_series_by_series_keeps_the_clients_name() -> None:
    expr = each_per(rate(table.CLIENT_SERVICE, "client"), value(table.CLIENT_WEIGHT, "client"), "client", "x")
    assert faults(filled(expr.text)) == [] and " / on (client) " in expr.text


def a_dashboard(*shown: Panel) -> Dashboard:
    return Dashboard("uid", "title", "", (Row("row", shown),), (), table.WAITING, table.CLIENT_WAITING)


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_dashboards_in_the_repository_are_the_newest() -> None:
    assert differences(ROOT / FOLDER) == []


def test_a_stale_a_missing_and_a_strange_file_are_told(tmp_path: Path) -> None:
    stale, missing = write(tmp_path)
    stale.write_text(stale.read_text().replace("Jain", "Jane"))
    missing.unlink()
    (tmp_path / "old.json").write_text("{}")
    told = "\n".join(differences(tmp_path))
    assert told == f"{missing} is missing\n{stale} is stale\n{tmp_path}/old.json is no dashboard of fairserve"


def test_the_command_writes_what_it_then_finds_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    assert main(["grafana", "build", "--out", str(folder), "--check"]) == 1
    assert main(["grafana", "build", "--out", str(folder)]) == 0
    assert main(["grafana", "build", "--out", str(folder), "--check"]) == 0
    (folder / "fairserve-engine.json").write_text("{}")
    assert main(["grafana", "build", "--out", str(folder), "--check"]) == 1
    assert "fairserve-engine.json is stale" in capsys.readouterr().err


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in write(tmp_path / "a")]
    assert [path.read_bytes() for path in write(tmp_path / "b")] == first


def test_a_dashboard_fits_into_a_config_map() -> None:
    for document in DOCUMENTS.values():
        assert len(json.dumps(document, indent=2)) < 500_000  # 1 MiB with all its keys


def test_every_dashboard_has_a_file() -> None:
    assert len(dashboards()) == len(DOCUMENTS)


def test_an_expression_knows_its_metrics() -> None:
    expr = Expr("sum(ray_fairserve_queue_wait_seconds_bucket) / max(ray_fairserve_waiting)", "share")
    assert [metric.name for metric in expr.metrics] == ["fairserve_waiting", "fairserve_queue_wait_seconds"]


def test_provisioned_files_and_a_push_name_the_same_data_source() -> None:
    folder = ROOT / FOLDER / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "fairserve.yml").read_text())["datasources"][0]
    assert (source["name"], source["uid"], source["type"]) == (SOURCE_NAME, SOURCE_UID, "prometheus")
    provider = yaml.safe_load((folder / "dashboards" / "fairserve.yml").read_text())["providers"][0]
    assert (provider["type"], provider["folder"]) == ("file", "fairserve")
