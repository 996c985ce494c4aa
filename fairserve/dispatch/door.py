"""Who may enter: the policy's rate, throttled interactions, full queues. Decides; the dispatcher acts."""

from __future__ import annotations

from fairserve.dispatch.drain import DrainRate, retry_after_s
from fairserve.dispatch.leases import Waiting
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import Submit
from fairserve.errors import ClientQueueFull, ClusterQueueFull, Refused
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.throttle import Throttle


class Door:
    """Also keeps what the refusals need: how fast requests are granted."""

    def __init__(self, queue: FairQueue[Waiting], limits: DispatchLimits, throttle: Throttle) -> None:
        self._queue = queue
        self._limits = limits
        self._throttle = throttle
        self._drain = DrainRate()
        self._client_drain: dict[str, DrainRate] = {}

    def refuse(self, submit: Submit, is_first: bool, now_s: float) -> Refused | None:
        """Why a new request may not enter, or None. ``is_first``: it begins an interaction."""
        client, limits = submit.client, self._limits
        error = self._queue.policy.refuse(client, now_s)
        if error is None and is_first:
            error = self._throttle.refuse(client, submit.application, submit.weight, now_s)
        if error is not None:
            return error
        limit = limits.max_waiting_per_client if submit.max_waiting is None else submit.max_waiting
        waiting = self._queue.backlog
        num = waiting.num_waiting(client)
        if num >= limit:
            drain = self._client_drain.get(client)
            return ClientQueueFull(client, num, limit, retry_after_s(1, drain.per_s(now_s) if drain else 0.0))
        share = limits.max_waiting / (waiting.num_clients + (num == 0))
        if len(waiting) >= limits.max_waiting and (num >= share or len(waiting) >= 2 * limits.max_waiting):
            return ClusterQueueFull(len(waiting), limits.max_waiting, retry_after_s(1, self._drain.per_s(now_s)))
        return None

    def accepted(self, submit: Submit, now_s: float) -> None:
        self._queue.policy.accepted(submit.client, now_s)
        self._throttle.accepted(submit.client, submit.application, now_s)

    def granted(self, client: str, waited_s: float, now_s: float) -> None:
        if self._throttle.is_on:
            self._throttle.overload.waited(waited_s, now_s)
        self._drain.count(now_s)
        drain = self._client_drain.get(client)
        if drain is None:
            drain = self._client_drain[client] = DrainRate()
        drain.count(now_s)
