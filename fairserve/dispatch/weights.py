"""Which weight counts for a client: the one its requests carry, or the one that was set live."""

from __future__ import annotations

from fairserve.dispatch.controls import Controls
from fairserve.dispatch.leases import Leases, Waiting
from fairserve.dispatch.watch import Watch
from fairserve.fairness.hierarchy import path_of
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
        """Of clients whose weight is set live."""

    def carried(self, client: str) -> float:
        """The weight that the client's requests carry; 1 before the first."""
        carried = self._carried.get(client)
        return self._queue.table.weight(client) if carried is None else carried

    def carry(self, client: str, weight: float) -> None:
        """A request, a report or a snapshot says the client's weight; makes the client known."""
        if self._controls.of(client).weight is not None:
            self._queue.touch(client)
            self._carried[client] = weight
            weight = self._controls.weight(client, weight)
        self._put(client, weight)

    def control(self, client: str) -> None:
        """The client's live weight may have been set, changed or taken back; makes the client known."""
        carried = self.carried(client)
        live = self._controls.of(client).weight
        self._queue.touch(client)
        if live is None:
            self._carried.pop(client, None)
        else:
            self._carried[client] = carried
        self._put(client, carried if live is None else live)

    def check(self) -> None:
        weighed = {client for client in self._controls if self._controls.of(client).weight is not None}
        assert self._carried.keys() <= weighed
        table = self._queue.table
        assert all(table.weight(client) == self._controls.of(client).weight for client in weighed if client in table)

    def _put(self, client: str, weight: float) -> None:
        table, watch = self._queue.table, self._watch
        if client not in table:
            self._queue.register(client, weight)
            return
        factor = table.weight(client) / weight
        if factor == 1.0:
            return
        self._queue.register(client, weight)
        with watch.returning((client,)):
            held = owed = 0.0
            for lease in self._leases.of(client):
                *groups, rate = lease.rates
                lease.rates = (*groups, rate * factor)
                held += lease.held * rate * (factor - 1.0)
                owed += lease.owed * rate * (factor - 1.0)
            self._queue.charge(client, held, (0.0,) * (len(path_of(client)) - 1) + (1.0,))
            watch.reweighed(client, held, owed)
