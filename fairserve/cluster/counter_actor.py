"""The counter actor: one Dispatcher behind a named, detached, restartable Ray actor.

:class:`CounterService` is a plain asyncio object, so that a test can hold one without Ray; :func:`start_counter_actor`
puts the shell round it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

from fairserve.assembly import make_dispatcher
from fairserve.clock import Clock, SystemClock
from fairserve.cluster.counter_client import for_ever
from fairserve.cluster.line_file import LineFile
from fairserve.config import ApiConfig, CounterConfig, FairServeArgs
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.demand import Demand, demand
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.dispatch.status import status
from fairserve.dispatch.store import SqliteStore

logger = logging.getLogger(__name__)

TICK_S = 0.1
MAX_CONCURRENCY = 10_000
"""Calls the actor may hold at once: two per router and one per replica. Ray's default of 1,000 deadlocks when it is
reached, because a report then waits behind the polls that wait for it."""
HEAD_NODE_RESOURCE = "node:__internal_head__"


def store_of(config: CounterConfig) -> SqliteStore | None:
    return SqliteStore(config.snapshot_path) if config.snapshot_path else None


class SettingsMemory(Protocol):
    """Outlives the actor's process, not the actor. Both methods may block."""

    def recall(self) -> str | None: ...
    def remember(self, args_json: str) -> None: ...


class CounterService:
    """Forwards to the Dispatcher; adds waiting (long polls), the clock and snapshots. Decides nothing.

    ``memory`` keeps the settings of the newest :meth:`configure` for a restart, which comes with the first settings.
    """

    def __init__(
        self,
        args_json: str,
        *,
        clock: Clock | None = None,
        epoch: int | None = None,
        on_idle: Callable[[], None] | None = None,
        memory: SettingsMemory | None = None,
    ) -> None:
        self._memory = memory
        self._args = FairServeArgs.model_validate_json((memory.recall() if memory else None) or args_json)
        self._clock = clock or SystemClock()
        self._config: CounterConfig = self._args.counter
        self._on_idle = on_idle
        self._log_file = LineFile(self._config.decision_log_path) if self._config.decision_log_path else None
        self._dispatcher = self._new_dispatcher(self._args, epoch or time.time_ns())
        self._store = store_of(self._config)
        self._restore()
        self._polls: dict[str, set[asyncio.Event]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._saved_s = self._busy_s = self._clock.now_s()

    # -- the protocol -------------------------------------------------------------------------------------------------

    async def route(self, call: RouterCall) -> RouterReply:
        """Submits, cancels, declined grants; see :meth:`Dispatcher.route`."""
        reply = self._dispatcher.route(call, self._now_s())
        self._wake_routers()
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        """Grants for this router, as soon as there are any, at the latest after ``poll_s``."""
        asked = self._dispatcher
        reply = asked.poll(call, self._now_s())
        if reply.grants or reply.resubmit:
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
        return reply

    # -- for people ---------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """A plain picture of clients, replicas, gap and bound."""
        return status(self._dispatcher, self._now_s())

    async def demand(self) -> Demand:
        """The work of the whole cluster, for autoscaling."""
        return demand(self._dispatcher, self._now_s())

    async def configure(self, args_json: str) -> int:
        """Take over the fairness and dispatch settings of a new deployment. Counters stay; a change of settings begins
        a new epoch, so that routers submit again and replicas report in full. Returns the epoch."""
        self._now_s()
        args = FairServeArgs.model_validate_json(args_json)
        if (args.fairness, args.dispatch) != (self._args.fairness, self._args.dispatch):
            snapshot = self._dispatcher.dump()
            self._dispatcher = self._new_dispatcher(args, max(time.time_ns(), self._dispatcher.epoch + 1))
            self._dispatcher.load(snapshot)
            self._wake(self._polls)
        if args.counter.snapshot_path != self._config.snapshot_path:
            self._store = store_of(args.counter)
        is_new = args != self._args
        self._args, self._config = args, args.counter
        if is_new and self._memory is not None:
            await asyncio.to_thread(self._memory.remember, args_json)
        return self._dispatcher.epoch

    async def ping(self) -> int:
        """The epoch."""
        self._now_s()
        return self._dispatcher.epoch

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new_dispatcher(self, args: FairServeArgs, epoch: int) -> Dispatcher:
        log = None
        if self._log_file is not None:
            log = DecisionLog(self._log_file.write)
            log.began(policy=args.fairness.policy, epoch=epoch, now_s=self._clock.now_s())
        return make_dispatcher(args.fairness, args.dispatch, epoch=epoch, log=log)

    def _restore(self) -> None:
        if self._store is None:
            return
        try:
            snapshot = self._store.load()
            if snapshot is not None:
                self._dispatcher.load(snapshot)
        except ValueError as error:
            logger.error("%s; set aside as %s, counters begin level", error, self._store.set_aside())

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
        self._wake_routers()
        if self._log_file is not None:
            await asyncio.to_thread(self._log_file.flush)
        if self._store is not None and now_s - self._saved_s >= self._config.snapshot_s:
            self._saved_s = now_s
            await self._save(self._store)
        if self._dispatcher.is_idle:
            if now_s - self._busy_s > self._config.idle_ttl_s and self._on_idle is not None:
                self._on_idle()
        else:
            self._busy_s = now_s

    async def _save(self, store: SqliteStore) -> None:
        try:
            await asyncio.to_thread(store.save, self._dispatcher.dump())
        except Exception:
            logger.exception("the counters could not be saved")


def end_this_actor() -> None:
    """End the actor this runs in, for good: no restart."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class ClusterMemory:
    """Settings in Ray's internal key-value store, under the actor's id, which a restart keeps."""

    def recall(self) -> str | None:
        from ray.experimental.internal_kv import _internal_kv_get

        value = _internal_kv_get(self._key())
        return None if value is None else value.decode()

    def remember(self, args_json: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key(), args_json)

    def _key(self) -> str:
        import ray

        return f"fairserve:settings:{ray.get_runtime_context().get_actor_id()}"


def start_counter_actor(args: FairServeArgs) -> Any:
    """The handle of the counter actor of these settings; creates it when it is not there. Blocks on Ray.

    Plain, named and detached, restarted for ever, its calls never retried by Ray (a retry would run twice); Serve's
    ``deployment_actors`` would restart it empty on every roll-out.
    """
    import ray

    config = args.counter
    pinned = config.pin_to_head and HEAD_NODE_RESOURCE in ray.cluster_resources()
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
            resources={HEAD_NODE_RESOURCE: 0.001} if pinned else None,
        )
        .remote(without_keys(args).model_dump_json(), on_idle=end_this_actor, memory=ClusterMemory())
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
