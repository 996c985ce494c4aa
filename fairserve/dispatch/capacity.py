"""What every replica can still take: its own report, minus what was granted and is not in that report yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fairserve.dispatch.messages import StepReport


@dataclass(slots=True)
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
    unconfirmed: dict[str, int] = field(default_factory=dict)
    """request id -> KV tokens reserved for it."""
    reserved_tokens: int = 0

    @property
    def room_tokens(self) -> int:
        return self.free_kv_tokens - self.reserved_tokens

    @property
    def room_slots(self) -> int:
        """Running slots still free; negative once the lookahead is in use."""
        return self.free_slots - len(self.unconfirmed)


class Capacity:
    """Room on all replicas. Questions are pure; report, reserve, release, suspend and forget act."""

    def __init__(self, lookahead: int, stale_s: float) -> None:
        self._lookahead = lookahead
        self._stale_s = stale_s
        self._rooms: dict[str, ReplicaRoom] = {}

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

    def can_hold(self, room: ReplicaRoom, need_tokens: int, now_s: float) -> bool:
        """Whether the replica is alive and has a slot (or lookahead) and KV room for ``need_tokens`` more."""
        has_room = room.room_slots + self._lookahead > 0 and room.room_tokens >= need_tokens
        return has_room and self._is_alive(room, now_s)

    def _is_alive(self, room: ReplicaRoom, now_s: float) -> bool:
        return now_s - room.heard_s <= self._stale_s and now_s >= room.suspended_until_s

    def best_for(self, need_tokens: int, now_s: float) -> ReplicaRoom | None:
        """Among the replicas that can hold it: one with a free running slot before one that would only queue it,
        then the one with most free KV tokens, then most slots, then the first name.

        A request that needs more than the largest living replica has is held to all of that one: it preempts or
        refuses.
        """
        largest = max((room.kv_capacity_tokens for room in self if self._is_alive(room, now_s)), default=0)
        need_tokens = min(need_tokens, largest)
        fitting = (room for room in self if self.can_hold(room, need_tokens, now_s))
        return min(
            fitting,
            key=lambda room: (room.room_slots <= 0, -room.room_tokens, -room.room_slots, room.name),
            default=None,
        )

    def report(self, report: StepReport, now_s: float) -> ReplicaRoom:
        """Take over a report's numbers. A new incarnation begins with nothing reserved."""
        room = self._rooms.get(report.replica)
        if room is None or room.incarnation != report.incarnation:
            room = ReplicaRoom(report.replica, report.incarnation, now_s, 0, 0, 0, 0)
            self._rooms[report.replica] = room
        room.heard_s = now_s
        room.free_kv_tokens, room.free_slots = report.free_kv_tokens, report.free_slots
        room.kv_capacity_tokens, room.max_slots = report.kv_capacity_tokens, report.max_slots
        room.num_running, room.num_waiting = report.num_running, report.num_waiting
        return room

    def reserve(self, replica: str, request_id: str, need_tokens: int) -> None:
        room = self._rooms[replica]
        room.unconfirmed[request_id] = min(need_tokens, room.kv_capacity_tokens)
        room.reserved_tokens += room.unconfirmed[request_id]

    def release(self, replica: str, request_id: str) -> None:
        """The request is in the replica's own numbers now, or will not come; no effect when it is not reserved."""
        room = self._rooms.get(replica)
        if room is not None and request_id in room.unconfirmed:
            room.reserved_tokens -= room.unconfirmed.pop(request_id)

    def suspend(self, replica: str, until_s: float) -> None:
        """Grant it nothing until then: a router could not reach it."""
        if replica in self._rooms:
            self._rooms[replica].suspended_until_s = until_s

    def forget(self, replica: str) -> None:
        self._rooms.pop(replica, None)

    def check(self) -> None:
        for room in self:
            assert room.reserved_tokens == sum(room.unconfirmed.values()), room
