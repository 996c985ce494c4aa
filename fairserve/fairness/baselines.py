"""The schedulers that VTC is compared with (arXiv 2401.00588, section 5.1), and one that is blind to cost."""

from __future__ import annotations

from collections import OrderedDict, deque

from fairserve.errors import RateLimited, Refused
from fairserve.fairness.policy import Order, Policy
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients

WINDOW_S = 60.0


class Lcf(Vtc):
    """Least counter first: VTC without the lift, so that a client which idled takes every turn when it returns."""

    name = "lcf"

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        return None


class Fcfs(Policy):
    """First come, first served, over all clients."""

    name = "fcfs"


class RoundRobin(Policy):
    """One request of each client in turn, whatever it costs. A client that was away goes next, once."""

    name = "round_robin"

    def __init__(self) -> None:
        self._turn: dict[str, int] = {}
        self._num_turns = 0

    def order(self, client: str, waiting: WaitingClients) -> Order:
        return self._turn.get(client, 0)

    def picked(self, client: str) -> None:
        self._num_turns += 1
        self._turn[client] = self._num_turns

    def forget(self, client: str) -> None:
        self._turn.pop(client, None)


class Rpm(Fcfs):
    """FCFS behind a rate limit: at most ``limit`` accepted requests per client in any 60 s."""

    name = "rpm"

    def __init__(self, limit: int = 60) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self.limit = limit
        self._accepted_s: OrderedDict[str, deque[float]] = OrderedDict()
        """By client, the one accepted last at the end; gone when its window is over."""

    def refuse(self, client: str, now_s: float) -> Refused | None:
        recent = self._accepted_s.get(client, ())
        in_window = [t for t in recent if t > now_s - WINDOW_S]
        if len(in_window) < self.limit:
            return None
        wait_s = in_window[-self.limit] + WINDOW_S - now_s
        return RateLimited(client, self.limit, max(wait_s, 1.0))

    def accepted(self, client: str, now_s: float) -> None:
        recent = self._accepted_s.setdefault(client, deque(maxlen=self.limit))
        recent.append(now_s)
        self._accepted_s.move_to_end(client)
        while next(iter(self._accepted_s.values()))[-1] <= now_s - WINDOW_S:
            self._accepted_s.popitem(last=False)
