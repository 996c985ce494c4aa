"""The counter actor: one Dispatcher behind a named, detached, restartable Ray actor.

:class:`CounterService` is a plain asyncio object, so that a test can hold one without Ray; :func:`start_counter_actor`
puts the shell round it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fairserve.assembly import make_dispatcher
from fairserve.clock import Clock, SystemClock
from fairserve.cluster.actor_metrics import ActorMetrics
from fairserve.cluster.counter_client import for_ever
from fairserve.cluster.desk import MAX_AUDIT, Change, Desk
from fairserve.cluster.keeper import (
    ClusterMemory,
    Keeper,
    Memory,
    cluster_id,
    id_memory,
    live_memory,
    ray_session_folder,
    store_of,
)
from fairserve.cluster.line_file import LineFile
from fairserve.cluster.metrics_sink import MetricsSink, actor_metrics
from fairserve.cluster.reading import About, Reading, told
from fairserve.cluster.saver import Saver
from fairserve.cluster.tracing import DispatchSpans, make_tracing
from fairserve.config import ApiConfig, CounterConfig, FairServeArgs
from fairserve.dispatch.controls import NO_CONTROL, Control, Controls
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.demand import Demand, demand
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.history import WEEK_S
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.dispatch.notes import Notes
from fairserve.dispatch.overview import known_clients
from fairserve.dispatch.snapshots import adopted, document, laid_over, read_document
from fairserve.dispatch.status import status
from fairserve.dispatch.store import Overtaken, Snapshot, Store
from fairserve.errors import InvalidRequest, UnknownClient
from fairserve.fairness.hierarchy import is_group

logger = logging.getLogger(__name__)

TICK_S = 0.1
MAX_CONCURRENCY = 10_000
"""Calls the actor may hold at once: two per router and one per replica. Ray's default of 1,000 deadlocks when it is
reached, because a report then waits behind the polls that wait for it."""
MAX_RESTORED = 300_000
"""Points of history that a restart waits for."""
HEAD_NODE_RESOURCE = "node:__internal_head__"


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
        self._session_folder = session_folder
        self._unix_s = unix_s
        self._clock = clock or SystemClock()
        epoch = epoch or time.time_ns()
        self._saver = Saver(lambda: cluster_id(id_memory), epoch, unix_s, self._clock.now_s)
        self._keeper = Keeper(self._store_of(self._config), live_memory)
        self._seen_live: str | None = None
        state, audit = self._keeper.begin()
        self._desk = Desk(deployed, unix_s, state=state, audit=audit)
        self._changing = asyncio.Lock()
        self._controls = Controls()
        for client, control in state.controls.items():
            self._controls.put(client, control)
        self._args = self._desk.in_force
        self._on_idle = on_idle
        self._log_file: LineFile | None = None
        if self._config.decision_log_path:
            self._log_file = LineFile(self._config.decision_log_path, heading=lambda: self._log_heading)
        self._log_heading = ""
        self._dispatcher = self._new_dispatcher(self._args, epoch)
        self._reading = Reading(lambda: self._dispatcher, self._about, self._clock.now_s, unix_s=unix_s)
        restored, why = self._restore(audit)
        num_restored = len(known_clients(self._dispatcher)) if restored else 0
        self._dispatcher.notes.started(num_restored, self._clock.now_s(), why)
        restored = restored or ("scratch" if why or was_restarted() else "first")
        self._metrics: ActorMetrics | None = None
        if metrics is not None:
            self._metrics = ActorMetrics(metrics, deployed.metrics.top_clients, restored)
        self._exported_s = self._clock.now_s() - deployed.metrics.interval_s
        self._spans = DispatchSpans(make_tracing(deployed.tracing))
        self._polls: dict[str, set[asyncio.Event]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._saved_s = self._busy_s = self._clock.now_s()
        self._saved_acks: dict[tuple[str, int], int] = {}
        """What the snapshot in the store has of each replica's reports."""

    # -- the protocol -------------------------------------------------------------------------------------------------

    async def route(self, call: RouterCall) -> RouterReply:
        """Submits, cancels, declined grants; see :meth:`Dispatcher.route`."""
        self._spans.called(call)
        reply = self._dispatcher.route(call, self._now_s())
        self._spans.replied(reply)
        self._wake_routers()
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        """Grants and late refusals for this router, as soon as there are any, at the latest after ``poll_s``."""
        reply = await self._poll(call)
        self._spans.replied(reply)
        return reply

    async def _poll(self, call: RouterCall) -> RouterReply:
        asked = self._dispatcher
        reply = asked.poll(call, self._now_s())
        if reply.grants or reply.refusals or reply.resubmit:
            return reply
        event = asyncio.Event()
        polls = self._polls.setdefault(call.router, set())  # more than one when the router gave one up
        polls.add(event)
        try:
            async with asyncio.timeout(self._config.poll_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            polls.discard(event)
            if not polls:
                self._polls.pop(call.router, None)
        if self._dispatcher is not asked:  # configured anew: even after its first call a router submits again
            call = replace(call, epoch=asked.epoch)
        return self._dispatcher.poll(call, self._now_s())

    async def report(self, report: StepReport) -> ReportReply:
        """A replica's totals and events; see :meth:`Dispatcher.report`."""
        reply = self._dispatcher.report(report, self._now_s())
        self._wake_routers()
        if self._keeper.store is None:
            return reply
        return replace(reply, saved=min(reply.ack, self._saved_acks.get((report.replica, report.incarnation), 0)))

    # -- for people ---------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """A plain picture of clients, replicas, gap and bound."""
        return status(self._dispatcher, self._now_s())

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

    async def demand(self) -> Demand:
        """The work of the whole cluster, for autoscaling."""
        return demand(self._dispatcher, self._now_s())

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
        if has_moved:
            async with self._changing:
                self._saver.moved()
                self._saved_acks = {}
                await asyncio.to_thread(self._keeper.move, self._store_of(self._config), self._desk.state)
                self._dispatcher.ledger.is_shared = self._config.is_in_redis
        if is_new and self._memory is not None:
            await asyncio.to_thread(self._memory.remember, args_json)
        return self._dispatcher.epoch

    async def ping(self) -> int:
        """The epoch."""
        self._now_s()
        return self._dispatcher.epoch

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
            self._dispatcher.control(name, control, self._now_s())
            self._wake_routers()

        def is_node(name: str) -> bool:
            return name in self._dispatcher.queue.table

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
        head, cut = await self._saver.take(self._dispatcher)
        return await asyncio.to_thread(lambda: document(head, cut.snapshot()))

    async def import_counters(self, exported: dict[str, Any], who: str) -> int:
        """Lay the counters of such an export over those in force; a new epoch begins. The same one twice changes
        nothing more. Returns how many clients it names.

        Raises:
            InvalidRequest: it is no such export, or something in it is wrong.
        """
        now_s = self._now_s()
        try:
            head, snapshot = await asyncio.to_thread(read_document, exported)
            theirs = adopted(head, snapshot)
            mine = self._dispatcher.dump()
            self._exchange_dispatcher(self._args, laid_over(mine, theirs, self._saver.cluster))
        except ValueError as error:
            raise InvalidRequest(f"these counters cannot be imported: {error}") from None
        num_clients = sum(not is_group(node) for node in snapshot["counters"])
        self._dispatcher.notes.changed(who, f"the counters: imported those of {num_clients:,} clients", now_s)
        return num_clients

    async def _change(self, plan: Callable[[], Change], apply: Callable[[Any], None] = lambda answer: None) -> Any:
        """Check, keep, adopt, apply; one change at a time. What is kept is adopted even when the caller has gone."""
        self._now_s()

        async def make() -> Any:
            async with self._changing:
                change = plan()
                await asyncio.to_thread(self._keeper.keep, change)
                self._desk.adopt(change)
                apply(change.answer)
                who, what, client = told(change.entry)
                self._dispatcher.notes.changed(who, what, self._clock.now_s(), client)
                return change.answer

        return await asyncio.shield(asyncio.create_task(make()))

    def _take_settings(self) -> None:
        """The settings in force may have changed."""
        args = self._desk.in_force
        if (args.fairness, args.dispatch) != (self._args.fairness, self._args.dispatch):
            self._exchange_dispatcher(args, self._dispatcher.dump())
        self._args = args

    def _exchange_dispatcher(self, args: FairServeArgs, snapshot: Snapshot) -> None:
        """Another one goes on from the snapshot; nothing changes where it cannot be loaded."""
        epoch = max(time.time_ns(), self._dispatcher.epoch + 1)
        follows = self._new_dispatcher(args, epoch, self._dispatcher.notes)
        try:
            follows.load(snapshot)
        except BaseException:
            self._dispatcher.notes.begins(self._dispatcher.queue.is_waiting)
            raise
        self._dispatcher = follows
        self._wake(self._polls)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _about(self) -> About:
        return About(self._args.model_name, self._args.fairness.prediction)

    def _new_dispatcher(self, args: FairServeArgs, epoch: int, notes: Notes | None = None) -> Dispatcher:
        log = None
        if self._log_file is not None:
            log = DecisionLog(self._log_file.write)
            log.began(policy=args.fairness.policy, epoch=epoch, now_s=self._clock.now_s())
            self._log_heading = log.heading
        dispatcher = make_dispatcher(
            args.fairness, args.dispatch, epoch=epoch, log=log, notes=notes, controls=self._controls
        )
        dispatcher.ledger.is_shared = self._config.is_in_redis
        return dispatcher

    def _store_of(self, config: CounterConfig) -> Store | None:
        return store_of(config, self._session_folder, lambda: self._saver.cluster, self._unix_s)

    def _restore(self, audit: list[dict[str, Any]]) -> tuple[str, str]:
        """Where the counters go on from: a snapshot, or nowhere (""), and why nowhere if there was one."""
        restored, why, store = "", "", self._keeper.store
        if store is None:
            return restored, why
        mine = self._saver.cluster  # asks Ray now: later the event loop would wait for the answer
        try:
            found = store.load()
            if found is None:
                self._saver.go_on(None)
            else:
                head, snapshot = found
                is_mine = head.cluster in ("", mine) or not self._config.is_in_redis
                alive = {one.cluster for one in store.heads()}
                self._dispatcher.load(snapshot if is_mine else adopted(head, snapshot, alive))
                restored = "snapshot"
                self._saver.go_on(head if is_mine else None)
        except OSError as error:
            why = f"{error}"
            logger.error("counters begin level: %s", why)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            try:
                why = f"{error}; set aside as {store.set_aside()}"
            except OSError as failed:
                why = f"{error}; it could not be set aside: {failed}"
            logger.error("counters begin level: %s", why)
            self._dispatcher = self._new_dispatcher(self._args, self._dispatcher.epoch)
            self._keeper.put_back(self._desk.state, audit)
        try:
            if not why:
                self._reading.history_book.load(store.load_history(60, self._unix_s() - WEEK_S, MAX_RESTORED))
        except (OSError, ValueError) as error:
            logger.error("history begins anew: %s", error)
        return restored, why

    def _now_s(self) -> float:
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(for_ever(self._tick))
        return self._clock.now_s()

    def _wake_routers(self) -> None:
        self._wake(self._dispatcher.take_routers_to_wake())

    def _wake(self, routers: Iterable[str]) -> None:
        for router in routers:
            for event in self._polls.get(router, ()):
                event.set()

    async def _tick(self) -> None:
        await asyncio.sleep(TICK_S)
        now_s = self._clock.now_s()
        self._dispatcher.tick(now_s)
        self._spans.keep(self._dispatcher.holds)
        self._wake_routers()
        await self._reading.tick()
        await self._export(now_s)
        if self._log_file is not None:
            await asyncio.to_thread(self._log_file.flush)
        store, is_free = self._keeper.store, self._keeping is None or self._keeping.done()
        if store is not None and is_free and now_s - self._saved_s >= self._config.snapshot_s - TICK_S:
            self._saved_s = now_s
            self._keeping = asyncio.create_task(self._keep(store))
        if self._dispatcher.is_idle:
            if now_s - self._busy_s > self._config.idle_ttl_s and self._on_idle is not None:
                self._on_idle()
        else:
            self._busy_s = now_s

    async def _export(self, now_s: float) -> None:
        metrics = self._metrics
        if metrics is None or now_s - self._exported_s < self._args.metrics.interval_s:
            return
        self._exported_s = now_s
        picture = await self._reading.overview(metrics.num_rows)
        rows = {}
        for name in metrics.missing(picture):
            with contextlib.suppress(UnknownClient):
                rows[name] = await self._reading.client(name)
        metrics.export(picture, rows.get, now_s)

    async def _keep(self, store: Store) -> None:
        """Save what changed; exchange with the clusters that share the store. Beside the ticks: a store may hang."""
        try:
            acks = self._dispatcher.ledger.acks()
            if not await self._saver.save(store, lambda: self._dispatcher):
                return
            self._saved_acks = acks
            if rows := self._reading.take_new_rows():
                await asyncio.to_thread(store.save_history, rows, {60: self._unix_s() - WEEK_S})
            if self._config.is_in_redis:
                await self._saver.merge_others(store, lambda: self._dispatcher)
                await self._share_changes(store)
        except (OSError, ValueError) as error:
            self._saver.failed(store, error)
        except Exception:
            logger.exception("what should outlive the counter actor could not be kept")

    async def _share_changes(self, store: Store) -> None:
        """Take over what another cluster changed live, or tell what was changed here."""
        async with self._changing:
            with contextlib.suppress(Overtaken):  # the next round takes it over
                shared = await asyncio.to_thread(self._keeper.share, self._desk.state, self._seen_live)
                state, self._seen_live = shared
                if state is None:
                    return
                audit = [json.loads(entry) for entry in await asyncio.to_thread(store.load_audit, MAX_AUDIT)]
                before = self._desk.state.controls
                self._desk.take_over(state, audit)
                for client in {**before, **state.controls}:
                    if self._desk.control(client) != before.get(client, NO_CONTROL):
                        self._dispatcher.control(client, self._desk.control(client), self._clock.now_s())
                self._take_settings()
                self._wake_routers()


def end_this_actor() -> None:
    """End the actor this runs in, for good: no restart."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def was_this_actor_restarted() -> bool:
    import ray

    try:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
    except Exception:
        logger.exception("Ray does not tell whether this actor was restarted")
        return False


def place_of(config: CounterConfig, offered: Mapping[str, float]) -> dict[str, float] | None:
    """The custom resources that keep the actor on its node; ``offered`` is what the cluster has by now."""
    if config.resource is not None:
        return {config.resource: 0.001}
    if config.pin_to_head and HEAD_NODE_RESOURCE in offered:
        return {HEAD_NODE_RESOURCE: 0.001}
    return None


def start_counter_actor(args: FairServeArgs) -> Any:
    """The handle of the counter actor of these settings; creates it when it is not there. Blocks on Ray.

    Plain, named and detached, restarted for ever, its calls never retried by Ray (a retry would run twice); Serve's
    ``deployment_actors`` would restart it empty on every roll-out.
    """
    import ray

    config = args.counter
    offered = ray.cluster_resources()
    if config.resource is not None and config.resource not in offered:
        logger.warning("no node offers %r (counter.resource) yet: the counter actor waits for one", config.resource)
    return (
        ray.remote(CounterService)
        .options(
            name=config.name,
            namespace=config.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENCY,
            num_cpus=0,
            resources=place_of(config, offered),
        )
        .remote(
            without_keys(args).model_dump_json(),
            on_idle=end_this_actor,
            memory=ClusterMemory(),
            live_memory=live_memory(config),
            id_memory=id_memory(config),
            session_folder=ray_session_folder,
            metrics=actor_metrics(args.metrics, config.name),
            was_restarted=was_this_actor_restarted,
        )
    )


def without_keys(args: FairServeArgs) -> FairServeArgs:
    """The same settings without the API section, which holds secrets: only the ingress needs it."""
    return args.model_copy(update={"api": ApiConfig()})


def find_counter_actor(config: CounterConfig) -> Any:
    """The handle of the running counter actor.

    Raises:
        ValueError: there is none of that name.
    """
    import ray

    return ray.get_actor(config.name, namespace=config.namespace)
