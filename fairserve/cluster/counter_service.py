"""What the counter actor answers: one Dispatcher, with long polls, a clock and a store round it.

A plain asyncio object, so that a test can hold one without Ray; ``counter_actor.py`` puts the shell round it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fairserve.clock import Clock, SystemClock
from fairserve.cluster.actor_metrics import ActorMetrics
from fairserve.cluster.authority import Authority
from fairserve.cluster.counter_client import for_ever
from fairserve.cluster.desk import Change, Desk
from fairserve.cluster.keeper import Keeper, Memory, cluster_id, store_of
from fairserve.cluster.long_polls import LongPolls
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.cluster.reading import About, Reading, told
from fairserve.cluster.saver import Saver
from fairserve.cluster.tracing import DispatchSpans, make_tracing
from fairserve.cluster.upkeep import Upkeep
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.controls import Control
from fairserve.dispatch.demand import Demand, demand
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.dispatch.overview import known_clients
from fairserve.dispatch.snapshots import adopted, document, laid_over, read_document
from fairserve.dispatch.status import status
from fairserve.dispatch.store import Snapshot
from fairserve.dispatch.usage import UsageBook
from fairserve.errors import InvalidRequest, UnknownClient
from fairserve.fairness.hierarchy import is_group

TICK_S = 0.1
USAGE_PAGE = 2_000
"""Rows of usage in one answer, and those that its last day has beyond."""


class CounterService:
    """Forwards to the Dispatcher; adds waiting (long polls), the clock and snapshots. Decides nothing.

    ``memory`` keeps the settings of the newest :meth:`configure` for a restart, which comes with the first settings;
    ``live_memory`` keeps what was changed live, beside the store; ``id_memory`` the id of this Ray cluster.
    ``session_folder`` names the folder of the cluster's session, where there is one. ``metrics`` None: none are
    exported. ``was_restarted`` tells whether this is not the actor's first life.
    """

    def __init__(
        self,
        args_json: str,
        *,
        clock: Clock | None = None,
        epoch: int | None = None,
        on_idle: Callable[[], None] | None = None,
        memory: Memory | None = None,
        live_memory: Memory | None = None,
        id_memory: Memory | None = None,
        session_folder: Callable[[], str] | None = None,
        unix_s: Callable[[], float] = time.time,
        metrics: MetricsSink | None = None,
        was_restarted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._memory = memory
        deployed = FairServeArgs.model_validate_json((memory.recall() if memory else None) or args_json)
        self._deployed_json = deployed.model_dump_json()
        self._config: CounterConfig = deployed.counter
        self._clock = clock or SystemClock()
        epoch = epoch or time.time_ns()
        saver = Saver(lambda: cluster_id(id_memory), epoch, unix_s, self._clock.now_s)
        self._store_of = partial(store_of, session_folder=session_folder, cluster=lambda: saver.cluster, unix_s=unix_s)
        keeper = Keeper(self._store_of(self._config), live_memory)
        state, audit = keeper.begin()
        self._desk = Desk(deployed, unix_s, state=state, audit=audit)
        usage = UsageBook(deployed.counter.usage_days, deployed.counter.usage_clients)
        usage.turn(unix_s())
        self._unix_s = unix_s
        self._authority = Authority(self._desk.in_force, epoch, self._clock, state.controls, usage)
        self._reading = Reading(lambda: self.dispatcher, self._about, self._clock.now_s, unix_s=unix_s)
        self._polls = LongPolls()
        self._upkeep = Upkeep(self._authority, self._desk, self._reading, keeper, saver, self._take_over, unix_s)
        restored, why = self._upkeep.restore(audit)
        num_restored = len(known_clients(self.dispatcher)) if restored else 0
        self.dispatcher.notes.started(num_restored, self._clock.now_s(), why)
        self._metrics: ActorMetrics | None = None
        if metrics is not None:
            restored = restored or ("scratch" if why or was_restarted() else "first")
            self._metrics = ActorMetrics(metrics, deployed.metrics.top_clients, restored)
        self._exported_s = self._clock.now_s() - deployed.metrics.interval_s
        self._spans = DispatchSpans(make_tracing(deployed.tracing))
        self._ticking: asyncio.Task[None] | None = None
        self._on_idle = on_idle
        self._saved_s = self._busy_s = self._clock.now_s()

    @property
    def dispatcher(self) -> Dispatcher:
        """The one in force."""
        return self._authority.dispatcher

    # -- the protocol -------------------------------------------------------------------------------------------------

    async def route(self, call: RouterCall) -> RouterReply:
        """Submits, cancels, declined grants; see :meth:`Dispatcher.route`."""
        self._spans.called(call)
        reply = self.dispatcher.route(call, self._now_s())
        self._spans.replied(reply)
        self._wake_routers()
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        """Grants and late refusals for this router, as soon as there are any, at the latest after ``poll_s``."""
        reply = await self._poll(call)
        self._spans.replied(reply)
        return reply

    async def _poll(self, call: RouterCall) -> RouterReply:
        asked = self.dispatcher
        reply = asked.poll(call, self._now_s())
        if reply.grants or reply.refusals or reply.resubmit:
            return reply
        await self._polls.wait(call.router, self._config.poll_s)
        if self.dispatcher is not asked:  # configured anew: even after its first call a router submits again
            call = replace(call, epoch=asked.epoch)
        return self.dispatcher.poll(call, self._now_s())

    async def report(self, report: StepReport) -> ReportReply:
        """A replica's totals and events; see :meth:`Dispatcher.report`."""
        reply = self._report(report, self._now_s())
        self._wake_routers()
        return reply

    async def reports(self, reports: tuple[StepReport, ...]) -> tuple[ReportReply, ...]:
        """Those of several replicas; the reply to each."""
        now_s = self._now_s()
        replies = tuple([self._report(report, now_s) for report in reports])
        self._wake_routers()
        return replies

    def _report(self, report: StepReport, now_s: float) -> ReportReply:
        reply = self.dispatcher.report(report, now_s, self._upkeep.saved_of(report))
        if report.epoch != reply.epoch:
            return replace(reply, fairness=self._authority.args.fairness.model_dump_json())
        return reply

    # -- for people ---------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """A plain picture of clients, replicas, gap and bound."""
        return status(self.dispatcher, self._now_s())

    async def overview(self, top: int = 50, search: str | None = None) -> dict[str, Any]:
        """``views.Overview``; see :class:`~fairserve.cluster.reading.Reading` for this and the next four."""
        self._now_s()
        return await self._reading.overview(top, search)

    async def clients(
        self, offset: int = 0, limit: int = 100, order: str = "service", search: str | None = None
    ) -> dict[str, Any]:
        """``views.ClientPage``: descending, but by name ascending."""
        self._now_s()
        return await self._reading.clients(offset, limit, order, search)

    async def client(self, name: str) -> dict[str, Any]:
        """``views.ClientView``."""
        self._now_s()
        return await self._reading.client(name)

    async def history(self, clients: list[str], since_s: float = 0, resolution_s: int = 1) -> dict[str, Any]:
        """``views.History`` since a Unix time."""
        self._now_s()
        return await self._reading.history(clients, since_s, resolution_s)

    async def events(self, after_seq: int = 0, limit: int = 200) -> list[dict[str, Any]]:
        """``views.EventView``, oldest first."""
        self._now_s()
        return await self._reading.events(after_seq, limit)

    async def usage(self, first_day: int, last_day: int) -> dict[str, Any]:
        """What clients used on UTC days since 1970; see :meth:`UsageBook.page`."""
        self._now_s()
        rows, next_day = self._authority.usage.page(first_day, last_day, USAGE_PAGE)
        return {"rows": rows, "next_day": next_day}

    async def demand(self) -> Demand:
        """The work of the whole cluster, for autoscaling."""
        return demand(self.dispatcher, self._now_s())

    async def configure(self, args_json: str) -> int:
        """Take over the fairness and dispatch settings of a new deployment. Counters stay; a change of settings begins
        a new epoch, so that routers submit again and replicas report in full. What was changed live stays over them.
        Returns the epoch."""
        self._now_s()
        deployed = FairServeArgs.model_validate_json(args_json)
        self._desk.deploy(deployed)
        self._take_settings()
        has_moved = deployed.counter.store != self._config.store
        is_new = deployed.model_dump_json() != self._deployed_json
        self._config, self._deployed_json = deployed.counter, deployed.model_dump_json()
        usage = self._authority.usage
        usage.keep_days, usage.max_clients = deployed.counter.usage_days, deployed.counter.usage_clients
        if has_moved:
            await self._upkeep.move(self._store_of(self._config), is_shared=self._config.is_in_redis)
        if is_new and self._memory is not None:
            await asyncio.to_thread(self._memory.remember, args_json)
        return self.dispatcher.epoch

    async def ping(self) -> int:
        """The epoch."""
        self._now_s()
        return self.dispatcher.epoch

    # -- changes ------------------------------------------------------------------------------------------------------
    # Durable when they return; each is one entry of the audit log, in the name of ``who``.

    async def set_client(self, name: str, change: dict[str, Any], who: str) -> dict[str, Any]:
        """Set fields of ``views.ClientChange``, None takes one back, in force from the next pick on. Returns
        ``views.ClientView``.

        Raises:
            InvalidRequest: a field is wrong or unknown, or there can be no client of that name.
            ChangeNotKept: it could not be written down, and was not made.
        """

        def put(control: Control) -> None:
            self.dispatcher.control(name, control, self._now_s())
            self._wake_routers()

        def is_node(name: str) -> bool:
            return name in self.dispatcher.queue.table

        await self._change(lambda: self._desk.plan_client(name, change, who, is_node), put)
        return await self.client(name)

    async def set_settings(self, change: dict[str, Any], who: str) -> list[dict[str, Any]]:
        """Set settings by path, None takes one back to the deployment's. A new epoch begins. Returns
        ``views.SettingView`` of those that were named.

        Raises:
            InvalidRequest: a value is wrong, or a setting cannot be changed live.
            ChangeNotKept: see :meth:`set_client`.
        """
        paths = await self._change(lambda: self._desk.plan_settings(change, who), lambda _: self._take_settings())
        return self._desk.settings(paths)

    async def add_key(self, entry: dict[str, Any], who: str) -> dict[str, Any]:
        """Add an API key: fields of ``config.ApiKey``, with its digest and without the secret. Every ingress accepts it
        within about a second. Returns ``views.KeyView``.

        Raises:
            InvalidRequest: the entry is wrong, or contradicts another live key.
            ChangeNotKept: see :meth:`set_client`.
        """
        view: dict[str, Any] = await self._change(lambda: self._desk.plan_key(entry, who))
        return view

    async def revoke_key(self, id: str, who: str) -> dict[str, Any]:  # noqa: A002 (the view's word)
        """Take a live key away; ``id``: the first digits of its digest. Every ingress refuses it within about a second.
        Returns ``views.KeyView``.

        Raises:
            UnknownKey: no live key begins so.
            InvalidRequest: several do.
            ChangeNotKept: see :meth:`set_client`.
        """
        view: dict[str, Any] = await self._change(lambda: self._desk.plan_revoke(id, who))
        return view

    async def keys(self) -> list[dict[str, Any]]:
        """``views.KeyView`` of the live keys; those of the deployment are known to the ingress only."""
        return self._desk.keys()

    async def key_directory(self, version: int) -> dict[str, Any] | None:
        """The live keys for an ingress that knows those of ``version`` (-1: none); None when it is up to date. While an
        ingress asks, the actor is in use, even without requests and replicas."""
        self._busy_s = self._now_s()
        return self._desk.key_directory(version)

    async def settings(self) -> list[dict[str, Any]]:
        """``views.SettingView`` of all settings that can be changed live."""
        return self._desk.settings()

    async def audit(self, before_seq: int | None = None, limit: int = 200) -> list[dict[str, Any]]:
        """``views.AuditView``, newest first."""
        return self._desk.audit(before_seq, limit)

    # -- moving counters between clusters -----------------------------------------------------------------------------

    async def export_counters(self) -> dict[str, Any]:
        """Counters and totals of one moment, as plain values that are JSON."""
        self._now_s()
        head, cut = await self._upkeep.cut()
        return await asyncio.to_thread(lambda: document(head, cut.snapshot()))

    async def import_counters(self, exported: dict[str, Any], who: str) -> int:
        """Lay the counters of such an export over those in force; a new epoch begins. The same one twice changes
        nothing more. Returns how many clients it names.

        Raises:
            InvalidRequest: it is no such export, or something in it is wrong.
        """
        self._now_s()
        try:
            head, snapshot = await asyncio.to_thread(read_document, exported)
            theirs = adopted(head, snapshot)
        except ValueError as error:
            raise _cannot_import(error) from None
        num_clients = sum(not is_group(node) for node in snapshot["counters"])

        def laid_over_mine() -> Snapshot:
            return laid_over(self.dispatcher.dump(), theirs, self._upkeep.cluster)

        def plan() -> Change:
            try:
                self._authority.try_out(laid_over_mine())
            except ValueError as error:
                raise _cannot_import(error) from None
            return self._desk.plan_import(head.cluster, num_clients, who)

        def exchange(answer: Any) -> None:
            self._authority.exchange(laid_over_mine())
            self._polls.wake_all()

        await self._change(plan, exchange)
        return num_clients

    async def _change(self, plan: Callable[[], Change], apply: Callable[[Any], None] = lambda answer: None) -> Any:
        """Check, keep, adopt, apply; one change at a time. What is kept is adopted even when the caller has gone."""
        self._now_s()

        async def make() -> Any:
            async with self._upkeep.changing:
                change = plan()
                await asyncio.to_thread(self._upkeep.keeper.keep, change)
                self._desk.adopt(change)
                apply(change.answer)
                who, what, client = told(change.entry)
                self.dispatcher.notes.changed(who, what, self._clock.now_s(), client)
                return change.answer

        return await asyncio.shield(asyncio.create_task(make()))

    def _take_settings(self) -> None:
        """The settings in force may have changed."""
        if self._authority.take_settings(self._desk.in_force):
            self._polls.wake_all()

    def _take_over(self) -> None:
        """Another cluster has changed settings, or controls of clients."""
        self._take_settings()
        self._wake_routers()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _about(self) -> About:
        args = self._authority.args
        return About(args.model_name, args.fairness.prediction)

    def _now_s(self) -> float:
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(for_ever(self._tick))
        return self._clock.now_s()

    def _wake_routers(self) -> None:
        self._polls.wake(self.dispatcher.take_routers_to_wake())

    async def _tick(self) -> None:
        await asyncio.sleep(TICK_S)
        now_s = self._clock.now_s()
        self._authority.usage.turn(self._unix_s())
        self.dispatcher.tick(now_s)
        self._spans.keep(self.dispatcher.holds)
        self._wake_routers()
        await self._reading.tick()
        await self._export(now_s)
        if self._authority.log_file is not None:
            await asyncio.to_thread(self._authority.log_file.flush)
        if now_s - self._saved_s >= self._config.snapshot_s - TICK_S and self._upkeep.begin():
            self._saved_s = now_s
        if self.dispatcher.is_idle:
            if now_s - self._busy_s > self._config.idle_ttl_s and self._on_idle is not None:
                self._on_idle()
        else:
            self._busy_s = now_s

    async def _export(self, now_s: float) -> None:
        metrics = self._metrics
        if metrics is None or now_s - self._exported_s < self._authority.args.metrics.interval_s:
            return
        self._exported_s = now_s
        picture = await self._reading.overview(metrics.num_rows)
        rows = {}
        for name in metrics.missing(picture):
            with contextlib.suppress(UnknownClient):
                rows[name] = await self._reading.client(name)
        metrics.export(picture, rows.get, now_s)


def _cannot_import(error: ValueError) -> InvalidRequest:
    return InvalidRequest(f"these counters cannot be imported: {error}")
