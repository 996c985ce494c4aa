"""How many replicas the work at hand needs, judged from the one queue of the whole cluster.

The unit is the *batchful*: what one replica can run at once, its slots or its KV cache, whichever is taken first. What
runs is measured in it, and so is what waits: Serve's own policy sees requests alike, and those of one router at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.dispatch.dispatcher import Dispatcher


@dataclass(frozen=True, slots=True)
class Demand:
    """Over the living replicas. Tokens are KV tokens: of what waits, those that a grant would reserve."""

    num_replicas: int
    max_slots: int
    kv_capacity_tokens: int
    num_running: int
    """Granted and not finished."""
    used_tokens: int
    num_waiting: int
    waiting_tokens: int

    def running_batches(self) -> float:
        """Batchfuls that run; 0 without replicas."""
        return self._batches(self.num_running, self.used_tokens)

    def waiting_batches(self) -> float:
        """Batchfuls that wait; 1 for anything at all while there is no replica to measure by."""
        return (
            self._batches(self.num_waiting, self.waiting_tokens) if self.num_replicas else float(self.num_waiting > 0)
        )

    def _batches(self, num: int, tokens: int) -> float:
        if not (self.max_slots and self.kv_capacity_tokens):
            return 0.0
        return self.num_replicas * max(num / self.max_slots, tokens / self.kv_capacity_tokens)


def demand(dispatcher: Dispatcher, now_s: float) -> Demand:
    """Costs one look at every waiting request: ask once a second."""
    rooms = [room for room in dispatcher.capacity if dispatcher.capacity.is_alive(room, now_s)]
    need = dispatcher.limits.need_tokens
    return Demand(
        num_replicas=len(rooms),
        max_slots=sum(room.max_slots for room in rooms),
        kv_capacity_tokens=sum(room.kv_capacity_tokens for room in rooms),
        num_running=len(dispatcher.leases),
        used_tokens=sum(room.kv_capacity_tokens - max(0, room.room_tokens) for room in rooms),
        num_waiting=len(dispatcher.queue),
        waiting_tokens=sum(need(waiting.submit) for waiting in dispatcher.queue.backlog),
    )


def wanted_replicas(seen: Demand, *, target_use: float, replicas_per_waiting_batch: float) -> float:
    """Replicas at which what runs takes ``target_use`` (0 to 1] of them, and ``replicas_per_waiting_batch`` more for
    each batchful that waits. Not rounded and not bounded: Serve does both, after its delays."""
    return seen.running_batches() / target_use + seen.waiting_batches() * replicas_per_waiting_batch
