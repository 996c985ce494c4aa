"""What the counter actor answers: the counters of every model, and what they share.

A plain asyncio object, so that a test can hold one without Ray; ``counter_actor.py`` puts the shell round it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fairserve.clock import Clock, SystemClock
from fairserve.cluster.across_models import AcrossModels
from fairserve.cluster.counter_client import for_ever
from fairserve.cluster.desk import Change, Desk
from fairserve.cluster.keeper import Keeper, Memory, cluster_id, store_of
from fairserve.cluster.live_changes import LiveChanges
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.cluster.model_counters import TICK_S, ModelCounters
from fairserve.cluster.reading import told
from fairserve.cluster.saver import Saver
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.controls import Control
from fairserve.dispatch.demand import Demand, demand
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.dispatch.snapshots import adopted, document, laid_over, read_document
from fairserve.dispatch.status import status
from fairserve.dispatch.store import Snapshot, Store
from fairserve.dispatch.usage import UsageBook
from fairserve.errors import InvalidRequest, UnknownModel
from fairserve.fairness.hierarchy import is_group

UsagePage = tuple[list[tuple[Any, ...]], int | None]
"""Rows of whole days, or hours, and the one to ask for next."""
USAGE_PAGE = 2_000
"""Rows of usage in one answer, and those that its last day has beyond."""


class CounterService:
    """One :class:`ModelCounters` for each model of the deployment, and the desk where all of them are changed.

    In every method ``model`` is the slot or the name of a model, "" the first one's.

    ``memory`` keeps the settings of the newest :meth:`configure` for a restart, which comes with the first settings;
    ``live_memory`` keeps what was changed live, beside the store; ``id_memory`` the id of this Ray cluster.
    ``session_folder`` names the folder of the cluster's session, where there is one. ``metrics`` makes what exports the
    metrics of counters of a name; None: none are exported. ``was_restarted`` tells whether this is not the actor's
    first life.
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
        metrics: Callable[[str], MetricsSink | None] = lambda counters: None,
        was_restarted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._memory = memory
        deployed = FairServeArgs.model_validate_json((memory.recall() if memory else None) or args_json)
        self._deployed_json = deployed.model_dump_json()
        self._config: CounterConfig = deployed.counter
        self._clock = clock or SystemClock()
        self._unix_s = unix_s
        self._life = epoch or time.time_ns()
        self._cluster = ""
        self._id_memory = id_memory
        self._metrics = metrics
        self._was_restarted = was_restarted
        self._store_of = partial(store_of, session_folder=session_folder, cluster=self._find_cluster, unix_s=unix_s)
        store = self._store_of(self._config)
        keeper = Keeper(store, live_memory)
        state, audit = keeper.begin()
        self._desk = Desk(deployed, unix_s, state=state, audit=audit)
        self._changes = LiveChanges(self._desk, keeper, audit, self._take_over)
        self._models: dict[str, ModelCounters] = {}
        self._models[""] = self._make("", store, self._changes)
        for slot in deployed.slots[1:]:
            self._models[slot] = self._make(slot)
        self._across = AcrossModels(self._models)
        self._across.is_on = deployed.across_models
        self._introduce()
        self._configuring = asyncio.Lock()
        self._ticking: dict[str, asyncio.Task[None]] = {}
        self._ticking_all: asyncio.Task[None] | None = None
        self._on_idle = on_idle
        self._busy_s = self._clock.now_s()

    @property
    def main(self) -> ModelCounters:
        """The first model's."""
        return self._models[""]

    @property
    def dispatcher(self) -> Dispatcher:
        """The one in force, of the first model."""
        return self.main.dispatcher

    # -- the protocol -------------------------------------------------------------------------------------------------

    async def route(self, call: RouterCall, model: str = "") -> RouterReply:
        """See :meth:`ModelCounters.route`."""
        return self._of(model).route(call)

    async def poll(self, call: RouterCall, model: str = "") -> RouterReply:
        """See :meth:`ModelCounters.poll`."""
        return await self._of(model).poll(call)

    async def report(self, report: StepReport, model: str = "") -> ReportReply:
        """A replica's totals and events; see :meth:`Dispatcher.report`."""
        return self._of(model).reports((report,))[0]

    async def reports(self, reports: tuple[StepReport, ...], model: str = "") -> tuple[ReportReply, ...]:
        """Those of several replicas; the reply to each."""
        return self._of(model).reports(reports)

    # -- for people ---------------------------------------------------------------------------------------------------

    async def status(self, model: str = "") -> dict[str, Any]:
        """A plain picture of clients, replicas, gap and bound."""
        return status(self._of(model).dispatcher, self._clock.now_s())

    async def overview(self, top: int = 50, search: str | None = None, model: str = "") -> dict[str, Any]:
        """``views.Overview``; see :class:`~fairserve.cluster.reading.Reading` for this and the next four."""
        return await self._of(model).reading.overview(top, search)

    async def clients(
        self,
        offset: int = 0,
        limit: int = 100,
        order: str = "service",
        search: str | None = None,
        model: str = "",
    ) -> dict[str, Any]:
        """``views.ClientPage``: descending, but by name ascending."""
        return await self._of(model).reading.clients(offset, limit, order, search)

    async def client(self, name: str, model: str = "") -> dict[str, Any]:
        """``views.ClientView``."""
        return await self._of(model).reading.client(name)

    async def history(
        self, clients: list[str], since_s: float = 0, resolution_s: int = 1, model: str = ""
    ) -> dict[str, Any]:
        """``views.History`` since a Unix time."""
        return await self._of(model).reading.history(clients, since_s, resolution_s)

    async def events(self, after_seq: int = 0, limit: int = 200, model: str = "") -> list[dict[str, Any]]:
        """``views.EventView``, oldest first."""
        return await self._of(model).reading.events(after_seq, limit)

    async def usage(self, first_day: int, last_day: int, model: str = "") -> dict[str, Any]:
        """What clients used on UTC days since 1970, of all models where none is named; see :meth:`UsageBook.page`. Each
        row ends with the name of its model."""
        rows, next_day = self._usage(model, lambda book: book.page(first_day, last_day, USAGE_PAGE))
        return {"rows": rows, "next_day": next_day}

    async def usage_by_hour(self, first_hour: int, last_hour: int, model: str = "") -> dict[str, Any]:
        """The same of hours since 1970.

        Raises:
            InvalidRequest: none are kept.
        """
        if self._config.usage_hour_days == 0:
            raise InvalidRequest("usage is not kept by hour here: counter.usage_hour_days is 0", param="by")
        rows, next_hour = self._usage(model, lambda book: book.hour_page(first_hour, last_hour, USAGE_PAGE))
        return {"rows": rows, "next_hour": next_hour}

    def _usage(self, model: str, page: Callable[[UsageBook], UsagePage]) -> UsagePage:
        self._tick_all()
        pages = [
            (one.authority.args.model_name, *page(one.usage))
            for one in ([self._of(model)] if model else self._models.values())
        ]
        following = min((then for _, _, then in pages if then is not None), default=None)
        rows = [(*row, name) for name, rows, _ in pages for row in rows if following is None or row[0] < following]
        return sorted(rows), following

    async def demand(self, model: str = "") -> Demand:
        """The work of the whole cluster, for autoscaling."""
        return demand(self._of(model).dispatcher, self._clock.now_s())

    async def models(self) -> list[dict[str, Any]]:
        """``views.ModelView`` of every model, the first one's first."""
        return [
            {
                "name": one.authority.args.model_name,
                "slot": slot,
                "price": one.authority.args.price,
                "is_compared": self._across.is_on and len(self._models) > 1,
            }
            for slot, one in self._models.items()
        ]

    async def configure(self, args_json: str) -> int:
        """Take over the fairness and dispatch settings of a new deployment. Counters stay; a change of settings begins
        a new epoch, so that routers submit again and replicas report in full. What was changed live stays over them.
        A model that is new begins level; one that is no longer deployed goes when it is idle. Returns the epoch."""
        self._tick_all()
        deployed = FairServeArgs.model_validate_json(args_json)
        async with self._configuring:
            self._desk.deploy(deployed)
            self._config = deployed.counter
            json = deployed.model_dump_json()
            is_new, self._deployed_json = json != self._deployed_json, json
            for slot in deployed.slots:
                if slot not in self._models:
                    self._models[slot] = await asyncio.to_thread(self._make, slot)
            self._introduce()
            self._take_settings()
            for slot in deployed.slots:
                await self._models[slot].deploy(deployed.of_model(slot), self._store_of)
            if is_new and self._memory is not None:
                await asyncio.to_thread(self._memory.remember, args_json)
        return self.dispatcher.epoch

    async def ping(self) -> int:
        """The epoch."""
        self._tick_all()
        return self.dispatcher.epoch

    # -- changes ------------------------------------------------------------------------------------------------------
    # Durable when they return; each is one entry of the audit log, in the name of ``who``.

    async def set_client(self, name: str, change: dict[str, Any], who: str, model: str = "") -> dict[str, Any]:
        """Set fields of ``views.ClientChange``, None takes one back, in force from the next pick on. Returns
        ``views.ClientView`` of this model; what is set holds for all.

        Raises:
            InvalidRequest: a field is wrong or unknown, or there can be no client of that name.
            ChangeNotKept: it could not be written down, and was not made.
        """

        def put(control: Control) -> None:
            for one in self._models.values():
                one.control(name, control)

        def is_node(name: str) -> bool:
            return any(name in one.dispatcher.queue.table for one in self._models.values())

        await self._change(lambda: self._desk.plan_client(name, change, who, is_node), put)
        return await self.client(name, model)

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
        self._tick_all()
        self._busy_s = self._clock.now_s()
        return self._desk.key_directory(version)

    async def settings(self) -> list[dict[str, Any]]:
        """``views.SettingView`` of all settings that can be changed live."""
        return self._desk.settings()

    async def audit(self, before_seq: int | None = None, limit: int = 200) -> list[dict[str, Any]]:
        """``views.AuditView``, newest first."""
        return self._desk.audit(before_seq, limit)

    # -- moving counters between clusters -----------------------------------------------------------------------------

    async def export_counters(self, model: str = "") -> dict[str, Any]:
        """Counters and totals of one moment, as plain values that are JSON."""
        head, cut = await self._of(model).upkeep.cut()
        return await asyncio.to_thread(lambda: document(head, cut.snapshot()))

    async def import_counters(self, exported: dict[str, Any], who: str, model: str = "") -> int:
        """Lay the counters of such an export over those in force; a new epoch begins. The same one twice changes
        nothing more. Returns how many clients it names.

        Raises:
            InvalidRequest: it is no such export, or something in it is wrong.
        """
        mine = self._of(model)
        try:
            head, snapshot = await asyncio.to_thread(read_document, exported)
            theirs = adopted(head, snapshot)
        except ValueError as error:
            raise _cannot_import(error) from None
        num_clients = sum(not is_group(node) for node in snapshot["counters"])

        def laid_over_mine() -> Snapshot:
            return laid_over(mine.dispatcher.dump(), theirs, mine.upkeep.cluster)

        def plan() -> Change:
            try:
                mine.authority.try_out(laid_over_mine())
            except ValueError as error:
                raise _cannot_import(error) from None
            return self._desk.plan_import(head.cluster, num_clients, who)

        def exchange(answer: Any) -> None:
            mine.exchange(laid_over_mine())

        await self._change(plan, exchange)
        return num_clients

    async def _change(self, plan: Callable[[], Change], apply: Callable[[Any], None] = lambda answer: None) -> Any:
        """See :meth:`LiveChanges.make`; all models are told what happened."""
        self._tick_all()

        def put(change: Change) -> None:
            apply(change.answer)
            who, what, client = told(change.entry)
            for one in self._models.values():
                one.dispatcher.notes.changed(who, what, self._clock.now_s(), client)

        return await self._changes.make(plan, put)

    def _take_settings(self) -> None:
        """The settings in force may have changed."""
        args = self._desk.in_force
        for slot in args.slots:
            self._models[slot].take_settings(args.of_model(slot))
        self._across.is_on = args.across_models

    def _take_over(self, clients: Iterable[str]) -> None:
        """Another cluster has changed settings, or the controls of these clients."""
        for one in self._models.values():
            for client in clients:
                one.control(client, self._desk.control(client))
        self._take_settings()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _make(self, slot: str, store: Store | None = None, changes: LiveChanges | None = None) -> ModelCounters:
        """The counters of one model, as they were left. May block on their store."""
        args = self._desk.in_force.of_model(slot)
        config = args.counter
        return ModelCounters(
            args,
            self._life,
            self._clock,
            self._unix_s,
            controls=dict(self._desk.state.controls),
            usage=UsageBook(config.usage_days, config.usage_clients, keep_hour_days=config.usage_hour_days),
            saver=Saver(self._find_cluster, self._life, self._unix_s, self._clock.now_s),
            store=store if changes is not None else self._store_of(config),
            changes=changes,
            metrics=self._metrics(config.name),
            was_restarted=self._was_restarted,
        )

    def _find_cluster(self) -> str:
        self._cluster = self._cluster or cluster_id(self._id_memory)
        return self._cluster

    def _introduce(self) -> None:
        """Budgets hold for all models together."""
        books = [one.usage for one in self._models.values()]
        for book in books:
            book.meet(books)

    def _of(self, model: str) -> ModelCounters:
        """
        Raises:
            UnknownModel: there is none of this slot or name.
        """
        self._tick_all()
        found = self._models.get(model)
        if found is None:
            found = next((one for one in self._models.values() if one.authority.args.model_name == model), None)
        if found is None:
            names = [one.authority.args.model_name for one in self._models.values()]
            raise UnknownModel(model[:128], ", ".join(names))
        return found

    def _tick_all(self) -> None:
        """Time passes from the first call on, for every model by itself."""
        if self._ticking_all is None:
            self._ticking_all = asyncio.create_task(for_ever(self._tick))
        if len(self._ticking) < len(self._models):
            for slot in self._models.keys() - self._ticking.keys():
                self._ticking[slot] = asyncio.create_task(for_ever(self._models[slot].tick))

    def end(self) -> None:
        """Time stands still from now on: for whoever holds a service without an actor."""
        for task in (self._ticking_all, *self._ticking.values()):
            if task is not None:
                task.cancel()

    async def _tick(self) -> None:
        """What concerns all models."""
        await asyncio.sleep(TICK_S)
        await self._across.exchange()
        now_s = self._clock.now_s()
        for slot in self._models.keys() - set(self._desk.in_force.slots):
            if self._models[slot].dispatcher.is_idle:
                async with self._configuring:
                    await self._retire(slot)
        if not all(one.dispatcher.is_idle for one in self._models.values()):
            self._busy_s = now_s
        elif now_s - self._busy_s > self._config.idle_ttl_s and self._on_idle is not None:
            self._on_idle()

    async def _retire(self, slot: str) -> None:
        """The model is served no more; its counters stay in the store, if there is one."""
        if slot in self._desk.in_force.slots:
            return
        one = self._models.pop(slot)
        self._ticking.pop(slot).cancel()
        if one.upkeep.store is not None:
            await one.upkeep.keep(one.upkeep.store)
        self._introduce()


def _cannot_import(error: ValueError) -> InvalidRequest:
    return InvalidRequest(f"these counters cannot be imported: {error}")
