"""One call for the reports of all replicas of a node, in place of one for each.

A call costs the counter actor more than what it does with the report that comes in it (``benchmarks.control``). So
replicas that share a node report to a small actor there, :class:`NodeReports`, which keeps one call to the counter
actor in flight, and begins one every ``BETWEEN_S`` at the most, with every report that came meanwhile. Each replica
gets the reply to its own report, with its own ack and counters. Reports are cumulative and numbered: one that goes both
ways, or twice, counts once.

Nothing depends on it. While it is not there yet, is gone, or does not answer in time, a replica reports straight to the
counter actor; so does one that is alone on its node.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fairserve.clock import Clock, SystemClock
from fairserve.cluster.counter_actor import MAX_CONCURRENCY, end_this_actor, find_counter_actor
from fairserve.cluster.counter_client import CounterTransport, RayTransport
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport
from fairserve.errors import CounterUnreachable

logger = logging.getLogger(__name__)

SHARE = 0.5
"""Part of ``counter.call_timeout_s`` that a report may take by way of the node; the rest is for the straight one."""
BETWEEN_S = 0.02
"""Between the beginnings of two calls of one node. A round trip takes a tenth of that where nothing is in its way: too
short for reports to come together by themselves. Whoever reports after a pause does not wait."""
BACK_OFF_S = 5.0
"""How long a replica reports straight after the other way has failed."""
ALONE_S = 30.0
"""The same for one that found itself alone on its node."""
GATHERING_S = 5.0
"""Seconds after a node's first report in which nobody is called alone: replicas start one after another."""
REMEMBERED_S = 90.0
"""How long a replica that has reported here counts as one of the node. Above twice ``ALONE_S``: two that look by turns
whether they are alone must find each other."""
IDLE_S = 120.0
"""Seconds without any report after which the node's actor ends itself."""
SendAll = Callable[[tuple[StepReport, ...]], Awaitable[tuple[ReportReply, ...]]]


