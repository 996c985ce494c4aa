"""Recording rules, alerts and Prometheus's configuration: promtool checks and runs them; names are the table's.

promtool is taken from FAIRSERVE_PROMTOOL or PATH; without one the tests that need it are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairserve.metric_table import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "deployments" / "monitoring"
SERIES = {name: metric for metric in METRICS for name in metric.series}
ALERTS = {
    "FairserveUnfair",
    "FairserveCounterActorDown",
    "FairserveStaleReplica",
    "FairserveStarvation",
    "FairserveRestoredFromScratch",
}


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


RULES = [rule for group in load("rules.yml")["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def promtool() -> str:
    found = os.environ.get("FAIRSERVE_PROMTOOL") or shutil.which("promtool")
    if found is None:
        pytest.skip("promtool (of Prometheus) is neither on PATH nor named by FAIRSERVE_PROMTOOL")
    return found


def run(promtool: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *words], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("words", [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml")])
def test_prometheus_takes_these_files(promtool: str, words: tuple[str, ...]) -> None:
    done = run(promtool, *words)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_not_just_below(promtool: str) -> None:
    done = run(promtool, "test", "rules", "rules.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("threshold", "moved"),
    [
        ("fairserve_is_fair) == 0", "fairserve_is_fair) == 1"),
        ("< 0.8", "< 0.81"),
        (">= 2", ">= 1"),
        ("[2m])) > 5", "[2m])) > 4"),
        ("> 300", "> 299"),
        ("< 900", "< 920"),
        ("_degraded) == 1", "_degraded) >= 0"),
    ],
)
def test_the_tests_of_the_alerts_notice_a_threshold_that_moved(
    promtool: str, tmp_path: Path, threshold: str, moved: str
) -> None:
    rules = (FOLDER / "rules.yml").read_text()
    assert rules.count(threshold) == 1
    (tmp_path / "rules.yml").write_text(rules.replace(threshold, moved))
    shutil.copy(FOLDER / "rules.test.yml", tmp_path)
    done = run(promtool, "test", "rules", str(tmp_path / "rules.test.yml"))
    assert done.returncode != 0


def test_the_alerts_that_the_service_promises_are_there() -> None:
    assert {rule["alert"] for rule in RULES if "alert" in rule} == ALERTS
    tested = {case["alertname"] for test in load("rules.test.yml")["tests"] for case in test.get("alert_rule_test", ())}
    assert tested == ALERTS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rules_name_only_series_and_labels_that_the_table_defines(rule: dict[str, Any]) -> None:
    named = set(re.findall(r"\bray_\w+", rule["expr"]))
    assert named and named <= SERIES.keys(), named - SERIES.keys()
    known = {label for name in named for label in (*SERIES[name].all_labels, "le")}
    for labels in re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"]):
        assert {label.strip() for label in labels.split(",")} <= known
    for matchers in re.findall(r"\{([^}]*)\}", rule["expr"]):
        assert {part.split("=")[0].strip(' !~"') for part in matchers.split(",")} <= known


@pytest.mark.parametrize("rule", [rule for rule in RULES if "alert" in rule], ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert "counters" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 80
