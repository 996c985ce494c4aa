"""A dashboard as the JSON that Grafana reads, by provisioning or through its API.

Written by hand: `grafanalib` writes the schema of years ago, `grafana-foundation-sdk` (alpha) has no release on PyPI
for Grafana 12 or 13, and pip takes the one for 10.1 unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from fairserve.metric_table import COMMON_LABEL
from fairserve.observe.grafana_panels import BLUE, WIDTH, Dashboard, Mark, Panel, Row
from fairserve.observe.grafana_query import SHARE

SCHEMA_VERSION = 39
"""Of Grafana 10.4; later ones migrate it when they load it."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "fairserve"
"""On every dashboard and every annotation that was pushed."""
COUNTED = (
    "requests",
    "tokens",
    "service",
    "clients",
    "calls",
    "steps",
    "lifts",
    "leases",
    "replicas",
    "routers",
    "weight",
)
GRAFANA_UNITS = {
    "seconds": "s",
    "ratio": "none",
    "0 or 1": "none",
    SHARE: "percentunit",
    "service / weight": "short",
    "service / weight / s": "short",
    **dict.fromkeys(COUNTED, "short"),
    **{f"{unit} / s": "short" for unit in COUNTED},
}
"""The table's units, and rates of them, as Grafana calls them; the axis carries the table's word besides."""


def dashboard_json(dashboard: Dashboard, source_uid: str | None = None) -> dict[str, Any]:
    """As Grafana's provisioning and its API take it; the same for the same table. ``source_uid``: see ``documents``."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # one crosshair through all graphs
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_built_in(), _pushed(), *(_mark_json(mark) for mark in dashboard.marks)]},
        "links": [_link()],
        "templating": {"list": _variables(dashboard, source_uid)},
        "panels": _laid_out(dashboard.rows),
    }


def _laid_out(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Panels from left to right, wrapped at the grid's width, each row under its title."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        place = {"h": 1, "w": WIDTH, "x": 0, "y": top}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left, height = top + height, 0, 0
            place = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_panel_json(panel)})
            left, height = left + panel.width, max(height, panel.height)
        top += height
    return panels


def _panel_json(panel: Panel) -> dict[str, Any]:
    unit = panel.queries[0].expr.unit
    assert panel.kind == "table" or all(query.expr.unit == unit for query in panel.queries), f"{panel.title}: units"
    defaults: dict[str, Any] = {
        "unit": "short" if panel.kind == "table" else GRAFANA_UNITS[unit],
        "mappings": _mappings(panel.words),
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in panel.steps],
        },
        "color": {"mode": "palette-classic-by-name" if panel.kind == "timeseries" else "thresholds"},
    }
    if panel.empty_until:
        defaults["noValue"] = "none so far"
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        defaults |= {"min": 0, "custom": _line_style(panel, unit)}
    if panel.max_value is not None:
        defaults["max"] = panel.max_value
    json: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": _overrides(panel)},
        "options": _options(panel),
        "targets": [_target(panel, index) for index in range(len(panel.queries))],
    }
    if panel.kind == "table":
        json["transformations"] = _columns(panel)
    return json


def _target(panel: Panel, index: int) -> dict[str, Any]:
    query = panel.queries[index]
    is_instant = panel.kind != "timeseries"
    return {
        "refId": _ref(index),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr.text,
        "legendFormat": query.legend,
        "range": not is_instant,
        "instant": is_instant,
        "format": "table" if panel.kind == "table" else "time_series",
    }


def _ref(index: int) -> str:
    return chr(ord("A") + index)


def _line_style(panel: Panel, unit: str) -> dict[str, Any]:
    return {
        "axisLabel": "" if unit in ("seconds", SHARE) else unit,
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.is_stacked else 5,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if panel.is_stacked else "none"},
        "thresholdsStyle": {"mode": "line" if len(panel.steps) > 1 else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "colorMode": "background" if len(panel.steps) > 1 or panel.words else "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value",
        }
    if panel.kind == "table":
        return {"showHeader": True, "sortBy": [{"displayName": panel.queries[0].legend, "desc": True}]}
    is_wide = panel.width >= WIDTH // 2
    return {
        "legend": {
            "displayMode": "table" if is_wide else "list",
            "placement": "right" if is_wide else "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"] if is_wide else [],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    """A table's columns have units of their own; dashed lines are told by the letter of their query."""
    if panel.kind == "table":
        return [
            {
                "matcher": {"id": "byName", "options": query.legend},
                "properties": [{"id": "unit", "value": GRAFANA_UNITS[query.expr.unit]}],
            }
            for query in panel.queries
        ]
    dash = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}}
    return [
        {"matcher": {"id": "byFrameRefID", "options": _ref(index)}, "properties": [dash]}
        for index, query in enumerate(panel.queries)
        if query.is_dashed
    ]


def _columns(panel: Panel) -> list[dict[str, Any]]:
    names = {f"Value #{_ref(index)}": query.legend for index, query in enumerate(panel.queries)}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}},
    ]


def _mappings(words: tuple[tuple[float, str, str], ...]) -> list[dict[str, Any]]:
    if not words:
        return []
    options = {
        f"{value:g}": {"text": text, "color": colour, "index": i} for i, (value, text, colour) in enumerate(words)
    }
    return [{"type": "value", "options": options}]


def _variables(dashboard: Dashboard, source_uid: str | None) -> list[dict[str, Any]]:
    of_counters = f"label_values({dashboard.probe.prometheus}, {COMMON_LABEL})"
    of_clients = f'label_values({dashboard.of_clients.prometheus}{{{COMMON_LABEL}="${COMMON_LABEL}"}}, client)'
    every_one = {"includeAll": True, "allValue": ".*", "multi": True, "current": {"text": ["All"], "value": ["$__all"]}}
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "options": [],
            "regex": "",
            **({} if source_uid is None else {"current": {"text": source_uid, "value": source_uid}}),
        },
        _label_variable(COMMON_LABEL, "Service", of_counters) | {"includeAll": False, "multi": False},
        _label_variable("client", "Client", of_clients) | every_one,
    ]


def _label_variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "refresh": 2,  # with the time range
        "sort": 1,
        "hide": 0,
        "options": [],
        "regex": "",
    }


def _built_in() -> dict[str, Any]:
    return {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }


def _pushed() -> dict[str, Any]:
    """What ``fairserve grafana push --annotate`` left."""
    return {
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "iconColor": BLUE,
        "name": "Told by the operator",
        "target": {"type": "tags", "tags": [TAG], "matchAny": False, "limit": 100},
    }


def _mark_json(mark: Mark) -> dict[str, Any]:
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": mark.expr.text,  # where Grafana 10 looks; later ones in the target
        "target": {"refId": "Anno", "expr": mark.expr.text, "range": True, "instant": False},
        "iconColor": mark.colour,
        "name": mark.name,
        "step": "10s",
        "titleFormat": mark.name,
        "useValueForTime": "on",
    }


def _link() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "tags": [TAG],
        "title": "fairserve",
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }
