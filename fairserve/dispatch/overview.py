"""The service at a glance, as plain values of the shapes in ``views.py``.

Whatever looks at many clients is a generator that pauses every ``SLICE`` of them, so that decisions come between.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice
from typing import Any

from fairserve.dispatch.capacity import ReplicaRoom
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.events import event_view
from fairserve.dispatch.pages import SLICE
from fairserve.dispatch.verdict import verdict
from fairserve.fairness.hierarchy import group_of, is_group

ACTIVE_S = 60.0
"""Clients with a request in the last so many seconds may stand in the overview."""
NUM_EVENTS = 50
OTHERS = "other"

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Moment:
    """One look at the dispatcher. ``unix_offset_s``: Unix time minus the authority's."""

    dispatcher: Dispatcher
    now_s: float
    unix_offset_s: float
    active: Sequence[str] = ()
    """Clients that wait, run, or had a request within ``ACTIVE_S``."""
    least: dict[str, float] | None = None
    """By group: the least counter among clients that wait or run."""


def look(dispatcher: Dispatcher, now_s: float, unix_offset_s: float) -> Generator[None, None, Moment]:
    """Who is active, and from where leads are counted."""
    busy = dict.fromkeys((*dispatcher.queue.backlog.clients(), *dispatcher.leases.clients()))
    least: dict[str, float] = {}
    for part in slices(busy):
        for client in part:
            group, counter = group_of(client), dispatcher.queue.counter(client)
            if counter < least.get(group, counter + 1):
                least[group] = counter
        yield
    recent = dispatcher.recent.active_since(now_s - ACTIVE_S)
    active = tuple(dict.fromkeys((*busy, *dispatcher.room.paused(), *recent)))
    return Moment(dispatcher, now_s, unix_offset_s, active, least)


def client_view(moment: Moment, client: str) -> Values:
    """As ``views.ClientView``."""
    dispatcher, now_s = moment.dispatcher, moment.now_s
    recent, totals = dispatcher.recent, dispatcher.ledger.totals(client)
    control = dispatcher.controls.of(client)
    first = dispatcher.room.first(client)
    waiting, running = dispatcher.room.num_waiting(client), dispatcher.leases.num_of(client)
    seen_s = now_s if waiting or running else recent.seen_s(client)
    return {
        "name": client,
        "weight": dispatcher.queue.table.weight(client),
        "is_paused": control.is_paused,
        "max_waiting": control.max_waiting,
        "requests_per_min": control.requests_per_min,
        "counter": dispatcher.queue.counter(client),
        "lead": lead(moment, client),
        "waiting": waiting,
        "running": running,
        "oldest_wait_s": 0.0 if first is None else max(0.0, now_s - first.arrived_s),
        "mean_wait_s": recent.mean_wait_s(client, now_s),
        "service": totals.service,
        "service_per_s": recent.service_per_s(client, now_s),
        "num_input": totals.num_input,
        "num_cached": totals.num_cached,
        "num_output": totals.num_output,
        "num_refused": recent.num_refused.get(client, 0),
        "last_active_s": None if seen_s is None else seen_s + moment.unix_offset_s,
        "budgets": dispatcher.budgets.views(client),
    }


def lead(moment: Moment, client: str) -> float:
    """0 when none of its siblings waits or runs."""
    counter = moment.dispatcher.queue.counter(client)
    return counter - (moment.least or {}).get(group_of(client), counter)


def busiest(moment: Moment, num: int) -> Generator[None, None, list[str]]:
    """Of those that are active, by service of the last 10 s, then by waiting requests, then by name."""
    recent, room, now_s = moment.dispatcher.recent, moment.dispatcher.room, moment.now_s
    first: list[tuple[float, int, str]] = []
    for part in slices(moment.active):
        first = nsmallest(num, first + [(-recent.service_per_s(c, now_s), -room.num_waiting(c), c) for c in part])
        yield
    return [client for _, _, client in first]


