"""What the counter actor holds for one model: a Dispatcher, with long polls, a clock and a store round it.

What all its models share (keys, what was set live, who changed it) is in ``counter_service.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from fairserve.clock import Clock
from fairserve.cluster.actor_metrics import ActorMetrics
from fairserve.cluster.authority import Authority
from fairserve.cluster.live_changes import LiveChanges
from fairserve.cluster.long_polls import LongPolls
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.cluster.reading import About, Reading
from fairserve.cluster.saver import Saver
from fairserve.cluster.tracing import DispatchSpans, make_tracing
from fairserve.cluster.upkeep import Upkeep
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.controls import Control
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.dispatch.overview import known_clients
from fairserve.dispatch.store import Store
from fairserve.dispatch.usage import UsageBook
from fairserve.errors import UnknownClient

TICK_S = 0.1


class ModelCounters:
    """Forwards to the Dispatcher; adds waiting, the clock and snapshots. Decides nothing.

    Args:
        args: the settings in force, of this model.
        epoch: of the first Dispatcher, and the number of this life.
        clock, unix_s: the authority's clock and the wall's.
        controls: what is set live for clients.
        usage: what clients receive of this model, by day.
        saver: writes into ``store``; None keeps nothing.
        changes: what was changed live, where it is kept beside these counters.
        metrics: None exports none.
        was_restarted: whether this is not the first life.
    """

    def __init__(
        self,
        args: FairServeArgs,
        epoch: int,
        clock: Clock,
        unix_s: Callable[[], float],
        *,
        controls: dict[str, Control],
        usage: UsageBook,
        saver: Saver,
        store: Store | None,
        changes: LiveChanges | None = None,
        metrics: MetricsSink | None = None,
        was_restarted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config: CounterConfig = args.counter
        self._clock = clock
        self._unix_s = unix_s
        usage.turn(unix_s())
        self.authority = Authority(args, epoch, clock, controls, usage)
        self.reading = Reading(lambda: self.dispatcher, self._about, clock.now_s, unix_s=unix_s)
        self._polls = LongPolls()
        self.upkeep = Upkeep(self.authority, self.reading, saver, store, changes, unix_s)
        restored, why = self.upkeep.restore()
        num_restored = len(known_clients(self.dispatcher)) if restored else 0
        self.dispatcher.notes.started(num_restored, clock.now_s(), why)
        self._metrics: ActorMetrics | None = None
        if metrics is not None:
            restored = restored or ("scratch" if why or was_restarted() else "first")
            self._metrics = ActorMetrics(metrics, args.metrics.top_clients, restored)
        self._exported_s = clock.now_s() - args.metrics.interval_s
        self._spans = DispatchSpans(make_tracing(args.tracing))
        self._saved_s = clock.now_s()

    @property
    def dispatcher(self) -> Dispatcher:
        """The one in force."""
        return self.authority.dispatcher

    @property
    def usage(self) -> UsageBook:
        return self.authority.usage

    # -- the protocol -------------------------------------------------------------------------------------------------

    def route(self, call: RouterCall) -> RouterReply:
        """Submits, cancels, declined grants; see :meth:`Dispatcher.route`."""
        self._spans.called(call)
        reply = self.dispatcher.route(call, self._clock.now_s())
        self._spans.replied(reply)
        self.wake_routers()
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        """Grants and late refusals for this router, as soon as there are any, at the latest after ``poll_s``."""
        reply = await self._poll(call)
        self._spans.replied(reply)
        return reply

    async def _poll(self, call: RouterCall) -> RouterReply:
        asked = self.dispatcher
        reply = asked.poll(call, self._clock.now_s())
        if reply.grants or reply.refusals or reply.resubmit:
            return reply
        await self._polls.wait(call.router, self.config.poll_s)
        if self.dispatcher is not asked:  # configured anew: even after its first call a router submits again
            call = replace(call, epoch=asked.epoch)
        return self.dispatcher.poll(call, self._clock.now_s())

    def reports(self, reports: Iterable[StepReport]) -> tuple[ReportReply, ...]:
        """Replicas' totals and events; see :meth:`Dispatcher.report`."""
        now_s = self._clock.now_s()
        replies = tuple([self._report(report, now_s) for report in reports])
        self.wake_routers()
        return replies

    def _report(self, report: StepReport, now_s: float) -> ReportReply:
        reply = self.dispatcher.report(report, now_s, self.upkeep.saved_of(report))
        if report.epoch != reply.epoch:
            return replace(reply, fairness=self.authority.args.fairness.model_dump_json())
        return reply

    # -- changes ------------------------------------------------------------------------------------------------------

    def take_settings(self, args: FairServeArgs) -> None:
        """The settings in force, of this model, may have changed."""
        if self.authority.take_settings(args):
            self._polls.wake_all()

    async def deploy(self, args: FairServeArgs, store: Callable[[CounterConfig], Store | None]) -> None:
        """A new deployment's settings for the actor itself; :meth:`take_settings` is for the others. ``store`` makes
        the one that they name."""
        has_moved = args.counter.store != self.config.store
        self.config = args.counter
        self.usage.keep_days, self.usage.max_clients = self.config.usage_days, self.config.usage_clients
        self.usage.keep_hour_days = self.config.usage_hour_days
        if has_moved:
            await self.upkeep.move(store(self.config), is_shared=self.config.is_in_redis)

    def control(self, client: str, control: Control) -> None:
        """See :meth:`Dispatcher.control`."""
        self.authority.control(client, control)
        self.wake_routers()

    def exchange(self, snapshot: dict[str, Any]) -> None:
        """Go on from this snapshot, in a new epoch; see :meth:`Authority.exchange`."""
        self.authority.exchange(snapshot)
        self._polls.wake_all()

    def wake_routers(self) -> None:
        """Long polls of routers that have something to be told answer now."""
        self._polls.wake(self.dispatcher.take_routers_to_wake())

    # -- time ---------------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Every ``TICK_S``."""
        await asyncio.sleep(TICK_S)
        now_s = self._clock.now_s()
        self.usage.turn(self._unix_s())
        self.dispatcher.tick(now_s)
        self._spans.keep(self.dispatcher.holds)
        self.wake_routers()
        await self.reading.tick()
        await self._export(now_s)
        if self.authority.log_file is not None:
            await asyncio.to_thread(self.authority.log_file.flush)
        if now_s - self._saved_s >= self.config.snapshot_s - TICK_S and self.upkeep.begin():
            self._saved_s = now_s

    async def _export(self, now_s: float) -> None:
        metrics = self._metrics
        if metrics is None or now_s - self._exported_s < self.authority.args.metrics.interval_s:
            return
        self._exported_s = now_s
        picture = await self.reading.overview(metrics.num_rows)
        rows = {}
        for name in metrics.missing(picture):
            with contextlib.suppress(UnknownClient):
                rows[name] = await self.reading.client(name)
        metrics.export(picture, rows.get, now_s)

    def _about(self) -> About:
        args = self.authority.args
        return About(args.model_name, args.fairness.prediction)
