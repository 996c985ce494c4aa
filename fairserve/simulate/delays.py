"""How long requests took to get somewhere, and when clients had something waiting.

Percentiles are of nearest rank: values that happened, no interpolation. Everything is in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fairserve.simulate.records import RequestRecord


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds. ``num_open`` of the ``num`` requests had not come so far when the run ended and count with their age, so
    that letting requests wait for ever flatters nobody; the percentiles that they reach are then too low."""

    p50: float
    p90: float
    p99: float
    num: int
    num_open: int


def percentiles(values: Sequence[float], num_open: int = 0) -> Percentiles | None:
    """Nearest-rank p50, p90 and p99: the ceil(p / 100 * n)-th smallest. None of nothing."""
    if not values:
        return None
    ordered, num = sorted(values), len(values)
    p50, p90, p99 = (ordered[(percent * num + 99) // 100 - 1] for percent in (50, 90, 99))
    return Percentiles(p50, p90, p99, num, num_open)


def delays(
    records: Iterable[RequestRecord], moment: Callable[[RequestRecord], float | None], end_s: float
) -> Percentiles | None:
    """Arrival to ``moment``. A request without it counts with its age if it is still there, else not at all."""
    taken, num_open = [], 0
    for record in records:
        reached_s = moment(record)
        if reached_s is None:
            if record.outcome != "unfinished":
                continue
            reached_s = end_s
            num_open += 1
        taken.append(reached_s - record.arrival.arrival_s)
    return percentiles(taken, num_open)


def first_token(record: RequestRecord) -> float | None:
    return record.first_token_s


def last_token(record: RequestRecord) -> float | None:
    return record.finished_s if record.outcome == "finished" else None


def grant(record: RequestRecord) -> float | None:
    return record.granted_s


def end_of_wait(record: RequestRecord, end_s: float) -> float:
    """A record without a grant (of a foreign engine) waited until its first token."""
    moments = (record.granted_s, record.first_token_s, record.finished_s)
    return next((moment for moment in moments if moment is not None), end_s)


def covered(intervals: Iterable[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Seconds of [start_s, end_s] inside at least one of ``intervals``."""
    seconds, until = 0.0, start_s
    for begin, end in sorted(intervals):
        begin, end = max(begin, until), min(end, end_s)
        if end > begin:
            seconds += end - begin
            until = end
    return seconds
