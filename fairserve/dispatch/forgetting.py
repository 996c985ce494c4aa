"""Whom the authority forgets when it knows too many names, so that arbitrary names cannot fill its memory.

**Who costs nothing.** A client that comes back is lifted to the level of its group (``fairness/vtc.py``), and one that
is remembered keeps its counter if that is higher. So for an idle client at or below the level, being forgotten and
coming back as a newcomer is the same as being remembered: the level only rises, but for charges that return (D of
``fairness/bounds.py``). A client *ahead* of the level has a debt, at most U + D + C: forgotten, it would begin anew.

**The rule.** Nobody is forgotten as long as at most ``max_clients`` clients are idle. Beyond, the idle one that is
least ahead goes first, so that debts go only when everybody who is idle has one, and then the least. Idle means: no
request waits or is granted, no interaction is under way, and nothing is set live; the one by whom newcomers are lifted
when nobody waits stays, too. Whoever is active is not counted: their number is bounded by the limits of the queue and
by the replicas' slots, and if they counted, a crowd of names that wait could push out everybody who does not.

**What an attacker gains.** One debt, at most U + D + C, each time that ``max_clients`` other names are idle and at
least as far ahead. Whoever can do that sends under names that it makes up, and the next new name owes nothing anyway,
without any of this; what keeps a tenant with many names at one share is the hierarchy (``fairness/hierarchy.py``),
whose organisations are remembered as long as one of their clients is. Where names are those of API keys, fewer than
``max_clients`` of them, nobody's debt is ever forgotten. Bounds on clients that wait throughout do not change: who
waits is never forgotten.

In a hierarchy a client is compared where its path parts from those of others (``FairQueue.branch_of``), and of the
groups ``GROUPS_LOOKED_AT`` are looked at, in turn, for the one that is least ahead; where names are flat there is one.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import inf
from typing import Any

from fairserve.fairness.hierarchy import group_of, is_group, path_of
from fairserve.fairness.queue import FairQueue

GROUPS_LOOKED_AT = 32

Entry = tuple[float, str]
"""Counter at which the client's branch stood, client."""


class Idlers:
    """Idle clients, the least counter of each group first. A counter in an entry may be of the past: it is put right
    when it surfaces."""

    def __init__(self, queue: FairQueue[Any], is_busy: Callable[[str], bool]) -> None:
        """``is_busy``: what the queue does not know of (something of it is granted, or set live)."""
        self._queue = queue
        self._is_busy = is_busy
        self._heaps: dict[str, list[Entry]] = {}
        """By group of the branch; the group looked at last stands last."""
        self._entries: dict[str, Entry] = {}
        """The entry that counts, by client."""
        self._parked: dict[str, Entry] = {}
        """By group, instead of in its heap: the one that may not be forgotten as long as newcomers are lifted to it."""
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def look_at(self, client: str) -> None:
        """It may have become idle, or active."""
        if client not in self._queue.table or is_group(client):
            return
        if self._is_idle(client):
            self._push(client)
        else:
            self._entries.pop(client, None)

    def first(self) -> tuple[str, float] | None:
        """Who goes first, and by how much it is ahead of a newcomer; None when nobody may be forgotten."""
        best, least, num_looked_at = None, inf, 0
        while num_looked_at < min(GROUPS_LOOKED_AT, len(self._heaps)):
            group = next(iter(self._heaps))
            heap = self._heaps.pop(group)
            entry = self._head(group, heap)
            if entry is None:
                continue  # and its heap is empty
            self._heaps[group] = heap
            num_looked_at += 1
            lead = entry[0] - self._queue.newcomer(group)
            if lead < least:
                best, least = entry[1], lead
            if lead <= 0:
                break
        return None if best is None else (best, least)

    def forgotten(self, client: str) -> None:
        """By the queue, too."""
        self._entries.pop(client, None)
        for group in map(group_of, path_of(client)):
            self._unpark(group)  # it may be alone in there now, and stand elsewhere

    def _is_idle(self, client: str) -> bool:
        queue = self._queue
        return not (queue.backlog.has(client) or self._is_busy(client) or queue.is_under_way(client))

    def _head(self, group: str, heap: list[Entry]) -> Entry | None:
        """The least of the group that may be forgotten, or None and the heap is empty: entries that do not count leave
        it, and the one whom newcomers are compared with is parked."""
        while heap:
            entry = heap[0]
            client = entry[1]
            if self._entries.get(client) is not entry:
                heapq.heappop(heap)
            elif not self._is_idle(client):
                heapq.heappop(heap)
                del self._entries[client]
            elif (now := self._standing(client)) != (group, entry[0]):
                heapq.heappop(heap)
                self._put(client, *now, heap if now[0] == group else self._heaps.setdefault(now[0], []))
            elif not self._queue.can_forget(client):
                self._parked[group] = heapq.heappop(heap)
            else:
                return entry
        return None

    def _unpark(self, group: str) -> None:
        entry = self._parked.pop(group, None)
        if entry is not None:
            heapq.heappush(self._heaps.setdefault(group, []), entry)

    def _standing(self, client: str) -> tuple[str, float]:
        top = self._queue.branch_of(client)
        return group_of(top), self._queue.counter(top)

    def _push(self, client: str) -> None:
        group, counter = self._standing(client)
        entry = self._entries.get(client)
        if entry is not None and entry[0] == counter:
            return  # where its group is another by now, it is put right when it surfaces
        self._put(client, group, counter, self._heaps.setdefault(group, []))
        self._unpark(group)  # another may be the last to leave by now
        self._num_pushed += 1
        if self._num_pushed > 2 * len(self._entries) + 64:
            self._rebuild()

    def _put(self, client: str, group: str, counter: float, heap: list[Entry]) -> None:
        entry = self._entries[client] = (counter, client)
        heapq.heappush(heap, entry)

    def _rebuild(self) -> None:
        """Many entries do not count: without them."""
        self._num_pushed = 0
        self._entries = {client: entry for client, entry in self._entries.items() if self._is_idle(client)}
        self._heaps, self._parked = {}, {}
        for client, entry in self._entries.items():
            self._heaps.setdefault(self._standing(client)[0], []).append(entry)
        for heap in self._heaps.values():
            heapq.heapify(heap)

    def overlooked(self) -> set[str]:
        """Idle clients that nobody would ever forget: none, unless somebody made them known past the dispatcher."""
        return {c for c in self._queue.table if not is_group(c) and c not in self._entries and self._is_idle(c)}

    def check(self) -> None:
        assert self._entries.keys() <= set(self._queue.table)
        in_heaps = {id(entry) for heap in (*self._heaps.values(), list(self._parked.values())) for entry in heap}
        assert all(id(entry) in in_heaps for entry in self._entries.values())
