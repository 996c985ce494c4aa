"""The authority on virtual time: the real Dispatcher, its long polls, its crashes. See ``cluster/counter_actor.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fairserve.dispatch.dispatcher import Dispatcher, DispatchLimits
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.fairness.bounds import GapMonitor
from fairserve.fairness.hierarchy import TOP
from fairserve.simulate.meter import Meter
from fairserve.simulate.network import Call
from fairserve.simulate.setup import ClusterSetup
from fairserve.simulate.timeline import Timeline

TICK_S = 0.1
"""Between ticks of the dispatcher, as live."""
SETTLE_S = 2.0
"""How long after a restart the authority's view of who waits is not asked: routers submit again meanwhile."""


@dataclass(slots=True)
class Tally:
    """Figures over all lives of the authority."""

    num_lifts: int = 0
    num_lapsed: int = 0
    unit: float = 0.0
    staleness: float = 0.0
    bound: float = 0.0

    def add(self, dispatcher: Dispatcher) -> None:
        self.num_lifts += getattr(dispatcher, "num_lifts", 0)
        self.num_lapsed += getattr(dispatcher, "num_lapsed", 0)
        bounds = getattr(dispatcher, "bounds", None)
        for name in ("unit", "staleness", "bound"):
            setattr(self, name, max(getattr(self, name), getattr(bounds, name, 0.0)))


class Authority:
    """Forwards to the Dispatcher, as the counter actor does; decides nothing."""

    def __init__(self, setup: ClusterSetup, timeline: Timeline, meter: Meter) -> None:
        assert setup.make_dispatcher is not None
        self._setup = setup
        self._make_dispatcher = setup.make_dispatcher
        self._timeline = timeline
        self._meter = meter
        self.dispatcher = self._new_dispatcher(1)
        self._is_up = True
        self._polls: dict[str, list[tuple[RouterCall, Call[RouterReply]]]] = {}
        self._snapshot: dict[str, Any] | None = None
        self._seen = (0, 0, 0)
        self._settled_s = 0.0
        self._earlier = Tally()
        timeline.every(TICK_S, self._tick)
        if any(fault.kind == "actor_crash" and fault.with_snapshot for fault in setup.faults):
            timeline.every(setup.counter.snapshot_s, self._save)

    @property
    def limits(self) -> DispatchLimits:
        return self.dispatcher.limits

    @property
    def tally(self) -> Tally:
        tally = Tally(**{name: getattr(self._earlier, name) for name in Tally.__slots__})
        tally.add(self.dispatcher)
        return tally

    # -- calls --------------------------------------------------------------------------------------------------------

    def route(self, message: RouterCall, call: Call[RouterReply]) -> None:
        if not self._is_up:
            call.fail()
            return
        call.answer(self.dispatcher.route(message, self._timeline.now_s))
        self._after_event()

    def poll(self, message: RouterCall, call: Call[RouterReply]) -> None:
        """Grants, as soon as there are any, at the latest after ``poll_s``."""
        if not self._is_up:
            call.fail()
            return
        reply = self.dispatcher.poll(message, self._timeline.now_s)
        if reply.grants or reply.refusals or reply.resubmit:
            call.answer(reply)
            return
        parked = (message, call)
        self._polls.setdefault(message.router, []).append(parked)
        self._timeline.after(self._setup.counter.poll_s, partial(self._poll_is_due, message.router, parked))

    def report(self, message: StepReport, call: Call[ReportReply]) -> None:
        if not self._is_up:
            call.fail()
            return
        call.answer(self.dispatcher.report(message, self._timeline.now_s))
        self._after_event()

    # -- faults -------------------------------------------------------------------------------------------------------

    def crash(self, *, with_snapshot: bool) -> None:
        """Gone now, back after ``actor_restart_s``, with the newest snapshot or with nothing."""
        if not self._is_up:
            return
        self._is_up = False
        polls, self._polls = self._polls, {}
        for parked in polls.values():
            for _, call in parked:
                call.fail()
        restart = partial(self._restart, self._snapshot if with_snapshot else None)
        self._timeline.after(self._setup.actor_restart_s, restart)

    def _restart(self, snapshot: dict[str, Any] | None) -> None:
        self._earlier.add(self.dispatcher)
        self.dispatcher = self._new_dispatcher(self.dispatcher.epoch + 1)
        if snapshot is not None:
            self.dispatcher.load(snapshot)
        self._is_up = True
        self._settled_s = self._timeline.now_s + SETTLE_S

    def revive(self) -> None:
        """Be up at once: for the accounts after the end of a run."""
        if not self._is_up:
            self._restart(None)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_dispatcher(self, epoch: int) -> Dispatcher:
        dispatcher = self._make_dispatcher(epoch)
        # The meter watches delivered service; the gaps in merged service, which cost a third of a run, nobody reads.
        dispatcher.watch.gaps[TOP] = GapMonitor(max_clients=0)
        return dispatcher

    def _tick(self) -> None:
        if self._is_up:
            self.dispatcher.tick(self._timeline.now_s)
            self._after_event()

    def _save(self) -> None:
        if self._is_up:
            self._snapshot = self.dispatcher.dump()

    def _poll_is_due(self, router: str, parked: tuple[RouterCall, Call[RouterReply]]) -> None:
        waiting = self._polls.get(router, ())
        if any(one is parked for one in waiting):
            self._answer_polls([router], lambda one: one is parked)

    def _answer_polls(
        self, routers: Iterable[str], which: Callable[[tuple[RouterCall, Call[RouterReply]]], bool] = lambda one: True
    ) -> None:
        for router in routers:
            for parked in [one for one in self._polls.get(router, ()) if which(one)]:
                self._polls[router].remove(parked)
                message, call = parked
                call.answer(self.dispatcher.poll(message, self._timeline.now_s))

    def _after_event(self) -> None:
        self._answer_polls(sorted(self.dispatcher.take_routers_to_wake()))
        # Whoever joins or leaves the queue changes one of these.
        seen = (len(self.dispatcher.queue), self.dispatcher.num_granted, self.dispatcher.num_lapsed)
        if seen != self._seen and self._timeline.now_s >= self._settled_s:
            self._seen = seen
            self._meter.look(self.dispatcher.queue.is_waiting)