def overview(moment: Moment, top: int) -> Generator[None, None, Values]:
    """As ``views.Overview``, without what only the actor knows: ``built_in_s``, ``started_s``, ``prediction``,
    ``model``."""
    dispatcher, now_s, offset_s = moment.dispatcher, moment.now_s, moment.unix_offset_s
    recent, queue = dispatcher.recent, dispatcher.queue
    names = yield from busiest(moment, top)
    clients = []
    for name in names:
        clients.append(client_view(moment, name))
        if len(clients) % 50 == 0:
            yield
    num_clients = len(queue.table) - (len(queue.groups) - 1)
    others = None
    if num_clients > len(clients):
        others = yield from _others(moment, clients)
    return {
        "time_s": now_s + offset_s,
        "epoch": dispatcher.epoch,
        "policy": queue.policy.name,
        "is_overloaded": dispatcher.throttle.overload.is_on,
        "verdict": verdict(dispatcher, recent),
        "waiting": len(dispatcher.room),
        "running": len(dispatcher.leases),
        "routers": [
            {"name": session.router, "requests": len(session.requests), "call_age_s": now_s - session.heard_s}
            for session in dispatcher.sessions
        ],
        "replicas": [replica_view(moment, room) for room in sorted(dispatcher.capacity, key=lambda room: room.name)],
        "tokens_per_s": recent.all_tokens_per_s(now_s),
        "service_per_s": recent.all_service_per_s(now_s),
        "num_clients": num_clients,
        "num_granted": dispatcher.num_granted,
        "num_refused": dispatcher.num_refused,
        "num_throttled": dispatcher.throttle.num_throttled,
        "num_lifts": dispatcher.num_lifts,
        "num_preempted": dispatcher.num_granted_over,
        "num_lapsed": dispatcher.num_lapsed,
        "clients": clients,
        "others": others,
        "events": [event_view(event, offset_s) for event in dispatcher.events.newest(NUM_EVENTS)],
    }


def replica_view(moment: Moment, room: ReplicaRoom) -> Values:
    """As ``views.ReplicaView``."""
    dispatcher, age_s = moment.dispatcher, moment.now_s - room.heard_s
    state = "draining" if room.is_draining else "stale" if age_s > dispatcher.limits.replica_stale_s else "live"
    return {
        "name": room.name,
        "state": state,
        "report_age_s": age_s,
        "running": room.num_running,
        "waiting": room.num_waiting,
        "max_slots": room.max_slots,
        "free_kv_tokens": max(0, room.room_tokens),
        "kv_capacity_tokens": room.kv_capacity_tokens,
        "granted_unconfirmed": len(room.unconfirmed),
        "tokens_per_s": dispatcher.recent.tokens_per_s(room.name, moment.now_s),
    }


def _others(moment: Moment, clients: Sequence[Values]) -> Generator[None, None, Values]:
    """All further clients. What grows is summed over all of them; weight and waits are of those that are active."""
    dispatcher, now_s = moment.dispatcher, moment.now_s
    recent, whole = dispatcher.recent, dispatcher.ledger.whole
    shown = {client["name"] for client in clients}
    weight = oldest_s = wait_s = 0.0
    num_waits, seen_s = 0, None
    for part in slices([client for client in moment.active if client not in shown]):
        for client in part:
            weight += dispatcher.queue.table.weight(client)
            if dispatcher.queue.backlog.has(client):  # paused clients wait because somebody wants them to
                oldest_s = max(oldest_s, now_s - dispatcher.queue.backlog.head(client)[1].arrived_s)
            mean_s = recent.mean_wait_s(client, now_s)
            if mean_s:
                num_waits, wait_s = num_waits + 1, wait_s + mean_s
            seen_s = max(seen_s or 0.0, recent.seen_s(client) or 0.0)
        yield

    def rest(total: float, field: str) -> Any:
        return max(0, total - sum(client[field] for client in clients))

    return {
        "name": OTHERS,
        "weight": weight,
        "counter": 0.0,
        "lead": 0.0,
        "waiting": rest(len(dispatcher.room), "waiting"),
        "running": rest(len(dispatcher.leases), "running"),
        "oldest_wait_s": oldest_s,
        "mean_wait_s": wait_s / num_waits if num_waits else 0.0,
        "service": rest(whole.service, "service"),
        "service_per_s": rest(recent.all_service_per_s(now_s), "service_per_s"),
        "num_input": rest(whole.num_input, "num_input"),
        "num_cached": rest(whole.num_cached, "num_cached"),
        "num_output": rest(whole.num_output, "num_output"),
        "num_refused": rest(recent.num_all_refused, "num_refused"),
        "last_active_s": None if seen_s is None else seen_s + moment.unix_offset_s,
    }


def known_clients(dispatcher: Dispatcher) -> list[str]:
    """Without groups; one pass in C where names are flat."""
    table = dispatcher.queue.table
    return list(table) if len(dispatcher.queue.groups) == 1 else [node for node in table if not is_group(node)]


def slices(names: Iterable[str]) -> Iterable[list[str]]:
    """``SLICE`` at a time."""
    rest = iter(names)
    while part := list(islice(rest, SLICE)):
        yield part
