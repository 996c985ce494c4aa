"""The Grafana dashboards, made from the metric table: what is written, and whether what lies there is the newest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fairserve.observe.grafana_engine import engine_dashboard
from fairserve.observe.grafana_fairness import fairness_dashboard
from fairserve.observe.grafana_json import dashboard_json
from fairserve.observe.grafana_panels import Dashboard

FOLDER = Path("deployments/monitoring/grafana")
"""Where the repository keeps them."""


def dashboards() -> tuple[Dashboard, ...]:
    return (fairness_dashboard(), engine_dashboard())


def documents(source_uid: str | None = None) -> dict[str, dict[str, Any]]:
    """The dashboards as JSON values, by file name. ``source_uid``: the data source that they begin with; None takes
    Grafana's default Prometheus."""
    return {f"{dashboard.uid}.json": dashboard_json(dashboard, source_uid) for dashboard in dashboards()}


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def write(folder: Path) -> list[Path]:
    """Write every dashboard into ``folder``, which is made if need be; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, document in documents().items():
        path = folder / name
        path.write_text(_text(document))
        paths.append(path)
    return paths


def differences(folder: Path) -> list[str]:
    """One sentence for every file in ``folder`` that is not what :func:`write` would leave there."""
    wanted = {name: _text(document) for name, document in documents().items()}
    found = {path.name: path.read_text() for path in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    return [
        *(f"{folder / name} is missing" for name in wanted if name not in found),
        *(f"{folder / name} is stale" for name, text in wanted.items() if name in found and found[name] != text),
        *(f"{folder / name} is no dashboard of fairserve" for name in found if name not in wanted),
    ]
