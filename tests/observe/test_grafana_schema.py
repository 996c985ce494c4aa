"""Dashboards against Grafana's own types. Runs where ``FAIRSERVE_GRAFANA_SCHEMA`` is the folder of
``npm install --prefix FOLDER @grafana/schema@13 typescript``.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fairserve.observe.grafana import documents

NODE = Path(os.environ.get("FAIRSERVE_GRAFANA_SCHEMA", "no-such-folder"))
TSC = NODE / "node_modules" / ".bin" / "tsc"
pytestmark = pytest.mark.skipif(
    not TSC.exists(), reason="FAIRSERVE_GRAFANA_SCHEMA names no folder with typescript in it"
)

RAW = "@grafana/schema/dist/esm/raw"
HEAD = f"""
import type {{ Dashboard }} from "{RAW}/dashboard/x/Dashboard_types.gen";
import type * as Stat from "{RAW}/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as Lines from "{RAW}/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type * as Table from "{RAW}/composable/table/panelcfg/x/TablePanelCfg_types.gen";
type Said<T> = T extends string ? `${{T}}` : T extends (infer U)[] ? Said<U>[]
  : T extends object ? {{ [K in keyof T]?: Said<T[K]> }} : T;
"""
"""``Said``: an enum's values as JSON says them, and no field required."""
OF_SOURCE = ("expr", "step", "titleFormat", "useValueForTime", "target")
"""Fields of an annotation that are its data source's own; the schema leaves them out."""
OPTIONS = {"stat": "Stat.Options", "timeseries": "Lines.Options", "table": "Table.Options"}


def statements(document: dict[str, Any]) -> Iterator[str]:
    """The whole, then the options of every panel by the type of its kind, which the whole leaves open."""
    marks = [{k: v for k, v in mark.items() if k not in OF_SOURCE} for mark in document["annotations"]["list"]]
    yield f"({json.dumps({**document, 'annotations': {'list': marks}})}) satisfies Said<Dashboard>;"
    for panel in document["panels"]:
        if panel["type"] != "row":
            yield f"({json.dumps(panel['options'])}) satisfies Said<{OPTIONS[panel['type']]}>;"
            custom = panel["fieldConfig"]["defaults"].get("custom")
            if custom is not None:
                yield f"({json.dumps(custom)}) satisfies Said<Lines.FieldConfig>;"


def errors(*docs: dict[str, Any]) -> str:
    """What the TypeScript compiler finds."""
    file = NODE / f"{uuid.uuid4().hex}.mts"  # beside node_modules, where it looks for the types
    file.write_text(HEAD + "\n".join(line for document in docs for line in statements(document)))
    try:
        words = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", file.name]
        done = subprocess.run([TSC, *words], cwd=NODE, capture_output=True, text=True, check=False, timeout=200)
        return done.stdout + done.stderr
    finally:
        file.unlink()


def test_the_dashboards_are_what_grafana_calls_a_dashboard() -> None:
    assert errors(*documents().values()) == ""


def _tooltip(document: dict[str, Any]) -> None:
    document["graphTooltip"] = 9


def _colour(document: dict[str, Any]) -> None:
    document["panels"][1]["options"]["colorMode"] = "rainbow"


def _style(document: dict[str, Any]) -> None:
    lines = next(panel for panel in document["panels"] if panel["type"] == "timeseries")
    lines["fieldConfig"]["defaults"]["custom"]["fillOpacty"] = 5


def test_planted_errors_are_found() -> None:
    planted = []
    for spoil in (_tooltip, _colour, _style):
        document = copy.deepcopy(documents()["fairserve-fairness.json"])
        apply: Callable[[dict[str, Any]], None] = spoil
        apply(document)
        planted.append(document)
    found = errors(*planted)
    assert found.count("error TS") == 3
    assert all(word in found for word in ("DashboardCursorSync", "rainbow", "fillOpacty"))
