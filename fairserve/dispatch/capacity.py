"""What every replica can still take: its own report, minus what was granted and is not in that report yet."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from fairserve.dispatch.messages import StepReport


@dataclass(slots=True, eq=False)
class ReplicaRoom:
    """The replica's newest report and the grants it has not confirmed. Tokens are KV tokens."""

    name: str
    incarnation: int
    heard_s: float
    free_kv_tokens: int
    free_slots: int
    kv_capacity_tokens: int
    max_slots: int
    num_running: int = 0
    num_waiting: int = 0
    suspended_until_s: float = 0.0
    is_draining: bool = False
    """It is being stopped, and granted nothing more."""
    unconfirmed: dict[str, int] = field(default_factory=dict)
    """request id -> KV tokens reserved for it."""
    reserved_tokens: int = 0
    granted_over: str | None = None
    """A request granted although there is no room, which has not started: somebody gives way for it there."""
    listed: _Entry | None = None
    """Where it stands among the others: the one entry that counts."""
    only_queues: bool = False
    """It stands among those with lookahead only."""

    def __lt__(self, other: ReplicaRoom) -> bool:
        """Whatever tells two entries apart stands before this."""
        return False

    @property
    def room_tokens(self) -> int:
        return self.free_kv_tokens - self.reserved_tokens

    @property
    def room_slots(self) -> int:
        """Running slots still free; negative once the lookahead is in use."""
        return self.free_slots - len(self.unconfirmed)

    @property
    def entry(self) -> _Entry:
        return (self.reserved_tokens - self.free_kv_tokens, len(self.unconfirmed) - self.free_slots, self.name, self)

    @property
    def num_requests(self) -> int:
        """Running, waiting or on their way there."""
        return self.num_running + self.num_waiting + len(self.unconfirmed)


_Entry = tuple[int, int, str, ReplicaRoom]
"""(- free KV tokens, - free slots, name, room): the least goes first."""


