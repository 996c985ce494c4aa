"""How the commands show the views in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fairserve.views import (
    AuditView,
    BudgetView,
    ClientView,
    CounterView,
    EventView,
    KeyView,
    Overview,
    ReplicaView,
    SettingView,
)

PIPE_WIDTH = 200
"""Columns where nobody says how many there are."""
NUM_EVENTS = 5
STATES = {"live": "green", "stale": "yellow", "draining": "cyan"}


def console() -> Console:
    """Of this process's stdout: as wide as the terminal, without colours in a pipe."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def overview(view: Overview) -> Group:
    """Everything at a glance: verdict, totals, clients, replicas, the newest events."""
    head = Text(view.verdict.text, style="bold green" if view.verdict.is_fair else "bold red")
    totals = [
        f"{view.model}, {view.policy}, prediction {view.prediction}",
        f"{view.waiting:,} waiting, {view.running:,} running",
        f"{view.tokens_per_s:,.0f} tokens/s",
        f"Jain {view.verdict.jain:.3f} of {view.verdict.num_backlogged} that wait",
        f"{view.num_clients:,} clients, {len(view.routers)} routers",
        "OVERLOAD" if view.is_overloaded else "",
    ]
    shown = [*view.clients, view.others] if view.others else view.clients
    parts: list[Any] = [head, Text("; ".join(filter(None, totals))), clients(shown), replicas(view.replicas)]
    if view.events:
        parts.append(events(view.events[:NUM_EVENTS]))
    return Group(*parts)


def clients(views: Iterable[ClientView]) -> Table:
    table = _table(
        "client", "weight", "waiting", "running", "oldest s", "wait s", "service/s", "service", "lead", "limits"
    )
    shown = list(views)
    for view in shown:
        style = "yellow" if view.is_paused else ""
        cells = [f"{view.weight:g}", f"{view.waiting:,}", f"{view.running:,}"]
        cells += [f"{view.oldest_wait_s:.1f}", f"{view.mean_wait_s:.1f}", f"{view.service_per_s:,.1f}"]
        _row(
            table,
            [view.name, *cells, f"{view.service:,.0f}", f"{view.lead:,.0f}", limits(view, len(shown) == 1)],
            style,
        )
    return table


def limits(view: ClientView, is_alone: bool) -> str:
    """What was set live for this client, but for its weight, and its budgets; beside others the one that is passed, or
    nearest to it."""
    words = ["paused"] if view.is_paused else []
    words += [f"waiting <= {view.max_waiting}"] if view.max_waiting is not None else []
    words += [f"{view.requests_per_min} a minute"] if view.requests_per_min is not None else []
    if is_alone:
        words += [f"{one.used:,} of {_most(one)} tokens a {one.window} ({one.of})" for one in view.budgets]
    elif view.budgets:
        nearest = max(view.budgets, key=_use)
        passed, part = _use(nearest)
        words.append(f"{(f'{part:.0%} of', 'past the soft', 'spent the')[passed]} {nearest.window} ({nearest.of})")
    return ", ".join(words)


def _use(budget: BudgetView) -> tuple[int, float]:
    """2 where it is spent, 1 where its soft mark is passed, else 0; then the part of it that is used."""
    hard, soft, used = budget.hard, budget.soft, budget.used
    level = 2 if hard is not None and used >= hard else 1 if soft is not None and used >= soft else 0
    return level, used / (hard or soft or 1)


def _most(budget: BudgetView) -> str:
    words = [f"{budget.soft:,} (soft)"] if budget.soft is not None else []
    return " and ".join(words + ([f"{budget.hard:,}"] if budget.hard is not None else []))


def counters(views: Iterable[CounterView]) -> Table:
    table = _table("client", "weight", "counter", "lead")
    for view in views:
        _row(table, [view.name, f"{view.weight:g}", f"{view.counter:,.1f}", f"{view.lead:,.1f}"])
    return table


def replicas(views: Iterable[ReplicaView]) -> Table:
    table = _table("replica", "state", "running", "slots", "waiting", "granted", "KV use", "tokens/s", "report age s")
    for view in views:
        used = 1 - view.free_kv_tokens / view.kv_capacity_tokens if view.kv_capacity_tokens else 0.0
        cells = [view.running, view.max_slots, view.waiting, view.granted_unconfirmed, f"{used:.0%}"]
        rest = [f"{view.tokens_per_s:,.0f}", f"{view.report_age_s:.1f}"]
        _row(table, [view.name, Text(view.state, STATES[view.state]), *cells, *rest])
    return table


def events(views: Iterable[EventView]) -> Table:
    table = _table("time", "event", "what", right=False)
    for view in views:
        _row(table, [_clock(view.time_s), view.kind, view.text + (f" ({view.count} times)" if view.count > 1 else "")])
    return table


def audit(views: Iterable[AuditView]) -> Table:
    table = _table("time", "who", "action", "target", "before", "after", right=False)
    for view in views:
        _row(table, [_clock(view.time_s), view.who, view.action, view.target, _pairs(view.before), _pairs(view.after)])
    return table


def keys(views: Iterable[KeyView]) -> Table:
    table = _table("id", "client", "weight", "max waiting", "applications", "source", "created", right=False)
    for view in views:
        most = "" if view.max_waiting is None else view.max_waiting
        made = "" if view.created_s is None else _clock(view.created_s)
        _row(table, [view.id, view.client, f"{view.weight:g}", most, " ".join(view.applications), view.source, made])
    return table


def settings(views: Iterable[SettingView]) -> Table:
    table = _table("setting", "value", "deployed", "", right=False)
    for view in views:
        _row(table, [view.path, view.value, view.deployed, "set live" if view.is_live else ""])
    return table


def _table(*columns: str, right: bool = True) -> Table:
    """The first column is a name; ``right``: the others are numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if right and i else "left", overflow="fold")
    return table


def _row(table: Table, cells: Sequence[Any], style: str = "") -> None:
    """Cells are shown as they are: what looks like markup in them is text."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells), style=style)


def _clock(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s):%Y-%m-%d %H:%M:%S}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
