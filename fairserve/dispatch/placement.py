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
MATCHED = 256
"""Requests whose prefixes are matched for a grant, where the policy looks at prefixes: the first ones of the clients
that have an equal claim, as many of each. Of as many clients as the policy's window holds: one of each."""


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

    def next(self, now_s: float) -> Waiting | None:
        """The head of the policy's order or, where it leaves a choice, the one of whose prompt most is cached where
        there is most room now: what is cached where there is none helps nobody. Of those that fit there, if any does.

        A request is passed over by later ones of its client as long as it has not waited twice as long as they.
        """
        queue = self._queue
        roomiest = self._capacity.best_for(1, now_s) if self.looks_at_prefixes else None
        if roomiest is None:
            return queue.peek()
        window = queue.policy.window
        num_clients = queue.backlog.num_clients
        if not num_clients:
            return None
        num_known, need_tokens = self._prefixes.num_known, self._limits.need_tokens
        first, longest, most, head = None, None, -1, None
        for waiting in queue.front(window, MATCHED // num_clients if num_clients < window else 1):
            submit = waiting.submit
            if head is None or head.submit.client != submit.client:
                head = waiting
                first = first or waiting
            may_overtake = waiting.arrived_s - head.arrived_s <= now_s - waiting.arrived_s
            if may_overtake and need_tokens(submit) <= roomiest.room_tokens:
                known = num_known(submit.prefix, roomiest.name, most)
                if known > most:
                    longest, most = waiting, known
        return longest or first

    def room_for(self, submit: Submit, need: int, now_s: float) -> ReplicaRoom | None:
        """Of the roomiest replica and those that know the beginning of the prompt (or all, where the policy looks
        everywhere), the policy's choice, else the longest match; None when it fits nowhere."""
        capacity, policy = self._capacity, self._queue.policy
        roomiest = capacity.best_for(need, now_s)
        if roomiest is None or not self.looks_at_prefixes:
            return roomiest
        prefix, num_known = submit.prefix, self._prefixes.num_known
        rooms = {roomiest.name: roomiest}
        known = capacity if policy.looks_everywhere else map(capacity.get, self._prefixes.holders(prefix))
        for room in known:
            if room is not None and capacity.can_hold(room, need, now_s):
                rooms[room.name] = room
        places = [Place(name, num_known(prefix, name), room.num_requests) for name, room in sorted(rooms.items())]
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
