"""FairQueue: backlog + counters + policy behind one mutating door. The cluster's dispatcher and every replica's local
queue are each one of these."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Generic, TypeVar

from fairserve.fairness.backlog import Backlog
from fairserve.fairness.counters import CounterTable
from fairserve.fairness.heaps import in_order
from fairserve.fairness.hierarchy import TOP, group_of, is_group, path_of
from fairserve.fairness.nodes import Entry, Node
from fairserve.fairness.policy import Order, Policy

Item = TypeVar("Item")
Amounts = tuple[float, ...]
"""One number per node of a client's path, from the top down."""


class Siblings:
    """The members of one group, and which of them wait: what a policy is shown.

    The order is a heap with one entry that counts for each waiting member, (order, member). The order in it may be an
    earlier, lesser one: it is put right when it surfaces, so that a charge, which moves its client back, costs nothing
    here. Entries that do not count are skipped. An entry leads to the member's node, so that to surface costs no look
    into a table.
    """

    def __init__(self, queue: FairQueue[Item]) -> None:
        self._queue = queue
        self.counter = queue.table.counter
        self._heap: list[Entry] = []
        self._fallen: set[Node] = set()
        """Members whose order fell below their entry since somebody last asked who goes next: a charge that returns is
        mostly followed by what was served instead."""
        self.waiting: dict[str, Node] = {}
        """The members that wait."""
        self._last_to_leave: str | None = None
        self.num_members = 0
        """That are known, whether they wait or not."""

    def place(self, client: str) -> float:
        return self._queue.place(client)

    def is_under_way(self, client: str) -> bool:
        return self._queue.is_under_way(client)

    @property
    def last_to_leave(self) -> str | None:
        return self._last_to_leave

    def least_served(self) -> str | None:
        if self._fallen:
            self._put_right()
        heap = self._heap
        while heap:
            entry = heap[0]
            node = entry[2]
            if node.entry is not entry:
                heapq.heappop(heap)
            elif node.order == entry[0]:
                return entry[1]
            else:
                entry = node.entry = (node.order, entry[1], node)
                heapq.heapreplace(heap, entry)
        return None

    def equals_of_first(self) -> Iterator[str]:
        """The waiting members whose order equals the first's, by name."""
        first = self.least_served()
        if first is None:
            return
        least = self.waiting[first].order
        for order, member, node in in_order(self._heap, _counts):
            if order != least:
                return
            if node.order == order:
                yield member

    # Written by the FairQueue only.

    def waits(self, node: Node, order: Order) -> None:
        node.order = order
        if node.entry is None:
            self.waiting[node.name] = node
            self._push(node)
        elif order < node.entry[0]:
            self._fallen.add(node)

    def _put_right(self) -> None:
        """Whose order is below its entry still, stands further in front."""
        for node in self._fallen:
            if node.entry is not None and node.order < node.entry[0]:
                self._push(node)
        self._fallen.clear()

    def _push(self, node: Node) -> None:
        node.entry = (node.order, node.name, node)
        heapq.heappush(self._heap, node.entry)
        if len(self._heap) > 4 * len(self.waiting) + 64:
            self._heap = list(filter(_counts, self._heap))
            heapq.heapify(self._heap)

    def leaves(self, node: Node) -> None:
        if node.entry is not None:
            node.entry = None
            del self.waiting[node.name]
            self._last_to_leave = node.name

    def restore_last_to_leave(self, member: str | None) -> None:
        self._last_to_leave = member

    def check(self) -> None:
        first = self.least_served()
        for name, node in self.waiting.items():
            assert node.siblings is self
            assert node.entry is not None and node.entry[1:] == (name, node) and node.entry[0] <= node.order
        assert sum(map(_counts, self._heap)) == len(self.waiting)
        if first is not None:
            assert (self.waiting[first].order, first) == min((node.order, name) for name, node in self.waiting.items())


def _counts(entry: Entry) -> bool:
    return entry[2].entry is entry


