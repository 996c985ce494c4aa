"""UTC minutes, days and months of a Unix time that is handed in: what budgets and usage are counted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Window = Literal["minute", "day", "month"]
WINDOWS: tuple[Window, ...] = ("minute", "day", "month")
MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400
_ERA = 146_097
"""Days in 400 years, after which the calendar repeats."""
_MARCH_0 = 719_468
"""Days from 1 March of the year 0 to 1 January 1970."""


def date_of(day: int) -> tuple[int, int, int]:
    """Year, month and day of month of the ``day``-th day since 1 January 1970.

    Years begin in March, so that the leap day is the last of one (the proleptic Gregorian calendar).
    """
    era, of_era = divmod(day + _MARCH_0, _ERA)
    year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    march_month = (5 * of_year + 2) // 153
    month = march_month + 3 if march_month < 10 else march_month - 9
    return era * 400 + year + (month <= 2), month, of_year - (153 * march_month + 2) // 5 + 1


@dataclass(frozen=True, slots=True)
class Periods:
    """Those that a moment lies in."""

    unix_s: float = 0.0

    @property
    def minute(self) -> int:
        """Since 1970."""
        return int(self.unix_s // MINUTE_S)

    @property
    def hour(self) -> int:
        """Since 1970."""
        return int(self.unix_s // HOUR_S)

    @property
    def day(self) -> int:
        """Since 1970."""
        return int(self.unix_s // DAY_S)

    @property
    def first_of_month(self) -> int:
        """The month's first day, since 1970."""
        return self.day - date_of(self.day)[2] + 1

    def ends_s(self, window: Window) -> float:
        """Unix time at which the window is over, and the next one begins."""
        if window == "minute":
            return float((self.minute + 1) * MINUTE_S)
        if window == "day":
            return float((self.day + 1) * DAY_S)
        following = self.first_of_month + 31
        return float((following - date_of(following)[2] + 1) * DAY_S)


def utc(unix_s: float) -> str:
    """Such as 2026-11-21T00:00:00Z."""
    day, second = divmod(int(unix_s), DAY_S)
    year, month, of_month = date_of(day)
    hours, seconds = divmod(second, 3600)
    return f"{year:04d}-{month:02d}-{of_month:02d}T{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}Z"
