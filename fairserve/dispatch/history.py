"""Clients over time: a point a second for the last hour, one a minute for a week, in memory that is bounded.

Points are written only while a client waits, runs or is served. A point takes 20 bytes; a client that is busy for a
week without a pause takes 72 kB of seconds and 202 kB of minutes, and at most ``MAX_CLIENTS`` are kept: 70 MB.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

MAX_CLIENTS = 256
HOUR_S, WEEK_S = 3_600, 7 * 24 * 3_600
SPAN_S = {1: HOUR_S, 60: WEEK_S}
"""How far back each resolution reaches."""
SLACK = 256
"""Points beyond the span that may pile up before they are cut off."""
UNSAVED_MINUTES = 10
"""Of all clients, kept for a store that takes them up later, if there is one."""
STEPS = 1_000
"""Points put together between two pauses."""

Point = tuple[int, float, float, float]
"""Unix second; service since counting began; waiting requests; lead."""
Row = tuple[int, float, str, float | None, float | None, float | None]
"""resolution_s, time_s, client, service, waiting, lead: a point as a store keeps it."""


class _Points:
    """Of one client at one resolution; times rise."""

    __slots__ = ("lead", "service", "time_s", "waiting")

    def __init__(self) -> None:
        self.time_s, self.service = array("I"), array("d")
        self.waiting, self.lead = array("f"), array("f")

    def add(self, point: Point, span_s: int, resolution_s: int) -> None:
        for column, value in zip(self._columns, point, strict=True):
            column.append(value)
        if len(self.time_s) > span_s // resolution_s + SLACK or self.time_s[0] < point[0] - span_s - SLACK:
            num_old = bisect_left(self.time_s, point[0] - span_s)
            for column in self._columns:
                del column[:num_old]

    @property
    def _columns(self) -> tuple[array[Any], ...]:
        return (self.time_s, self.service, self.waiting, self.lead)

    @property
    def num_bytes(self) -> int:
        return sum(column.itemsize * len(column) for column in self._columns)


class _Client:
    __slots__ = ("chosen_s", "points")

    def __init__(self, chosen_s: int) -> None:
        self.chosen_s = chosen_s
        self.points = {resolution_s: _Points() for resolution_s in SPAN_S}


class HistoryBook:
    """The busiest clients, each from the moment on at which it was first chosen. When there are too many, the one that
    was chosen the longest ago goes."""

    def __init__(self, max_clients: int = MAX_CLIENTS) -> None:
        self._max_clients = max_clients
        self._clients: dict[str, _Client] = {}
        self._new_rows: deque[Row] = deque(maxlen=UNSAVED_MINUTES * max_clients)

    def __contains__(self, client: str) -> bool:
        return client in self._clients

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def num_bytes(self) -> int:
        """Of the points."""
        return sum(points.num_bytes for client in self._clients.values() for points in client.points.values())

    def choose(self, clients: Iterable[str], time_s: int) -> None:
        """These are the busiest now, the busiest first."""
        for name in clients:
            client = self._clients.pop(name, None) or _Client(time_s)
            client.chosen_s = time_s
            self._clients[name] = client  # the latest chosen stands last
        for name in list(self._clients)[: max(0, len(self._clients) - self._max_clients)]:
            del self._clients[name]

    def record(self, client: str, point: Point) -> None:
        """No effect for a client that is not kept, or when time has not moved on."""
        kept = self._clients.get(client)
        if kept is None:
            return
        for resolution_s, points in kept.points.items():
            last_s = points.time_s[-1] // resolution_s if points.time_s else -1
            if point[0] // resolution_s > last_s:
                points.add(point, SPAN_S[resolution_s], resolution_s)
                if resolution_s == 60:
                    self._new_rows.append((60, point[0], client, *point[1:]))

    def take_new_rows(self) -> list[Row]:
        """Minute points since the last call, for ``store.save_history``."""
        rows = list(self._new_rows)
        self._new_rows.clear()
        return rows

    def load(self, rows: Iterable[Row]) -> None:
        """Take over the minute points of an earlier life, oldest first: what ``store.load_history(60)`` gave."""
        for _, time_s, client, service, waiting, lead in rows:
            if client not in self._clients:
                self.choose((client,), int(time_s))
            point = (int(time_s), service or 0.0, waiting or 0.0, lead or 0.0)
            self._clients[client].points[60].add(point, WEEK_S, 60)

    def series(
        self, clients: Sequence[str], since_s: float, resolution_s: int, now_s: float
    ) -> Generator[None, None, dict[str, Any]]:
        """As ``views.History``. Between its points a client had nothing to do: its service stayed, it did not wait."""
        last = int(now_s) // resolution_s
        first = max(int(since_s) // resolution_s, last - SPAN_S[resolution_s] // resolution_s + 1)
        buckets = range(first, last + 1)
        answer: dict[str, Mapping[str, Any]] = {}
        for name in clients:
            kept = self._clients.get(name)
            points = _Points() if kept is None else kept.points[resolution_s]
            columns: tuple[list[float | None], ...] = ([], [], [])
            for start in range(0, len(buckets), STEPS):
                _fill(columns, points, buckets[start : start + STEPS], resolution_s)
                yield
            answer[name] = dict(zip(("service", "waiting", "lead"), columns, strict=True))
        times_s = [float(bucket * resolution_s) for bucket in buckets]
        return {"resolution_s": resolution_s, "times_s": times_s, "clients": answer}


def _fill(columns: tuple[list[float | None], ...], points: _Points, buckets: range, resolution_s: int) -> None:
    service, waiting, lead = columns
    times_s = points.time_s
    index = bisect_left(times_s, buckets[0] * resolution_s) - 1
    for bucket in buckets:
        end_s = (bucket + 1) * resolution_s
        while index + 1 < len(times_s) and times_s[index + 1] < end_s:
            index += 1
        if index < 0:
            service.append(None)
            waiting.append(None)
            lead.append(None)
            continue
        is_fresh = bucket - times_s[index] // resolution_s <= 1  # a sample that came late leaves no hole
        service.append(points.service[index])
        waiting.append(points.waiting[index] if is_fresh else 0.0)
        lead.append(points.lead[index] if is_fresh else None)
