"""How fast waiting requests are granted: the number behind every Retry-After."""

from __future__ import annotations

import math
from collections.abc import Iterable

TAU_S = 30.0


class DrainRate:
    """Exponentially decaying rate of grants (1/s), with time constant ``tau_s``."""

    __slots__ = ("_at_s", "_since_s", "_tau_s", "_weight")

    def __init__(self, tau_s: float = TAU_S) -> None:
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


class _Weight:
    """Of one name: the sum over its grants of exp((time - origin) / tau), and when the first was."""

    __slots__ = ("since_s", "value")

    def __init__(self, value: float, since_s: float) -> None:
        self.value, self.since_s = value, since_s


class DrainRates:
    """As :class:`DrainRate`, of each of many names. Weights grow from an origin in time on instead of decaying until
    now: what is counted at one time costs one exponential, whoever it is of."""

    LONGEST = 100.0
    """Time constants after which the origin moves: no weight comes near the largest float."""

    def __init__(self) -> None:
        self._origin_s = 0.0
        self._weights: dict[str, _Weight] = {}

    def count(self, names: Iterable[str], now_s: float) -> None:
        """One grant of each; a name may come more than once."""
        if now_s - self._origin_s > self.LONGEST * TAU_S:
            self._move_origin(now_s)
        amount, weights = math.exp((now_s - self._origin_s) / TAU_S), self._weights
        for name in names:
            weight = weights.get(name)
            if weight is None:
                weights[name] = _Weight(amount, now_s)
            else:
                weight.value += amount

    def per_s(self, name: str, now_s: float) -> float:
        """0 before the first grant."""
        weight = self._weights.get(name)
        if weight is None:
            return 0.0
        seen_s = max(now_s - weight.since_s, 1.0)
        now = weight.value * math.exp((self._origin_s - now_s) / TAU_S)
        return now / (TAU_S * -math.expm1(-seen_s / TAU_S))

    def forget(self, name: str) -> None:
        self._weights.pop(name, None)

    def _move_origin(self, now_s: float) -> None:
        factor = math.exp((self._origin_s - now_s) / TAU_S)
        for weight in self._weights.values():
            weight.value *= factor
        self._origin_s = now_s


def retry_after_s(num_ahead: int, rate_per_s: float, *, least_s: float = 1.0, most_s: float = 600.0) -> float:
    """Seconds until ``num_ahead`` requests are granted at ``rate_per_s``, within [least_s, most_s]; 5 s when nothing
    has been granted yet."""
    if rate_per_s <= 0:
        return 5.0
    return min(max(num_ahead / rate_per_s, least_s), most_s)
