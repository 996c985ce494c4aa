"""How routers and replicas reach the counter actor: time-outs, one call in flight, degraded mode.

The transport is handed in, so that tests run without Ray. Nothing in here decides who goes next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fairserve.clock import Clock
from fairserve.cluster.metrics_sink import NO_METRICS, MetricsSink
from fairserve.cluster.replica_metrics import CallMeter, router_meter
from fairserve.cluster.tracing import QUEUE, Tracer, spanning
from fairserve.config import CounterConfig
from fairserve.dispatch.messages import Grant, ReportReply, RouterCall, RouterReply, StepReport, Submit
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import Refused
from fairserve.metric_table import UNGRANTED_REQUESTS

logger = logging.getLogger(__name__)

RETRY_S = 0.1
"""Pause between two tries while the counter actor does not answer."""

MAX_NEVER_ACCEPTED = 20_000
"""Requests remembered that went ahead unseen by the counter actor; most never come back."""

LATE = 1.1
"""A time-out that fires this many times too late tells of a stalled event loop, not of a silent actor."""

EARLY = 0.95
"""A timer may fire this much too early by another clock: event loops round. It must not take a second time-out to
notice that the counter actor is silent."""

Reply = TypeVar("Reply")


async def for_ever(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat ``step``. What it raises is a bug, which is logged and survived: nobody would notice a task that died of
    it, and all who depend on it would wait for ever."""
    while True:
        try:
            await step()
        except Exception:
            logger.exception("unexpected; going on")
            await asyncio.sleep(RETRY_S)


class CounterTransport(Protocol):
    """Calls that reach the counter actor; each may raise anything."""

    async def route(self, call: RouterCall) -> RouterReply: ...
    async def poll(self, call: RouterCall) -> RouterReply: ...
    async def report(self, report: StepReport) -> ReportReply: ...


class RayTransport:
    """Calls the named actor; finds it again (or has ``find`` start it) after a call that failed.

    ``find`` blocks on Ray, for as long as a partition lasts: it runs on a thread, one at a time. ``slot``: of the model
    that routers and replicas call about.
    """

    def __init__(self, find: Callable[[], Any], actor: Any = None, slot: str = "") -> None:
        self._find = find
        self._actor = actor
        self._slot = slot
        self._finding: asyncio.Task[Any] | None = None

    async def route(self, call: RouterCall) -> RouterReply:
        reply: RouterReply = await self._call("route", call, self._slot)
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        reply: RouterReply = await self._call("poll", call, self._slot)
        return reply

    async def report(self, report: StepReport) -> ReportReply:
        reply: ReportReply = await self._call("report", report, self._slot)
        return reply

    async def reports(self, reports: tuple[StepReport, ...]) -> tuple[ReportReply, ...]:
        """Those of several replicas in one call."""
        replies: tuple[ReportReply, ...] = await self._call("reports", reports, self._slot)
        return replies

    async def call(self, method: str, **arguments: Any) -> Any:
        """The answer of any method of the actor."""
        return await self._call(method, **arguments)

    async def _call(self, method: str, *message: object, **arguments: Any) -> Any:
        from ray.exceptions import ActorDiedError

        actor = self._actor or await self._found()
        try:
            return await getattr(actor, method).remote(*message, **arguments)
        except ActorDiedError:
            if self._actor is actor:
                self._actor = None
            raise

    async def _found(self) -> Any:
        if self._finding is None:
            self._finding = asyncio.create_task(asyncio.to_thread(self._find))
            self._finding.add_done_callback(self._on_found)
        return await asyncio.shield(self._finding)

    def _on_found(self, finding: asyncio.Task[Any]) -> None:
        self._finding = None
        if not finding.cancelled() and finding.exception() is None:
            self._actor = finding.result()


class CounterLink:
    """One side's connection: every call has a time-out, and what it says about the actor is remembered.

    The actor counts as unreachable once no call has succeeded for ``call_timeout_s`` and one has just failed.
    """

    def __init__(self, config: CounterConfig, clock: Clock, meter: CallMeter | None = None) -> None:
        self._timeout_s = config.call_timeout_s
        self._clock = clock
        self._meter = meter
        self._last_success_s = clock.now_s()
        self.is_down = False
        self.num_faults = 0

    async def call(self, attempt: Callable[[], Awaitable[Reply]], *, is_long_poll: bool = False) -> Reply | None:
        """The reply, or None when it did not come in time or the call failed."""
        began_s = self._clock.now_s()
        try:
            reply = await self._in_time(attempt)
        except Exception as error:
            self.num_faults += 1
            # A first call after a long silence has the whole time-out, like any other.
            silent_s = self._clock.now_s() - max(self._last_success_s, began_s)
            if not self.is_down and (silent_s >= EARLY * self._timeout_s or not isinstance(error, TimeoutError)):
                logger.warning("counter actor unreachable, going on without it: %r", error)
                self.is_down = True
            if self._meter is not None:
                self._meter.failed(error, is_down=self.is_down)
            return None
        if self.is_down:
            logger.warning("counter actor reachable again")
        self.is_down = False
        self._last_success_s = self._clock.now_s()
        if self._meter is not None:
            self._meter.answered(None if is_long_poll else self._last_success_s - began_s)
        return reply

    async def _in_time(self, attempt: Callable[[], Awaitable[Reply]]) -> Reply:
        """The reply of ``attempt``. When this event loop stalled meanwhile, the reply may stand in line behind the
        time-out that fired: it gets one more.

        Raises:
            TimeoutError: there was none in time.
        """
        task = asyncio.ensure_future(attempt())
        try:
            for _ in range(2):
                began_s = self._clock.now_s()
                await asyncio.wait({task}, timeout=self._timeout_s)
                if task.done():
                    return task.result()
                if self._clock.now_s() - began_s < LATE * self._timeout_s:
                    break
            raise TimeoutError
        finally:
            task.cancel()


