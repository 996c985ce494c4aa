"""The schedulers that VTC is compared with (arXiv 2401.00588, section 5.1): FCFS, LCF and RPM."""

from __future__ import annotations

from collections import deque

from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients

WINDOW_S = 60.0


class Lcf(Vtc):
    """Least counter first: VTC without the lift, so that a client which idled takes every turn when it returns."""

    name = "lcf"

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        return None


class Fcfs:
    """First come, first served, over all clients."""

    name = "fcfs"

    def order(self, client: str, waiting: WaitingClients) -> float:
        return waiting.place(client)

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        return None

    def retry_after_s(self, client: str, now_s: float) -> float | None:
        return None

    def accepted(self, client: str, now_s: float) -> None:
        pass


class Rpm(Fcfs):
    """FCFS behind a rate limit: at most ``limit`` accepted requests per client in any 60 s."""

    name = "rpm"

    def __init__(self, limit: int = 60) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self.limit = limit
        self._accepted_s: dict[str, deque[float]] = {}

    def retry_after_s(self, client: str, now_s: float) -> float | None:
        recent = self._accepted_s.get(client, ())
        in_window = [t for t in recent if t > now_s - WINDOW_S]
        if len(in_window) < self.limit:
            return None
        return in_window[-self.limit] + WINDOW_S - now_s

    def accepted(self, client: str, now_s: float) -> None:
        recent = self._accepted_s.setdefault(client, deque(maxlen=self.limit))
        recent.append(now_s)
