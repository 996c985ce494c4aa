"""How fast waiting requests are granted: the number behind every Retry-After."""

from __future__ import annotations

import math


class DrainRate:
    """Exponentially decaying rate of grants (1/s), with time constant ``tau_s``."""

    __slots__ = ("_at_s", "_since_s", "_tau_s", "_weight")

    def __init__(self, tau_s: float = 30.0) -> None:
        self._tau_s = tau_s
        self._weight = 0.0
        self._at_s: float | None = None
        self._since_s: float | None = None

    def count(self, now_s: float, num: int = 1) -> None:
        if now_s != self._at_s:
            self._decay(now_s)
        self._weight += num

    def per_s(self, now_s: float) -> float:
        """0 before the first grant. Corrected for the time since the first, so that it is right from the start."""
        if self._at_s is None or self._since_s is None:
            return 0.0
        self._decay(now_s)
        seen_s = max(now_s - self._since_s, 1.0)
        return self._weight / (self._tau_s * -math.expm1(-seen_s / self._tau_s))

    def _decay(self, now_s: float) -> None:
        if self._at_s is None:
            self._at_s = self._since_s = now_s
        self._weight *= math.exp((self._at_s - now_s) / self._tau_s)
        self._at_s = now_s


def retry_after_s(num_ahead: int, rate_per_s: float, *, least_s: float = 1.0, most_s: float = 600.0) -> float:
    """Seconds until ``num_ahead`` requests are granted at ``rate_per_s``, within [least_s, most_s]; 5 s when nothing
    has been granted yet."""
    if rate_per_s <= 0:
        return 5.0
    return min(max(num_ahead / rate_per_s, least_s), most_s)
