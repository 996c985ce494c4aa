"""The counter actor's metrics, made once a second from the overview that people get (``fairserve.views.Overview``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fairserve import metric_table as table
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.dispatch.top_clients import TopClients
from fairserve.metric_table import OTHER, Metric

Row = Mapping[str, Any]
"""A ``fairserve.views.ClientView`` as plain values."""

SINCE_BEGAN = {
    table.LIFTS: "num_lifts",
    table.GRANTS: "num_granted",
    table.PREEMPTING_GRANTS: "num_preempted",
    table.LAPSED_LEASES: "num_lapsed",
    table.THROTTLED: "num_throttled",
}
"""Counters, and where the overview has them."""
FEWEST_ROWS = 50
ROUNDING = 1e-6
"""Less than this is the rounding of sums, not service."""
REPLICA_STATES = ("live", "stale", "draining")


class ActorMetrics:
    """``restored``: where this life's counters come from, a value of :data:`~fairserve.metric_table.RESTORED`."""

    def __init__(self, sink: MetricsSink, top_clients: int, restored: str) -> None:
        self._sink = sink
        self._top = TopClients(top_clients, OTHER)
        self.num_rows = max(FEWEST_ROWS, 2 * top_clients)
        """Clients to ask the overview for: those with a label and those that may come to have one."""
        self._restored = restored
        self._since: dict[Metric, float] = {}
        self._served: dict[str, tuple[float, ...]] = {}
        """By label: amounts of :func:`_amounts` at the last export; all clients' sum under ``""``."""
        self._due: dict[tuple[Metric, str, str], float] = {}
        """What a counter is behind; below zero after a refund, which a counter cannot show."""
        self._replicas: set[str] = set()

    def missing(self, overview: Mapping[str, Any]) -> list[str]:
        """Clients with a label that are not among the overview's."""
        shown = {row["name"] for row in overview["clients"]}
        return [name for name in self._top.labelled if name not in shown]

    def export(self, overview: Mapping[str, Any], row_of: Callable[[str], Row | None], now_s: float) -> None:
        """``row_of``: the row of each client in :meth:`missing`."""
        self._export_service_wide(overview)
        self._export_replicas(overview)
        rows: dict[str, Row] = {row["name"]: row for row in overview["clients"]}
        others = overview["others"]
        everybody = _sums([*rows.values(), *([others] if others is not None else [])])
        self._relabel(rows, overview, now_s)
        labelled: dict[str, Row] = {}
        for name in self._top.labelled:
            row = rows.pop(name, None) or row_of(name)
            if row is not None:
                labelled[name] = row
        rest = [*rows.values(), *([others] if others is not None else [])]
        self._export_clients(overview, labelled, rest)
        self._count_service(labelled, everybody)

    def _export_service_wide(self, overview: Mapping[str, Any]) -> None:
        set_, verdict = self._sink.set, overview["verdict"]
        set_(table.SERVICE_GAP, verdict["gap"])
        set_(table.SERVICE_GAP_WORST, verdict["worst_gap"])
        set_(table.SERVICE_GAP_BOUND, verdict["bound"])
        set_(table.IS_FAIR, float(verdict["is_fair"]))
        set_(table.JAIN_INDEX, verdict["jain"])
        set_(table.BACKLOGGED_CLIENTS, verdict["num_backlogged"])
        set_(table.KNOWN_CLIENTS, overview["num_clients"])
        set_(table.WAITING, overview["waiting"])
        set_(table.RUNNING, overview["running"])
        set_(table.OVERLOAD, float(overview["is_overloaded"]))
        set_(table.ACTOR_START, overview["started_s"])
        set_(table.EPOCH, overview["epoch"] / 1e9)
        set_(table.OVERVIEW_TIME, overview["built_in_s"])
        set_(table.ROUTERS, len(overview["routers"]))
        set_(table.RESTORED, 1.0, source=self._restored)
        for metric, field in SINCE_BEGAN.items():
            value, before = overview[field], self._since.get(metric, 0)
            self._sink.add(metric, value - before if value >= before else value)  # new settings begin at 0 again
            self._since[metric] = value

    def _export_replicas(self, overview: Mapping[str, Any]) -> None:
        replicas = overview["replicas"]
        states = {replica["name"]: "draining" if _is_leaving(replica) else replica["state"] for replica in replicas}
        for state in REPLICA_STATES:
            self._sink.set(table.REPLICAS, list(states.values()).count(state), state=state)
        ages = {r["name"]: 0.0 if states[r["name"]] == "draining" else r["report_age_s"] for r in replicas}
        for name in self._replicas - ages.keys():
            self._sink.set(table.REPORT_AGE, 0.0, replica=name)
        for name, age_s in ages.items():
            self._sink.set(table.REPORT_AGE, age_s, replica=name)
        self._replicas = set(ages)

    def _relabel(self, rows: Mapping[str, Row], overview: Mapping[str, Any], now_s: float) -> None:
        per_s, waiting = overview["service_per_s"] or 1.0, overview["waiting"] or 1
        activity = {name: row["service_per_s"] / per_s + row["waiting"] / waiting for name, row in rows.items()}
        for name in self._top.update(activity, now_s):
            self._served.pop(name, None)
            for metric in (table.CLIENT_WAITING, table.CLIENT_RUNNING, table.CLIENT_OLDEST_WAIT, table.CLIENT_LEAD):
                self._sink.set(metric, 0.0, client=name)  # until Ray forgets it

    def _export_clients(self, overview: Mapping[str, Any], labelled: Mapping[str, Row], rest: list[Row]) -> None:
        set_ = self._sink.set
        for name, row in labelled.items():
            set_(table.CLIENT_WAITING, row["waiting"], client=name)
            set_(table.CLIENT_RUNNING, row["running"], client=name)
            set_(table.CLIENT_OLDEST_WAIT, row["oldest_wait_s"], client=name)
            set_(table.CLIENT_LEAD, row["lead"], client=name)
            set_(table.CLIENT_WEIGHT, row["weight"], client=name)
        waiting, running = (sum(row[field] for row in labelled.values()) for field in ("waiting", "running"))
        set_(table.CLIENT_WAITING, max(0, overview["waiting"] - waiting), client=OTHER)
        set_(table.CLIENT_RUNNING, max(0, overview["running"] - running), client=OTHER)
        set_(table.CLIENT_OLDEST_WAIT, max((row["oldest_wait_s"] for row in rest), default=0.0), client=OTHER)
        unpaused = (row for row in (*labelled.values(), *rest) if not row.get("is_paused"))
        set_(table.OLDEST_WAIT, max((row["oldest_wait_s"] for row in unpaused), default=0.0))

    def _count_service(self, labelled: Mapping[str, Row], everybody: tuple[float, ...]) -> None:
        """What was served since the last export, to each label; a newly labelled client's share until now was and
        stays "other"'s."""
        if not self._served:
            self._served[""] = everybody
        left = list(_minus(everybody, self._served[""]))
        self._served = {name: self._served[name] for name in labelled if name in self._served}  # not the forgotten
        self._served[""] = everybody
        for name, row in labelled.items():
            amounts = _amounts(row)
            added = _minus(amounts, self._served.get(name, amounts))
            self._served[name] = amounts
            left = list(_minus(left, added))
            self._count(name, added)
        self._count(OTHER, left)

    def _count(self, label: str, added: tuple[float, ...] | list[float]) -> None:
        service, *tokens = added
        self._add(table.CLIENT_SERVICE, service, label)
        for kind, amount in zip(("input_computed", "input_cached", "output"), tokens, strict=True):
            self._add(table.CLIENT_TOKENS, amount, label, kind)

    def _add(self, metric: Metric, amount: float, client: str, kind: str = "") -> None:
        key = (metric, client, kind)
        due = self._due.pop(key, 0.0) + amount
        if due < ROUNDING:
            self._due[key] = due
        elif kind:
            self._sink.add(metric, due, client=client, kind=kind)
        else:
            self._sink.add(metric, due, client=client)


def _is_leaving(replica: Row) -> bool:
    """It said goodbye: nothing is on it, and it has room for nothing. What is silent from then on is no alarm."""
    return not any(replica[field] for field in ("free_kv_tokens", "running", "waiting", "granted_unconfirmed"))


def _amounts(row: Row) -> tuple[float, ...]:
    """Service, computed input, cached input, output."""
    return row["service"], row["num_input"] - row["num_cached"], row["num_cached"], row["num_output"]


def _sums(rows: list[Row]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*map(_amounts, rows), strict=True))) if rows else (0.0, 0.0, 0.0, 0.0)


def _minus(now: tuple[float, ...] | list[float], before: tuple[float, ...] | list[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(now, before, strict=True))
