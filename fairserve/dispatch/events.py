"""What happened lately, one sentence each, for people: a ring that costs a decision next to nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import Any

MAX_EVENTS = 1_000
MAX_RARE = 200
"""Of them are kept for what is rare, so that a thousand lifts do not push out a replica's death."""
FREQUENT = frozenset({"lifted", "throttled", "refused", "preempted", "lapsed"})
MERGE_S = 1.0
IDLE_S = 1.0
"""A client that is lifted sooner after its last request is hardly back from anywhere: that is not told."""


@dataclass(slots=True)
class Event:
    """``views.EventView``, its time ``at_s`` by the authority's clock; ``values`` fill in the sentence when somebody
    reads it."""

    seq: int
    at_s: float
    kind: str
    sentence: str
    values: tuple[object, ...]
    client: str | None
    replica: str | None
    count: int = 1

    @property
    def text(self) -> str:
        return self.sentence.format(*self.values) if self.values else self.sentence


class Events:
    """The newest. Equal ones (kind, client, replica and, of the rare ones, values) within ``MERGE_S`` of the first are
    told once: the first's sentence, with a count that may still grow for so long."""

    def __init__(self) -> None:
        self.last_seq = 0
        self._frequent: deque[Event] = deque(maxlen=MAX_EVENTS - MAX_RARE)
        self._rare: deque[Event] = deque(maxlen=MAX_RARE)
        self._open: dict[tuple[object, ...], Event] = {}

    def __len__(self) -> int:
        return len(self._frequent) + len(self._rare)

    def note(
        self,
        kind: str,
        now_s: float,
        sentence: str,
        *values: object,
        client: str | None = None,
        replica: str | None = None,
    ) -> None:
        """``kind``: one of ``views.EventKind``. ``sentence``: a format string for ``values``."""
        key = (kind, client, replica, () if kind in FREQUENT else values)
        event = self._open.get(key)
        if event is not None and now_s - event.at_s < MERGE_S:
            event.count += 1
            return
        self.last_seq += 1
        event = Event(self.last_seq, now_s, kind, sentence, values, client, replica)
        (self._frequent if kind in FREQUENT else self._rare).append(event)
        self._open.pop(key, None)
        self._open[key] = event
        if len(self._open) > MAX_EVENTS:
            del self._open[next(iter(self._open))]

    def after(self, seq: int, limit: int) -> list[Event]:
        """The first ``limit`` that came after the one numbered ``seq``, oldest first."""
        return list(islice((event for event in merge(*self._rings, key=_seq) if event.seq > seq), limit))

    def newest(self, num: int) -> list[Event]:
        """Newest first."""
        return list(islice(merge(*map(reversed, self._rings), key=_seq, reverse=True), num))

    @property
    def _rings(self) -> Iterator[deque[Event]]:
        return iter((self._frequent, self._rare))


def event_view(event: Event, unix_offset_s: float) -> dict[str, Any]:
    """As ``views.EventView``; ``unix_offset_s``: Unix time minus the authority's."""
    return {
        "seq": event.seq,
        "time_s": event.at_s + unix_offset_s,
        "kind": event.kind,
        "text": event.text,
        "client": event.client,
        "replica": event.replica,
        "count": event.count,
    }


def _seq(event: Event) -> int:
    return event.seq