class RouterClient:
    """Gets grants for the requests of one router; keeps one batched call and one long poll in flight."""

    def __init__(
        self,
        book: RouterBook,
        transport: CounterTransport,
        config: CounterConfig,
        clock: Clock,
        metrics: MetricsSink = NO_METRICS,
    ) -> None:
        self._book = book
        self._transport = transport
        self._clock = clock
        self._metrics = metrics
        self._link = CounterLink(config, clock, router_meter(metrics))
        self._never_accepted: dict[str, None] = {}
        self._waiters: dict[str, asyncio.Future[Grant | None]] = {}
        self._news = asyncio.Event()
        self._waiting = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_degraded(self) -> bool:
        return self._link.is_down

    async def acquire(self, submit: Submit) -> Grant | None:
        """Wait for a grant. None: the counter actor cannot be reached, choose a replica without it.

        Cancelling the wait withdraws the request.

        Raises:
            Refused: there is no room for the request.
        """
        self._start()
        request_id = submit.request_id
        future: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()
        self._book.want(
            submit,
            self._clock.now_s(),
            on_grant=lambda grant: self._on_grant(grant, future),
            on_refusal=lambda error: self._on_refusal(request_id, error, future),
        )
        self._waiters[request_id] = future
        self._news.set()
        if self._link.is_down:
            self._let_go(request_id)
        try:
            return await future
        except asyncio.CancelledError:
            self._waiters.pop(request_id, None)
            self._book.forget(request_id)
            self._news.set()
            raise

    def decline(self, grant: Grant, *, is_unreachable: bool = True) -> None:
        """The grant will not be used, and its charge returns. A replica that cannot be reached is granted nothing for a
        while."""
        self._book.decline(grant, is_unreachable=is_unreachable)
        self._news.set()

    def forget(self, request_id: str) -> None:
        """Whatever was planned for this request is void: another one takes its place."""
        self._book.forget(request_id)
        self._news.set()

    def was_accepted(self, request_id: str) -> bool:
        """Of a request that asks again: whether queue limits no longer apply to it. One that went ahead without a grant
        before the counter actor had seen it was accepted by nobody. To be asked once."""
        return request_id not in self._never_accepted or self._never_accepted.pop(request_id) is not None

    def replica_gone(self, replica: str) -> None:
        """The replica's process has ended: what it was charged and did not serve returns at once."""
        self._book.gone(replica)
        self._start()
        self._news.set()

    def replica_draining(self, replica: str) -> None:
        """The replica is being stopped: nothing more is granted to it, and it gives back what it has not begun."""
        self._book.draining(replica)
        self._start()
        self._news.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_grant(self, grant: Grant, future: asyncio.Future[Grant | None]) -> None:
        self._waiters.pop(grant.request_id, None)
        if future.done():
            self._book.decline(grant, is_unreachable=False)
            return
        future.set_result(grant)

    def _on_refusal(self, request_id: str, error: Refused, future: asyncio.Future[Grant | None]) -> None:
        self._waiters.pop(request_id, None)
        if not future.done():
            future.set_exception(error)

    def _let_go(self, request_id: str) -> None:
        """Go ahead without a grant."""
        future = self._waiters.pop(request_id, None)
        if future is not None and not future.done():
            if not self._book.forget(request_id):
                self._never_accepted[request_id] = None
                if len(self._never_accepted) > MAX_NEVER_ACCEPTED:
                    del self._never_accepted[next(iter(self._never_accepted))]
            self._metrics.add(UNGRANTED_REQUESTS)
            future.set_result(None)

    def _start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(for_ever(self._send)), loop.create_task(for_ever(self._poll))]

    async def _send(self) -> None:
        while not self._book.has_news:
            self._news.clear()
            await self._news.wait()
        call = self._book.compose(self._clock.now_s())
        reply = await self._link.call(lambda: self._transport.route(call))
        await self._took(reply, to_poll=False)

    async def _poll(self) -> None:
        if not len(self._book) and not self._link.is_down:
            self._waiting.clear()
        await self._waiting.wait()
        call = self._book.compose_poll()
        reply = await self._link.call(lambda: self._transport.poll(call), is_long_poll=True)
        await self._took(reply, to_poll=True)
        if reply is not None and reply.resubmit:
            await asyncio.sleep(RETRY_S)  # polls have nothing to give until all is submitted again

    async def _took(self, reply: RouterReply | None, *, to_poll: bool) -> None:
        if reply is not None:
            self._book.replied(reply, to_poll=to_poll)
            if self._book.has_news:
                self._news.set()
            if len(self._book):
                self._waiting.set()  # only now: what is granted at once costs no poll
            return
        self._waiting.set()
        if self._link.is_down:
            for request_id in list(self._waiters):
                self._let_go(request_id)
        await asyncio.sleep(RETRY_S)


async def traced_acquire(tracer: Tracer, trace: str, client: RouterClient, submit: Submit) -> Grant | None:
    """:meth:`RouterClient.acquire` inside a span, below the traceparent ``trace``, that tells what was decided."""
    with spanning(tracer, QUEUE, trace, client=submit.client, is_retry=submit.is_retry) as span:
        grant = await client.acquire(replace(submit, trace=span.traceparent))
        span.note(is_granted=grant is not None)
        if grant is not None:
            span.note(replica=grant.replica, waited_s=grant.waited_s, grant=grant.seq)
        return grant