class Capacity:
    """Room on all replicas. Questions change no answer; report, reserve, release, suspend, drain and forget act.

    The best replica is found in O(log replicas): two heaps, of replicas with a free running slot and of all with
    lookahead, by free KV tokens, with one entry that counts for each replica. Its numbers may be earlier, better ones:
    they are put right when it surfaces, so that a grant costs nothing here.
    """

    def __init__(self, lookahead: int, stale_s: float) -> None:
        self._lookahead = lookahead
        self._stale_s = stale_s
        self._rooms: dict[str, ReplicaRoom] = {}
        self._heaps: tuple[list[_Entry], list[_Entry]] = ([], [])
        self._asleep: dict[str, None] = {}
        """Replicas that stood first and may not be granted to for now."""
        self._least_kv_tokens = 0

    def __iter__(self) -> Iterator[ReplicaRoom]:
        return iter(self._rooms.values())

    def __len__(self) -> int:
        return len(self._rooms)

    def get(self, replica: str) -> ReplicaRoom | None:
        return self._rooms.get(replica)

    @property
    def largest_kv_tokens(self) -> int | None:
        """KV capacity of the largest replica known; None when none is."""
        return max((room.kv_capacity_tokens for room in self), default=None)

    def pressure(self, now_s: float) -> float:
        """Part of the living replicas' KV cache, or of their slots, that is taken, whichever is more; 0 for none."""
        alive = [room for room in self if self.is_alive(room, now_s)]
        kv, slots = sum(room.kv_capacity_tokens for room in alive), sum(room.max_slots for room in alive)
        free_kv = sum(max(0, room.room_tokens) for room in alive)
        free_slots = sum(max(0, room.room_slots) for room in alive)
        return max(1 - free_kv / kv if kv else 0.0, 1 - free_slots / slots if slots else 0.0)

    def can_hold(self, room: ReplicaRoom, need_tokens: int, now_s: float) -> bool:
        """Whether the replica is alive and has a slot (or lookahead) and KV room for ``need_tokens`` more."""
        has_room = room.room_slots + self._lookahead > 0 and room.room_tokens >= need_tokens
        return has_room and self.is_alive(room, now_s)

    def is_alive(self, room: ReplicaRoom, now_s: float) -> bool:
        is_heard = now_s - room.heard_s <= self._stale_s
        return is_heard and now_s >= room.suspended_until_s and not room.is_draining

    def best_for(self, need_tokens: int, now_s: float) -> ReplicaRoom | None:
        """Among the replicas that can hold it: one with a free running slot before one that would only queue it,
        then the one with most free KV tokens, then most slots, then the first name.

        A request that needs more than the largest living replica has is held to all of that one: it preempts or
        refuses.
        """
        if self._asleep:
            self._wake(now_s)
        if need_tokens > self._least_kv_tokens:
            largest = max((room.kv_capacity_tokens for room in self if self.is_alive(room, now_s)), default=0)
            need_tokens = min(need_tokens, largest)
        for heap in self._heaps:
            room = self._first(heap, now_s)
            if room is not None and room.free_kv_tokens - room.reserved_tokens >= need_tokens:
                return room
        return None

    def _first(self, heap: list[_Entry], now_s: float) -> ReplicaRoom | None:
        """The living replica on top; the others that surface go out, to sleep if they still count."""
        stale_s = self._stale_s
        while heap:
            entry = heap[0]
            room = entry[3]
            if room.listed is not entry:
                heapq.heappop(heap)
            elif now_s - room.heard_s > stale_s or now_s < room.suspended_until_s or room.is_draining:
                room.listed = None
                self._asleep[room.name] = None
                heapq.heappop(heap)
            elif (
                entry[0] == room.reserved_tokens - room.free_kv_tokens
                and entry[1] == len(room.unconfirmed) - room.free_slots
            ):
                return room
            else:
                room.listed = room.entry
                heapq.heapreplace(heap, room.listed)
        return None

    def _wake(self, now_s: float) -> None:
        for name in [name for name in self._asleep if self.is_alive(self._rooms[name], now_s)]:
            self._changed(self._rooms[name])

    def _changed(self, room: ReplicaRoom) -> None:
        """See to it that the replica stands in the right heap, and not behind where its numbers put it."""
        entry = room.entry
        if self._asleep:
            self._asleep.pop(room.name, None)
        if entry[1] >= self._lookahead:
            room.listed = None
            return
        only_queues = entry[1] >= 0
        if room.listed is not None and room.only_queues == only_queues and room.listed <= entry:
            return
        room.listed, room.only_queues = entry, only_queues
        heap = self._heaps[only_queues]
        heapq.heappush(heap, entry)
        if len(heap) > 4 * len(self._rooms) + 64:
            heap[:] = [one.listed for one in self if one.listed is not None and one.only_queues == only_queues]
            heapq.heapify(heap)

    def report(self, report: StepReport, now_s: float) -> ReplicaRoom:
        """Take over a report's numbers. A new incarnation begins with nothing reserved."""
        room = self._rooms.get(report.replica)
        if room is None or room.incarnation != report.incarnation:
            if room is not None:
                room.listed = None
            room = ReplicaRoom(report.replica, report.incarnation, now_s, 0, 0, 0, 0)
            self._rooms[report.replica] = room
        is_resized = room.kv_capacity_tokens != report.kv_capacity_tokens
        room.heard_s = now_s
        room.free_kv_tokens, room.free_slots = report.free_kv_tokens, report.free_slots
        room.kv_capacity_tokens, room.max_slots = report.kv_capacity_tokens, report.max_slots
        room.num_running, room.num_waiting = report.num_running, report.num_waiting
        if is_resized:
            self._resized()
        self._changed(room)
        return room

    def _resized(self) -> None:
        self._least_kv_tokens = min((room.kv_capacity_tokens for room in self), default=0)

    def reserve(self, replica: str, request_id: str, need_tokens: int) -> None:
        room = self._rooms[replica]
        unconfirmed = room.unconfirmed
        if need_tokens > room.kv_capacity_tokens:
            need_tokens = room.kv_capacity_tokens
        unconfirmed[request_id] = need_tokens
        room.reserved_tokens += need_tokens
        if len(unconfirmed) >= room.free_slots:  # else its entry is only too good now
            self._changed(room)

    def release(self, replica: str, request_id: str) -> None:
        """The request is in the replica's own numbers now, or will not come; no effect when it is not reserved."""
        room = self._rooms.get(replica)
        if room is not None and request_id in room.unconfirmed:
            room.reserved_tokens -= room.unconfirmed.pop(request_id)
            self._changed(room)

    def suspend(self, replica: str, until_s: float) -> None:
        """Grant it nothing until then: a router could not reach it."""
        if replica in self._rooms:
            self._rooms[replica].suspended_until_s = until_s

    def drain(self, replica: str) -> None:
        """Grant it nothing for the rest of its life: it is being stopped."""
        self._rooms[replica].is_draining = True

    def forget(self, replica: str) -> None:
        room = self._rooms.pop(replica, None)
        if room is not None:
            room.listed = None
            self._asleep.pop(replica, None)
            self._resized()

    def check(self) -> None:
        for room in self:
            assert room.reserved_tokens == sum(room.unconfirmed.values()), room
            listed = room.listed is not None or room.name in self._asleep
            assert listed == (room.room_slots + self._lookahead > 0), room
            if room.listed is not None:
                assert room.listed <= room.entry, room
                assert room.only_queues == (room.room_slots <= 0), room
                assert any(entry is room.listed for entry in self._heaps[room.only_queues]), room
