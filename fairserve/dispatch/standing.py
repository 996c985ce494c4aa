"""Where a client stands when a request of its is granted: for response headers; no decision reads it."""

from __future__ import annotations

from fairserve.dispatch.messages import Standing, Submit
from fairserve.dispatch.state import State
from fairserve.fairness.hierarchy import TOP, path_of


def standing_of(state: State, submit: Submit, now_s: float) -> Standing:
    """As of now, for a request that was granted."""
    queue, client = state.queue, submit.client
    least = queue.groups[TOP].least_served() if TOP in queue.groups else None
    lead = 0.0 if least is None else queue.counter(path_of(client)[0]) - queue.counter(least)
    return Standing(lead, *state.door.room_of(submit, now_s), *state.budgets.standing(client))
