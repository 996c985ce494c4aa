"""Which request goes next, and where to: room first, then the cached prefix, then who must give way."""

from __future__ import annotations

from itertools import islice

from fairserve.dispatch.capacity import Capacity, ReplicaRoom
from fairserve.dispatch.leases import Leases, Waiting
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import Submit
from fairserve.dispatch.most_served import MostServed
from fairserve.dispatch.prefixes import PrefixMap
from fairserve.dispatch.watch import Watch
from fairserve.fairness.policy import Place
from fairserve.fairness.queue import FairQueue

LOOKED_AT = 256
"""Requests of the most served client, the youngest, among which one that would give way is looked for."""
MATCHED_REQUESTS = 4
"""Requests of one client whose prefixes are matched, where the policy looks at prefixes."""


class Placement:
    """Questions change nothing; ``placed`` and ``forget`` keep the map of prefixes."""

    def __init__(
        self, queue: FairQueue[Waiting], capacity: Capacity, leases: Leases, limits: DispatchLimits, watch: Watch
    ) -> None:
        self._queue = queue
        self._capacity = capacity
        self._leases = leases
        self._limits = limits
        self.looks_at_prefixes = queue.policy.window > 1
        """Whether the policy leaves a choice of request and replica; if not, the head goes to the roomiest."""
        self._prefixes = PrefixMap(limits.prefix_block_tokens)
        self._most_served = None if limits.preempt_gap is None else MostServed(queue, leases, watch)

    def next(self) -> Waiting | None:
        """The head of the policy's order or, where it leaves a choice, the one whose prompt is cached the most."""
        if not self.looks_at_prefixes:
            return self._queue.peek()
        window = self._queue.policy.window
        longest, most = None, -1
        for waiting in self._queue.front(window, MATCHED_REQUESTS):
            prefix = waiting.submit.prefix
            if len(prefix) * self._limits.prefix_block_tokens > most:
                num_matched = self._prefixes.num_longest(prefix)
                if num_matched > most:
                    longest, most = waiting, num_matched
        return longest

    def room_for(self, submit: Submit, need: int, now_s: float) -> ReplicaRoom | None:
        """Of the roomiest replica and those that know the beginning of the prompt (or all, where the policy looks
        everywhere), the policy's choice, else the longest match; None when it fits nowhere."""
        capacity, policy = self._capacity, self._queue.policy
        roomiest = capacity.best_for(need, now_s)
        if roomiest is None or not self.looks_at_prefixes:
            return roomiest
        matched = self._prefixes.longest(submit.prefix)
        rooms = {roomiest.name: roomiest}
        known = capacity if policy.looks_everywhere else map(capacity.get, matched)
        for room in known:
            if room is not None and capacity.can_hold(room, need, now_s):
                rooms[room.name] = room
        places = [Place(name, matched.get(name, 0), room.num_requests) for name, room in sorted(rooms.items())]
        chosen = policy.choose_replica(submit.client, places)
        if chosen is None:
            chosen = max(places, key=lambda place: (place.num_matched, place.replica == roomiest.name)).replica
        return rooms[chosen]

    def is_full(self, now_s: float) -> bool:
        """No replica can take even the smallest request, and nobody would give way: nothing needs to be picked."""
        return self._limits.preempt_gap is None and self._capacity.best_for(1, now_s) is None

    def room_over(self, client: str, now_s: float) -> ReplicaRoom | None:
        """Where somebody who was served more than ``preempt_gap`` beyond this client would give way; None for
        nowhere."""
        gap, most_served = self._limits.preempt_gap, self._most_served
        if gap is None or most_served is None:
            return None
        ahead = most_served.first()
        if ahead is None or most_served.lead(ahead, client) <= gap:
            return None
        for lease in islice(self._leases.youngest_first(ahead), LOOKED_AT):
            room = self._capacity.get(lease.replica)
            if room is None or room.granted_over or not lease.has_started:
                continue
            if self._capacity.is_alive(room, now_s):
                return room
        return None

    def placed(self, submit: Submit, room: ReplicaRoom, input_service: float) -> None:
        if submit.prefix:
            self._prefixes.granted(room.name, submit.prefix, room.kv_capacity_tokens)
        self._queue.policy.placed(submit.client, room.name, input_service)

    def forget(self, replica: str) -> None:
        """It is gone, and its cache with it."""
        self._prefixes.forget(replica)
        self._queue.policy.lost_replica(replica)

    def check(self) -> None:
        self._prefixes.check()
