"""Prometheus finds every port, and the committed copies are those of deployments/monitoring."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.k8s.conftest import K8S, ROOT, Rendered
from tests.k8s.test_safety import matches

SOURCE = ROOT / "deployments" / "monitoring"
GENERATED = K8S / "components" / "monitoring" / "generated"
MAX_CONFIG_MAP_BYTES = 1_048_576


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", K8S / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_folder_is_what_generate_makes_now(generate: ModuleType, tmp_path: Path) -> None:
    generate.generate(SOURCE, tmp_path / "generated")
    made = {path.name: path.read_text() for path in (tmp_path / "generated").iterdir()}
    assert made == {path.name: path.read_text() for path in GENERATED.iterdir()}, "run: python k8s/generate.py"


def test_the_prometheus_rule_holds_the_rules_and_no_others(prod: Rendered) -> None:
    (rule,) = prod.of("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((SOURCE / "rules.yml").read_text())


def test_every_dashboard_has_a_config_map_of_its_own(prod: Rendered) -> None:
    maps = [one for one in prod.of("ConfigMap") if one["metadata"].get("labels", {}).get("grafana_dashboard") == "1"]
    held = {name: json.loads(text) for one in maps for name, text in one["data"].items()}
    assert held == {path.name: json.loads(path.read_text()) for path in (SOURCE / "grafana").glob("*.json")}
    assert all(len(one["data"]) == 1 for one in maps)
    assert all(len(text.encode()) < MAX_CONFIG_MAP_BYTES for one in maps for text in one["data"].values())


def test_the_monitors_select_our_pods_and_name_ports_that_these_have(prod: Rendered) -> None:
    scraped: dict[str, set[str]] = {role: set() for role in prod.pods}
    for monitor in prod.of("PodMonitor"):
        endpoints = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        for role, pod in prod.pods.items():
            if matches(monitor["spec"]["selector"], pod["metadata"]["labels"]):
                assert endpoints <= {port["name"] for port in pod["spec"]["containers"][0]["ports"]}, role
                scraped[role] |= endpoints
    assert scraped == {"head": {"metrics", "as-metrics", "dash-metrics"}, "front": {"metrics"}, "model": {"metrics"}}


def test_prometheus_may_reach_every_port_that_it_scrapes(prod: Rendered) -> None:
    (rule,) = prod.named("NetworkPolicy", "prometheus")["spec"]["ingress"]
    numbers = {port["name"]: port["containerPort"] for port in ports(prod)}
    scraped = {end["port"] for one in prod.of("PodMonitor") for end in one["spec"]["podMetricsEndpoints"]}
    assert {entry["port"] for entry in rule["ports"]} == {numbers[name] for name in scraped}


def ports(overlay: Rendered) -> list[dict[str, Any]]:
    return [port for pod in overlay.pods.values() for port in pod["spec"]["containers"][0]["ports"]]
