"""Which weight counts for a client: the one its requests carry, or the one that was set live; less past a soft
budget."""

from __future__ import annotations

from fairserve.dispatch.controls import Controls
from fairserve.dispatch.leases import Leases, Waiting
from fairserve.dispatch.watch import Watch
from fairserve.fairness.hierarchy import is_group, path_of
from fairserve.fairness.queue import FairQueue


class Weights:
    """Only this class changes weights of clients once they have requests.

    What a client has received so far stays in its counter as it is; service that is merged from now on counts at the
    new weight. Its place in the order is its counter and does not move, and what a group is charged depends on the
    group's weight only. What is charged and not served yet is charged anew, as if it had been granted at the new
    weight: the reports that settle it will count at the new weight, too, and the client's ceiling (what it may still
    receive on top of its counter, ``fairness/bounds.py``) is then exact.

    The bound stays right without beginning anew. In all of its argument, service / weight becomes the sum of each
    piece of service by the weight at which it was merged; gaps are measured in the same sum. Where the weight falls,
    the ceiling rises without a pick, and U is raised to cover it; where it rises, a counter may fall below the level,
    which is a return like any other. What was delivered and not reported at the moment of the change counts at the new
    weight.
    """

    def __init__(self, queue: FairQueue[Waiting], controls: Controls, leases: Leases, watch: Watch) -> None:
        self._queue = queue
        self._controls = controls
        self._leases = leases
        self._watch = watch
        self._carried: dict[str, float] = {}
        """Of clients whose weight is set live, and of those (and groups) that are held back."""
        self._factors: dict[str, float] = {}
        """Of those that are held back."""

    def carried(self, node: str) -> float:
        """The weight that the client's requests carry, or that its group was given; 1 before the first."""
        carried = self._carried.get(node)
        return self._queue.table.weight(node) if carried is None else carried

    def carry(self, client: str, weight: float) -> None:
        """A request, a report or a snapshot says the client's weight; makes the client known."""
        if client in self._factors or self._controls.of(client).weight is not None:
            self._queue.touch(client)
            self._carried[client] = weight
        self._put(client, self._in_force(client, weight))
        for group in path_of(client)[:-1] if self._factors else ():
            if group in self._factors:
                self._reweigh(group, self._carried.setdefault(group, self._queue.table.weight(group)))

    def control(self, client: str) -> None:
        """The client's live weight may have been set, changed or taken back; makes the client known."""
        self._reweigh(client, self.carried(client))

    def hold_back(self, node: str, factor: float) -> None:
        """Its weight counts so many times: a soft budget is passed (below 1), or no longer (1)."""
        if factor == self._factors.get(node, 1.0):
            return
        is_known = node in self._queue.table
        carried = self.carried(node)
        if factor == 1.0:
            del self._factors[node]
        else:
            self._factors[node] = factor
        if is_known:
            self._reweigh(node, carried)
        else:
            self._carried.pop(node, None)

    def check(self) -> None:
        weighed = {client for client in self._controls if self._controls.of(client).weight is not None}
        assert self._carried.keys() <= weighed | self._factors.keys()
        table = self._queue.table
        known = [(node, carried) for node, carried in self._carried.items() if node in table]
        assert all(table.weight(node) == self._in_force(node, carried) for node, carried in known)

    def _in_force(self, node: str, carried: float) -> float:
        return self._controls.weight(node, carried) * self._factors.get(node, 1.0)

    def _reweigh(self, node: str, carried: float) -> None:
        self._queue.touch(node)
        if node in self._factors or self._controls.of(node).weight is not None:
            self._carried[node] = carried
        else:
            self._carried.pop(node, None)
        self._put(node, self._in_force(node, carried))

    def _put(self, node: str, weight: float) -> None:
        table, watch = self._queue.table, self._watch
        if node not in table:
            self._queue.register(node, weight)
            return
        factor = table.weight(node) / weight
        if factor == 1.0:
            return
        self._queue.register(node, weight)
        clients = [client for client in self._leases.clients() if client.startswith(node)] if is_group(node) else [node]
        place = node.count("/") - is_group(node)  # of the node in the paths of its clients
        with watch.returning(clients):
            held = owed = 0.0
            for client in clients:
                held_here = 0.0
                for lease in self._leases.of(client):
                    rate = lease.rates[place]
                    lease.rates = (*lease.rates[:place], rate * factor, *lease.rates[place + 1 :])
                    held_here += lease.held * rate * (factor - 1.0)
                    owed += lease.owed * rate * (factor - 1.0)
                only_here = tuple([float(i == place) for i in range(len(path_of(client)))])
                self._queue.charge(client, held_here, only_here)
                held += held_here
            watch.reweighed(node, held, owed)
