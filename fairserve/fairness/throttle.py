"""Overload-driven interaction throttling: OIT (FairServe, arXiv 2411.15997, section 4.1).

Under overload, and only then, the first call of a new interaction is refused when its client, or the client's
application, is past its rate: when it is its turn and it fits nowhere, as published, or as soon as it comes. The
authors take one request that did not fit in memory for overload; here it is measured: requests wait long *and* the
replicas are full, for a while, and it is over only well below the mark. Rates are counted per client (and per
application of a client), so nobody can use up another's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from math import exp
from typing import Literal

from fairserve.errors import InteractionThrottled, Refused

WINDOW_S = 60.0
SMOOTH_S = 5.0
"""Time constant of the mean wait."""


@dataclass(frozen=True, slots=True)
class ThrottleSettings:
    """``ThrottleConfig`` documents each. Limits are requests in any 60 s for a weight of 1; None: no limit."""

    client_limit: int | None = None
    application_limit: int | None = None
    at: Literal["pick", "arrival"] = "pick"
    enter_wait_s: float = 2.0
    leave_wait_s: float = 0.5
    kv_pressure: float = 0.9
    hold_s: float = 1.0


class Overload:
    """Is the cluster overloaded? With hysteresis: it takes ``hold_s`` above the entry mark to begin and ``hold_s``
    below the exit mark to end."""

    def __init__(self, settings: ThrottleSettings) -> None:
        self._settings = settings
        self.is_on = False
        self._wait_s = 0.0
        self._waited_at_s: float | None = None
        self._since_s: float | None = None
        """Since when the measurements contradict ``is_on``."""
        self.num_begun = 0

    def waited(self, wait_s: float, now_s: float) -> None:
        """A request was granted after ``wait_s`` in the queue."""
        self._wait_s += self._share(now_s) * (wait_s - self._wait_s)
        self._waited_at_s = now_s

    def observe(self, head_wait_s: float, pressure: float, now_s: float) -> None:
        """``head_wait_s``: how long the request that goes next has waited, 0 when nobody waits. ``pressure``: part of
        the cluster's KV cache, or of its slots, that is taken."""
        settings = self._settings
        if head_wait_s == 0.0:  # nobody waits: old waits fade
            self.waited(0.0, now_s)
        wait_s = max(self._wait_s, head_wait_s)
        if self.is_on:
            contradicts = wait_s < settings.leave_wait_s or pressure < settings.kv_pressure / 2
        else:
            contradicts = wait_s > settings.enter_wait_s and pressure >= settings.kv_pressure
        if not contradicts:
            self._since_s = None
            return
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= settings.hold_s:
            self.is_on = not self.is_on
            self.num_begun += self.is_on
            self._since_s = None

    def _share(self, now_s: float) -> float:
        """Weight of a new wait in the mean: grants of one instant count a tenth each."""
        if self._waited_at_s is None:
            return 1.0
        return max(0.1, 1 - exp(-(now_s - self._waited_at_s) / SMOOTH_S))


class Rates:
    """Accepted requests of the last 60 s, by key. ``limit`` may differ from call to call. Those that were refused later
    are taken back."""

    def __init__(self) -> None:
        self._times: OrderedDict[tuple[str, ...], deque[float]] = OrderedDict()
        """The key counted last stands last."""

    def count(self, key: tuple[str, ...], now_s: float) -> None:
        self._times.setdefault(key, deque()).append(now_s)
        self._times.move_to_end(key)
        self._forget_old(key, now_s)
        while (oldest := next(iter(self._times))) != key and self._times[oldest][-1] <= now_s - WINDOW_S:
            del self._times[oldest]

    def take_back(self, key: tuple[str, ...], at_s: float) -> None:
        """The request that was counted at ``at_s`` was refused after all; no effect if that was long ago."""
        times = self._times.get(key)
        if times is not None and at_s in times:
            times.remove(at_s)
            if not times:
                del self._times[key]

    def num_recent(self, key: tuple[str, ...], now_s: float) -> int:
        self._forget_old(key, now_s)
        return len(self._times.get(key, ()))

    def wait_s(self, key: tuple[str, ...], limit: int, now_s: float) -> float:
        """Seconds until fewer than ``limit`` are left in the window."""
        times = self._times.get(key)
        if not times or len(times) < limit:
            return 0.0
        return max(0.0, times[len(times) - limit] + WINDOW_S - now_s)

    def _forget_old(self, key: tuple[str, ...], now_s: float) -> None:
        times = self._times.get(key)
        if times is None:
            return
        while times and times[0] <= now_s - WINDOW_S:
            times.popleft()
        if not times:
            del self._times[key]


class Throttle:
    """Counts what enters, and says which new interaction may not."""

    def __init__(self, settings: ThrottleSettings) -> None:
        self._settings = settings
        self.overload = Overload(settings)
        self._rates = Rates()
        self.num_throttled = 0
        """Counted by whoever refuses."""

    @property
    def at(self) -> Literal["pick", "arrival"]:
        return self._settings.at

    @property
    def looks_at_picks(self) -> bool:
        """Something that was picked might be refused now."""
        return self.at == "pick" and self.overload.is_on

    @property
    def is_on(self) -> bool:
        return self._settings.client_limit is not None or self._settings.application_limit is not None

    def accepted(self, client: str, application: str, now_s: float) -> None:
        if self._settings.client_limit is not None:
            self._rates.count((client,), now_s)
        if self._settings.application_limit is not None and application:
            self._rates.count((client, application), now_s)

    def take_back(self, client: str, application: str, at_s: float) -> None:
        """What was accepted at ``at_s`` was refused later."""
        self._rates.take_back((client,), at_s)
        self._rates.take_back((client, application), at_s)

    def refuse(
        self, client: str, application: str, weight: float, now_s: float, *, accepted_s: float | None = None
    ) -> Refused | None:
        """Why a first call may not begin now, or None. Outside overload everything may. ``accepted_s``: when the call
        itself was counted, if it was; it does not stand in its own way."""
        if not self.overload.is_on:
            return None
        own = accepted_s is not None and accepted_s > now_s - WINDOW_S
        settings = self._settings
        checks: list[tuple[tuple[str, ...], int | None]] = [((client,), settings.client_limit)]
        if application:
            checks.append(((client, application), settings.application_limit))
        for key, per_weight in checks:
            if per_weight is None:
                continue
            limit = max(1, int(per_weight * weight))
            num = self._rates.num_recent(key, now_s) - own
            if num >= limit:
                wait_s = self._rates.wait_s(key, limit, now_s)
                return InteractionThrottled(client, application if len(key) > 1 else "", num, limit, max(1.0, wait_s))
        return None
