"""Who may enter: rates of the policy and of the client, throttled interactions, budgets, full queues. Decides; the
dispatcher acts."""

from __future__ import annotations

from collections.abc import Collection

from fairserve.dispatch.budgets import Budgets
from fairserve.dispatch.controls import Controls
from fairserve.dispatch.drain import DrainRate, DrainRates, retry_after_s
from fairserve.dispatch.leases import Waiting
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import Submit
from fairserve.dispatch.waiting_room import WaitingRoom
from fairserve.errors import ClientQueueFull, ClientRateLimited, ClusterQueueFull, Refused
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.throttle import Rates, Throttle


class Door:
    """Also keeps what the refusals need: how fast requests are granted, and how many of a client with a rate of its own
    were accepted of late (since the rate was set)."""

    def __init__(
        self,
        queue: FairQueue[Waiting],
        room: WaitingRoom,
        limits: DispatchLimits,
        throttle: Throttle,
        controls: Controls,
        budgets: Budgets,
    ) -> None:
        self._queue = queue
        self._room = room
        self._limits = limits
        self._throttle = throttle
        self._controls = controls
        self._budgets = budgets
        self._rates = Rates()
        self._drain = DrainRate()
        self._client_drain = DrainRates()

    def refuse(self, submit: Submit, is_first: bool, now_s: float) -> Refused | None:
        """Why a new request may not enter, or None. ``is_first``: it begins an interaction."""
        client = submit.client
        error = self._queue.policy.refuse(client, now_s) or self._refuse_by_rate(client, now_s)
        if error is None and is_first and self._throttle.at == "arrival":
            weight = self._queue.table.weight(client)
            error = self._throttle.refuse(client, submit.application, weight, now_s)
        return error or self._budgets.refuse(submit) or self._refuse_by_queue(submit, now_s)

    def refuse_late(self, waiting: Waiting, now_s: float) -> Refused | None:
        """Why a request whose turn it is, but which fits nowhere, may not begin its interaction, or None."""
        if not waiting.is_first or self._throttle.at == "arrival":
            return None
        client, weight = waiting.submit.client, self._queue.table.weight(waiting.submit.client)
        return self._throttle.refuse(client, waiting.submit.application, weight, now_s, accepted_s=waiting.accepted_s)

    def _refuse_by_rate(self, client: str, now_s: float) -> Refused | None:
        limit = self._controls.of(client).requests_per_min
        if limit is None or self._rates.num_recent((client,), now_s) < limit:
            return None
        return ClientRateLimited(client, limit, max(1.0, self._rates.wait_s((client,), limit, now_s)))

    def _max_waiting(self, submit: Submit) -> int:
        own = self._controls.of(submit.client).max_waiting
        limits = (own, submit.max_waiting, self._limits.max_waiting_per_client)
        return next(one for one in limits if one is not None)

    def room_of(self, submit: Submit, now_s: float) -> tuple[int, int, float]:
        """The limit that is nearest of those on the client's requests, how many more it allows now, and the seconds
        until all of it is free."""
        client, limit = submit.client, self._max_waiting(submit)
        num = self._room.num_waiting(client)
        reset_s = retry_after_s(num, self._client_drain.per_s(client, now_s), least_s=0.0) if num else 0.0
        rate = self._controls.of(client).requests_per_min
        if rate is not None:
            num_recent = self._rates.num_recent((client,), now_s)
            if rate - num_recent < limit - num:
                return rate, max(0, rate - num_recent), self._rates.wait_s((client,), 1, now_s)
        return limit, max(0, limit - num), reset_s

    def _refuse_by_queue(self, submit: Submit, now_s: float) -> Refused | None:
        client, limits, room = submit.client, self._limits, self._room
        limit = self._max_waiting(submit)
        num = room.num_waiting(client)
        if num >= limit:
            return ClientQueueFull(client, num, limit, retry_after_s(1, self._client_drain.per_s(client, now_s)))
        share = limits.max_waiting / (room.num_clients + (num == 0))
        if len(room) >= limits.max_waiting and (num >= share or len(room) >= 2 * limits.max_waiting):
            return ClusterQueueFull(len(room), limits.max_waiting, retry_after_s(1, self._drain.per_s(now_s)))
        return None

    def accepted(self, submit: Submit, now_s: float) -> None:
        self._queue.policy.accepted(submit.client, now_s)
        self._throttle.accepted(submit.client, submit.application, now_s)
        if self._controls.of(submit.client).requests_per_min is not None:
            self._rates.count((submit.client,), now_s)

    def refused_late(self, waiting: Waiting) -> None:
        """What was accepted was refused after all: it counts no more."""
        client, accepted_s = waiting.submit.client, waiting.accepted_s
        if accepted_s is not None:
            self._throttle.take_back(client, waiting.submit.application, accepted_s)
            self._rates.take_back((client,), accepted_s)

    def forget(self, client: str) -> None:
        self._client_drain.forget(client)

    def granted(self, waits: Collection[tuple[str, float]], now_s: float) -> None:
        """Requests were granted: of which clients, after how many seconds."""
        if self._throttle.is_on:
            for _, waited_s in waits:
                self._throttle.overload.waited(waited_s, now_s)
        self._drain.count(now_s, len(waits))
        self._client_drain.count([client for client, _ in waits], now_s)