class FairQueue(Generic[Item]):
    """Waiting requests in the policy's order. Every operation costs O(log n) in clients and waiting requests for each
    level of the hierarchy; a flat system has one level.

    ``group_weights``: weight of ``acme`` among organisations, of ``acme/research`` among acme's teams; 1 by default.
    """

    def __init__(self, policy: Policy, group_weights: Mapping[str, float] | None = None) -> None:
        self.policy = policy
        self.table = CounterTable()
        self._group_weights = dict(group_weights or {})
        self._backlog: Backlog[Item] = Backlog()
        self._top = Siblings(self)
        self._groups: dict[str, Siblings] = {TOP: self._top}
        self._under_way: set[str] = set()
        self._moved: set[str] | None = None
        self._before: Callable[[tuple[str, ...]], None] | None = None

    # -- questions ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._backlog)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._backlog

    @property
    def backlog(self) -> Backlog[Item]:
        """To look at; only this class writes it."""
        return self._backlog

    @property
    def groups(self) -> Mapping[str, Siblings]:
        """By name; the top is "". To look at."""
        return self._groups

    def counter(self, node: str) -> float:
        """Of a client or a group."""
        return self.table.counter(node)

    def standing(self, client: str) -> Amounts:
        """The counters along the client's path: clients compare like these, from the top down."""
        return tuple(self.table.counter(node) for node in path_of(client))

    def lead(self, ahead: str, behind: str) -> float:
        """How much more the first client has had than the second: the difference of counters where their paths part;
        0 for one and the same."""
        for one, other in zip(path_of(ahead), path_of(behind), strict=False):
            if one != other:
                return self.table.counter(one) - self.table.counter(other)
        return 0.0

    def rates(self, client: str, price: float = 1.0) -> Amounts:
        """What one unit of service adds to each counter along the path."""
        weight = self.table.weight
        if "/" not in client:
            return (price / weight(client),)
        return tuple([price / weight(node) for node in path_of(client)])

    def place(self, node: str) -> float:
        """Place of the first waiting request of a client, or of whoever goes next in a group."""
        while is_group(node):
            first = self._groups[node].least_served()
            assert first is not None, f"nobody waits in {node}"
            node = first
        return self._backlog.head(node)[0]

    def is_waiting(self, node: str) -> bool:
        if self._backlog.has(node):
            return True
        return is_group(node) and node in self._groups and bool(self._groups[node].waiting)

    def is_under_way(self, client: str) -> bool:
        return client in self._under_way

    def level(self, group: str = TOP) -> float:
        """Where a member of the group that becomes active now is lifted to under VTC: 0 before the first."""
        siblings = self._groups.get(group)
        reference = siblings and (siblings.least_served() or siblings.last_to_leave)
        return self.table.counter(reference) if reference else 0.0

    def least_served(self) -> str | None:
        """The waiting client that goes next, or None."""
        node = self._groups[TOP].least_served()
        while node is not None and is_group(node):
            node = self._groups[node].least_served()
        return node

    def peek(self) -> Item | None:
        """The request that goes next, or None."""
        node = self._top.least_served()
        while node is not None and node.endswith("/"):
            node = self._groups[node].least_served()
        return None if node is None else self._backlog.head(node)[1]

    def front(self, num_clients: int, num_requests: int) -> list[Item]:
        """The first ``num_requests`` of each of at most ``num_clients`` clients that have an equal claim to go next;
        the first entry is :meth:`peek`'s."""
        clients = islice(self._equals(TOP), num_clients)
        if num_requests == 1:
            return [self._backlog.head(client)[1] for client in clients]
        return [item for client in clients for item in islice(self._backlog.first_of(client), num_requests)]

    def _equals(self, group: str) -> Iterator[str]:
        for member in self._groups[group].equals_of_first():
            if is_group(member):
                yield from self._equals(member)
            else:
                yield member

    # -- who may be forgotten -----------------------------------------------------------------------------------------

    def branch_of(self, client: str) -> str:
        """The highest node below which this client is the only one that is known. Counters below it compare with
        nobody's: its own is what would be forgiven."""
        node = client
        while (group := group_of(node)) != TOP and self._groups[group].num_members == 1:
            node = group
        return node

    def can_forget(self, client: str) -> bool:
        """It is known, neither waits nor has an interaction under way, and is not the one by which newcomers are
        lifted when nobody waits. Whether something of it runs, this queue cannot know."""
        if client not in self.table or self._backlog.has(client) or client in self._under_way:
            return False
        top = self.branch_of(client)
        return self._groups[group_of(top)].last_to_leave != top

    def newcomer(self, group: str) -> float:
        """Where a newcomer to the group begins: at 0 where the policy lifts nobody."""
        return self.policy.lift("", self._groups[group]) or 0.0

    def tell_moves(self) -> set[str]:
        """From now on the set that is returned takes in every node whose counter moves; its owner empties it."""
        if self._moved is None:
            self._moved = set(self.table)
        return self._moved

    def tell_before(self, told: Callable[[tuple[str, ...]], None]) -> None:
        """From now on ``told`` is called with nodes whose counter or weight, or who goes next or left last among whose
        members, is about to change; the top need not be named."""
        self._before = told

    def touch(self, client: str) -> None:
        """Something that is kept with the client's counter is about to change."""
        if self._before is not None:
            self._before(path_of(client))

    # -- events ---------------------------------------------------------------------------------------------------

    def register(self, client: str, weight: float = 1.0) -> None:
        """Make a client known, or change its weight.

        Raises:
            ValueError: when ``weight`` is not a positive, finite number.
        """
        self.touch(client)
        for node in path_of(client):
            self._know(node)
        self.table.register(client, weight)

    def _know(self, node: str) -> None:
        """A member more of its group, if it is not known yet."""
        if node in self.table:
            return
        siblings = self._groups[group_of(node)]
        siblings.num_members += 1
        weight = self._group_weights.get(node.removesuffix("/"), 1.0) if is_group(node) else 1.0
        self.table.register(node, weight).siblings = siblings
        if is_group(node):
            self._groups[node] = Siblings(self)

    def _path(self, client: str) -> list[Node]:
        """As :func:`path_of`; the client must be known."""
        if "/" not in client:
            return [self.table.node(client)]
        return [self.table.node(name) for name in path_of(client)]

    def arrive(self, client: str, request_id: str, item: Item, place: float, *, lift: bool = True) -> float:
        """A request waits at ``place`` in its client's queue. Returns by how much counters were lifted, in all.

        ``lift`` False is for a request that was running here and comes back (a preemption): its client never left.
        """
        if client not in self.table:
            self.register(client)
        self.touch(client)
        rise = 0.0
        for node in path_of(client):
            if lift and not self.is_waiting(node):
                target = self.policy.lift(node, self._groups[group_of(node)])
                if target is not None:
                    rise += self.table.lift(node, target)
                    if self._moved is not None:
                        self._moved.add(node)
        self._backlog.push(client, request_id, item, place)
        self._reorder(self._path(client), True)
        return rise

    def pop(self) -> Item:
        """Take out what :meth:`peek` names. There must be one."""
        client = self.least_served()
        assert client is not None, "pop from an empty queue"
        self.touch(client)
        item = self._backlog.pop(client)
        self.picked(client)
        return item

    def pick(self, client: str, request_id: str, service: float, rates: Amounts) -> None:
        """Take out one of :meth:`front`, and :meth:`charge` its client, in one step."""
        path, picked = self._path(client), self.policy.picked
        if self._before is not None:
            self._before(path_of(client))
        if self._moved is not None:
            self._moved.update(path_of(client))
        item = self._backlog.remove(request_id)
        assert item is not None, f"{request_id} does not wait"
        for node, rate in zip(path, rates, strict=True):
            picked(node.name)
            node.counter += service * rate
        self._reorder(path, self._backlog.has(client))

    def picked(self, client: str) -> None:
        """Tell the policy whose turn it was."""
        for node in path_of(client):
            self.policy.picked(node)
        self._reorder(self._path(client), self._backlog.has(client))

    def remove(self, request_id: str) -> Item | None:
        """Take out one request wherever it stands; None when it does not wait."""
        client = self._backlog.client_of(request_id)
        if client is None:
            return None
        self.touch(client)
        item = self._backlog.remove(request_id)
        self._reorder(self._path(client), self._backlog.has(client))
        return item

    def charge(self, client: str, service: float, rates: Amounts | None = None) -> None:
        """Add ``service`` (negative gives back) times ``rates`` to the counters along the path."""
        path = self._path(client)
        if self._before is not None:
            self._before(path_of(client))
        if self._moved is not None:
            self._moved.update(path_of(client))
        if rates is None:
            for node in path:
                node.counter += service * (1.0 / node.weight)
        else:
            for node, rate in zip(path, rates, strict=True):
                node.counter += service * rate
        for node in reversed(path):
            if node.entry is not None:
                node.siblings.waits(node, self.policy.order(node.name, node.siblings))

    def set_counter(self, node: str, counter: float) -> None:
        """Of a client or a group; makes it known."""
        self.touch(node)
        if node not in self.table:
            for above in dict.fromkeys(path_of(node)):
                self._know(above)
        self.table.set(node, counter)
        if self._moved is not None:
            self._moved.add(node)
        first = self.table.node(node)
        if first.entry is not None:
            first.siblings.waits(first, self.policy.order(node, first.siblings))

    def set_under_way(self, client: str, is_under_way: bool) -> None:
        """The client has (no longer) an interaction that has begun and is not over."""
        self.touch(client)
        (self._under_way.add if is_under_way else self._under_way.discard)(client)
        if client in self.table:
            self._reorder(self._path(client), self._backlog.has(client))

    def begin_level(self, client: str) -> None:
        """The client becomes active without a request that waits here: it is lifted like any newcomer."""
        self.touch(client)
        for node in path_of(client):
            target = self.policy.lift(node, self._groups[group_of(node)])
            if target is not None:
                self.table.lift(node, target)
                if self._moved is not None:
                    self._moved.add(node)

    def forget(self, client: str) -> tuple[str, ...]:
        """Nothing is known any more of a client of which :meth:`can_forget` is true, and of groups that it leaves
        empty. Returns these nodes."""
        self.touch(client)
        path, top = path_of(client), self.branch_of(client)
        nodes = path[path.index(top) :]
        for node in reversed(nodes):
            self.table.remove(node)
            self._groups.pop(node, None)
            self._groups[group_of(node)].num_members -= 1
            if self._moved is not None:
                self._moved.discard(node)
            self.policy.forget(node)
        return nodes

    def restore_last_to_leave(self, group: str, member: str | None) -> None:
        """After a restart: the second branch of the lift needs it."""
        if group in self._groups:
            self._groups[group].restore_last_to_leave(member)

    def _reorder(self, path: Sequence[Node], is_waiting: bool) -> None:
        """The counter or the first request of the last of ``path``, a client, has changed."""
        order = self.policy.order
        for node in reversed(path):
            siblings = node.siblings
            if is_waiting:
                siblings.waits(node, order(node.name, siblings))
            else:
                siblings.leaves(node)
            is_waiting = bool(siblings.waiting)

    def check(self) -> None:
        self.table.check()
        self._backlog.check()
        waiting = {node for client in self._backlog.clients() for node in path_of(client)}
        assert {node for siblings in self._groups.values() for node in siblings.waiting} == waiting
        members = Counter(map(group_of, self.table))
        for name, siblings in self._groups.items():
            siblings.check()
            assert siblings.num_members == members[name], name
            for member, node in siblings.waiting.items():
                assert group_of(member) == name and self.table.node(member) is node
                assert node.order == self.policy.order(member, siblings), member
