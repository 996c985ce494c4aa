"""A picture of the dispatcher for people."""

from __future__ import annotations

from typing import Any

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.fairness.bounds import jain
from fairserve.fairness.hierarchy import is_group


def status(dispatcher: Dispatcher, now_s: float) -> dict[str, Any]:
    """Clients, groups, replicas, gap and bound, as plain values. Amounts are service / weight where named so."""
    queue, watch = dispatcher.queue, dispatcher.watch
    clients, groups = {}, {}
    for node in queue.table:
        entry: dict[str, Any] = {"weight": queue.table.weight(node), "counter": queue.counter(node)}
        if is_group(node):
            groups[node] = entry
            continue
        totals = dispatcher.ledger.totals(node)
        clients[node] = entry | {
            "waiting": dispatcher.room.num_waiting(node),
            "running": dispatcher.leases.num_of(node),
            "service": totals.service,
            "num_input": totals.num_input,
            "num_cached": totals.num_cached,
            "num_output": totals.num_output,
        }
    bounds, gaps = dispatcher.bounds, dispatcher.gaps
    return {
        "time_s": now_s,
        "epoch": dispatcher.epoch,
        "policy": queue.policy.name,
        "clients": clients,
        "groups": groups,
        "replicas": {
            room.name: {
                "report_age_s": now_s - room.heard_s,
                "free_kv_tokens": room.room_tokens,
                "kv_capacity_tokens": room.kv_capacity_tokens,
                "max_slots": room.max_slots,
                "running": room.num_running,
                "waiting": room.num_waiting,
                "granted_unconfirmed": len(room.unconfirmed),
                "is_draining": room.is_draining,
            }
            for room in dispatcher.capacity
        },
        "routers": dispatcher.num_routers,
        "waiting": len(dispatcher.room),
        "leases": len(dispatcher.leases),
        "granted": dispatcher.num_granted,
        "granted_over": dispatcher.num_granted_over,
        "lapsed": dispatcher.num_lapsed,
        "refused": dispatcher.num_refused,
        "forgotten": dispatcher.num_forgotten,
        "most_forgiven": dispatcher.most_forgiven,
        "lifts": dispatcher.num_lifts,
        "overloaded": dispatcher.throttle.overload.is_on,
        "throttled": dispatcher.throttle.num_throttled,
        "interactions": len(dispatcher.interactions),
        "interactions_cut": dispatcher.interactions.num_cut,
        "wasted_tokens": dispatcher.interactions.num_wasted_tokens,
        "bound": bounds.bound,
        "bound_unit": bounds.unit,
        "staleness": bounds.staleness,
        "worst_gap": gaps.worst,
        "worst_pair": gaps.worst_pair,
        "bounds_by_group": {group: tracker.bound for group, tracker in watch.bounds.items()},
        "worst_gap_by_group": {group: monitor.worst for group, monitor in watch.gaps.items()},
        "jain_backlogged": jain([watch.service.get(client, 0.0) for client in queue.backlog.clients()]),
    }