class NodeReports:
    """The node's side: a plain asyncio object, which :func:`start_node_reports` puts into an actor.

    ``slot``: of the model whose replicas report. ``send`` reaches the counter actor and may raise anything; without it,
    over Ray. ``on_idle`` is called when nobody reports here any more.
    """

    def __init__(
        self,
        config_json: str,
        slot: str = "",
        *,
        send: SendAll | None = None,
        clock: Clock | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        config = CounterConfig.model_validate_json(config_json)
        self._send = send or RayTransport(lambda: find_counter_actor(config), slot=slot).reports
        self._timeout_s = SHARE * config.call_timeout_s
        self._clock = clock or SystemClock()
        self._on_idle = on_idle
        self._waiting: list[tuple[StepReport, asyncio.Future[ReportReply]]] = []
        self._sending: asyncio.Task[None] | None = None
        self._heard_s: dict[str, float] = {}
        self._began_s: float | None = None
        self._watching: asyncio.Task[None] | None = None

    async def report(self, report: StepReport) -> tuple[ReportReply, bool]:
        """The reply to this report, and whether its replica is alone: no other one has reported here of late.

        Raises:
            CounterUnreachable: the counter actor did not answer in time, or failed.
        """
        now_s = self._clock.now_s()
        self._heard_s[report.replica] = now_s
        if self._began_s is None:
            self._began_s = now_s
        if self._watching is None:
            self._watching = asyncio.create_task(self._end_when_idle())
        future: asyncio.Future[ReportReply] = asyncio.get_running_loop().create_future()
        self._waiting.append((report, future))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_waiting())
        reply = await future
        return reply, self._is_alone(now_s - self._began_s)

    def _is_alone(self, age_s: float) -> bool:
        since_s = self._clock.now_s() - REMEMBERED_S
        self._heard_s = {replica: at_s for replica, at_s in self._heard_s.items() if at_s >= since_s}
        return len(self._heard_s) <= 1 and age_s >= GATHERING_S

    async def _send_waiting(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            began_s = self._clock.now_s()
            try:
                async with asyncio.timeout(self._timeout_s):
                    replies = await self._send(tuple([report for report, _ in waiting]))
                assert len(replies) == len(waiting), "a reply to each report"
            except Exception as error:
                for _, future in waiting:
                    if not future.done():
                        future.set_exception(CounterUnreachable(detail=repr(error)))
            else:
                for (_, future), reply in zip(waiting, replies, strict=True):
                    if not future.done():
                        future.set_result(reply)
            await asyncio.sleep(max(0.0, began_s + BETWEEN_S - self._clock.now_s()))

    async def _end_when_idle(self) -> None:
        silent_s = 0.0
        while silent_s < IDLE_S:
            await asyncio.sleep(IDLE_S - silent_s)
            silent_s = self._clock.now_s() - max(self._heard_s.values(), default=0.0)
        if self._on_idle is not None:
            self._on_idle()


class NodeTransport:
    """The replica's side: reports by way of its node, and straight when that fails; all other calls straight.

    ``find`` finds the node's actor, or starts it; it blocks on Ray, and runs on a thread.
    """

    def __init__(self, straight: CounterTransport, find: Callable[[], Any], timeout_s: float, clock: Clock) -> None:
        self._straight = straight
        self._find = find
        self._timeout_s = timeout_s
        self._clock = clock
        self._node: Any = None
        self._finding: asyncio.Task[None] | None = None
        self._straight_until_s = -math.inf

    async def route(self, call: RouterCall) -> RouterReply:
        return await self._straight.route(call)

    async def poll(self, call: RouterCall) -> RouterReply:
        return await self._straight.poll(call)

    async def report(self, report: StepReport) -> ReportReply:
        if self._clock.now_s() >= self._straight_until_s:
            if self._node is not None:
                reply = await self._by_node(report)
                if reply is not None:
                    return reply
            elif self._finding is None:
                self._finding = asyncio.create_task(self._look())
        return await self._straight.report(report)

    async def _by_node(self, report: StepReport) -> ReportReply | None:
        """None when it did not work."""
        reply: ReportReply
        try:
            async with asyncio.timeout(self._timeout_s):
                reply, is_alone = await self._node.report.remote(report)
        except Exception as error:
            logger.info("reports go straight to the counter actor for %.0f s: %r", BACK_OFF_S, error)
            self._node = None
            self._straight_until_s = self._clock.now_s() + BACK_OFF_S
            return None
        if is_alone:
            self._straight_until_s = self._clock.now_s() + ALONE_S
        return reply

    async def _look(self) -> None:
        try:
            self._node = await asyncio.to_thread(self._find)
        except Exception as error:
            logger.warning("this node has no actor for reports; the next try is in %.0f s: %r", BACK_OFF_S, error)
            self._straight_until_s = self._clock.now_s() + BACK_OFF_S
        finally:
            self._finding = None


def start_node_reports(config: CounterConfig, group: str | None = None, slot: str = "") -> Any:
    """The handle of this node's actor for a model, or of one for a ``group`` of its replicas; starts it when it is
    not there. Blocks on Ray.

    Detached and never restarted: the next report of a replica starts another one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(NodeReports)
        .options(
            name=f"{config.of_slot(slot).name}-reports-{group or node_id}",
            namespace=config.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENCY,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(config.model_dump_json(), slot, on_idle=end_this_actor)
    )


def way_of_reports(
    args: FairServeArgs, straight: CounterTransport, clock: Clock, group: str | None = None, slot: str = ""
) -> CounterTransport:
    """How a replica reaches the counter actor by these settings; ``group``: see :func:`start_node_reports`."""
    if args.counter.reports_per_node == "each":
        return straight
    timeout_s = SHARE * args.counter.call_timeout_s
    return NodeTransport(straight, lambda: start_node_reports(args.counter, group, slot), timeout_s, clock)
