"""Is the service fair now? Numbers, and one sentence for people."""

from __future__ import annotations

from typing import Any

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.recent import Recent

BOUNDED = frozenset({"vtc", "wsc"})
"""Policies that go by counters, so that the bound of ``fairness/bounds.py`` is theirs; wsc's within its grace."""


def verdict(dispatcher: Dispatcher, recent: Recent) -> dict[str, Any]:
    """As ``views.Verdict``: among the members of the top level, which are all clients where names are flat."""
    gaps, bound = dispatcher.gaps, dispatcher.bounds.bound
    gap, pair = gaps.current()
    num = dispatcher.queue.backlog.num_clients
    return {
        "is_fair": gap <= bound,
        "text": sentence(dispatcher.queue.policy.name, gap, pair, bound, num, gaps.num_watched),
        "gap": gap,
        "gap_pair": pair,
        "worst_gap": gaps.worst,
        "bound": bound,
        "jain": recent.jain(dispatcher.queue.is_waiting),
        "num_backlogged": num,
    }


def sentence(policy: str, gap: float, pair: tuple[str, str] | None, bound: float, num: int, num_watched: int) -> str:
    """``num`` clients wait, ``num_watched`` of them (or of the organisations they belong to) are compared."""
    is_ours = policy in BOUNDED
    under = "" if is_ours else f" Policy {policy} keeps no bound; {bound:,.0f} would be VTC's."
    if num == 0:
        return f"Nobody waits: everyone gets what they ask for.{'' if is_ours else f' The policy is {policy}.'}"
    if num == 1 or num_watched < 2:
        return f"Fair: only one waits, so nobody is ahead of anybody.{'' if is_ours else f' The policy is {policy}.'}"
    whom = f"{num} waiting clients" if num <= num_watched else f"{num_watched} of {num} waiting clients"
    against = f", the bound is {bound:,.0f}" if is_ours else ""
    if gap <= bound:
        return f"Fair: the widest gap among {whom} is {gap:,.0f}{against}.{under}"
    ahead, behind = pair or ("one", "another")
    return f"NOT FAIR: {ahead} is {gap:,.0f} ahead of {behind} among {whom}{against}.{under}"
