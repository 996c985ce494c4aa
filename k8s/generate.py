"""Write components/monitoring/generated from deployments/monitoring: kustomize reads nothing outside its own folders.

::

    python k8s/generate.py            # after a change of the rules or of a dashboard
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "deployments" / "monitoring"
TARGET = ROOT / "k8s" / "components" / "monitoring" / "generated"
NOTE = "# Made by k8s/generate.py from deployments/monitoring: change it there.\n"


def generate(source: Path, target: Path) -> None:
    """Replace ``target`` by a PrometheusRule made of ``source``/rules.yml, a copy of every dashboard in
    ``source``/grafana, and the kustomization that makes one ConfigMap of each.

    Raises:
        FileNotFoundError: there is no rules.yml.
    """
    rules = yaml.safe_load((source / "rules.yml").read_text())
    dashboards = {path.stem: json.loads(path.read_text()) for path in sorted((source / "grafana").glob("*.json"))}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    _write(target / "prometheusrule.yaml", prometheus_rule(rules))
    for name, dashboard in dashboards.items():
        (target / f"{name}.json").write_text(json.dumps(dashboard, indent=1) + "\n")
    _write(target / "kustomization.yaml", kustomization(list(dashboards)))


def prometheus_rule(rules: dict[str, Any]) -> dict[str, Any]:
    """A rule file of Prometheus as the resource that its operator reads."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "fairserve", "namespace": "fairserve", "labels": {"release": "kube-prometheus-stack"}},
        "spec": rules,
    }


def kustomization(dashboards: list[str]) -> dict[str, Any]:
    """One ConfigMap for each dashboard: several in one soon pass the limit of 1 MiB."""
    made: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["prometheusrule.yaml"],
    }
    if dashboards:
        made["generatorOptions"] = {"disableNameSuffixHash": True, "labels": {"grafana_dashboard": "1"}}
        made["configMapGenerator"] = [
            {"name": _config_map(name), "namespace": "fairserve", "files": [f"{name}.json"]} for name in dashboards
        ]
    return made


def _config_map(name: str) -> str:
    return "grafana-" + name.lower().replace("_", "-")


class _Indented(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(NOTE + yaml.dump(document, Dumper=_Indented, sort_keys=False, width=110))


if __name__ == "__main__":
    generate(SOURCE, TARGET)
    print(f"wrote {len(list(TARGET.iterdir()))} files to {TARGET.relative_to(ROOT)}", file=sys.stderr)
