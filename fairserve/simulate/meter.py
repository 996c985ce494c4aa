"""What is measured while a simulated cluster runs: it sees what is delivered, not what the authority believes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fairserve.simulate.gaps import PairGaps
from fairserve.simulate.live import Live
from fairserve.simulate.timeline import Timeline


class Meter:
    """Two views of waiting. The world's: a request that has come and not started, wherever it is. The authority's: one
    that stands in its queue. Clients are compared while the authority says that they wait, because that is what its
    bound is about, and no longer than the world says so. Without an authority there is only the world's view.
    """

    def __init__(self, timeline: Timeline, group_weights: Mapping[str, float], max_watched: int) -> None:
        self._timeline = timeline
        self._group_weights = group_weights
        self.service: dict[str, float] = {}
        """Delivered service / weight, by client and by organisation (whose name ends with a slash)."""
        self.busy_s = 0.0
        self.idle_while_waiting_s = 0.0
        self.num_steps = 0
        self.num_preempted = 0
        self.num_recomputed = 0
        self._num_idle = 0
        self._num_busy = 0
        self._num_waiting = 0
        self._since_s = 0.0
        self._waiting: dict[str, int] = {}
        self._gaps = PairGaps(max_watched)

    # -- requests -----------------------------------------------------------------------------------------------------

    def came(self, live: Live) -> None:
        self.pass_time()
        self._num_waiting += 1
        self._waiting[live.node] = self._waiting.get(live.node, 0) + 1

    def left(self, live: Live) -> None:
        """It waits no more: it has started, or is over without having started."""
        self.pass_time()
        self._num_waiting -= 1
        node = live.node
        self._waiting[node] -= 1
        if not self._waiting[node]:
            del self._waiting[node]
            if node in self._gaps:
                self._gaps.leave(node)

    def delivered(self, live: Live, service: float) -> None:
        """The request has received ``service`` in all by now. Tell :meth:`moved` once the step is through."""
        amount = service - live.service
        live.service = service
        client = live.request.client
        self.service[client] = self.service.get(client, 0.0) + amount / live.request.weight
        if live.node != client:
            weight = self._group_weights.get(live.node[:-1], 1.0)
            self.service[live.node] = self.service.get(live.node, 0.0) + amount / weight

    # -- gaps ---------------------------------------------------------------------------------------------------------

    def moved(self, nodes: Iterable[str]) -> None:
        """Something was delivered to them."""
        self._gaps.move({node: self.service[node] for node in nodes})

    def look(self, is_waiting: Callable[[str], bool]) -> None:
        """Somebody may have begun to wait or have stopped."""
        gaps = self._gaps
        for node in [node for node in gaps if not is_waiting(node)]:
            gaps.leave(node)
        if not gaps.is_full:
            for node in self._waiting:
                if node not in gaps and not gaps.is_full and is_waiting(node):
                    gaps.join(node, self.service.get(node, 0.0))

    def is_waiting(self, node: str) -> bool:
        """The world's view."""
        return node in self._waiting

    @property
    def worst_gap(self) -> float:
        return self._gaps.worst

    # -- replicas -----------------------------------------------------------------------------------------------------

    def replicas_changed(self, *, idle: int = 0, busy: int = 0) -> None:
        """So many more replicas stand idle, or compute a step."""
        self.pass_time()
        self._num_idle += idle
        self._num_busy += busy

    def pass_time(self) -> None:
        """Book the time since the last call, in which nothing changed."""
        now_s = self._timeline.now_s
        passed_s = now_s - self._since_s
        if passed_s:
            self._since_s = now_s
            self.busy_s += self._num_busy * passed_s
            if self._num_waiting:
                self.idle_while_waiting_s += self._num_idle * passed_s
