"""How routers and replicas reach the counter actor: time-outs, one call in flight, degraded mode.

The transport is handed in, so that tests run without Ray. Nothing in here decides who goes next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fairserve.clock import Clock
from fairserve.config import CounterConfig
from fairserve.dispatch.messages import Grant, ReportReply, RouterCall, RouterReply, StepReport, Submit
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import Refused

logger = logging.getLogger(__name__)

RETRY_S = 0.1
"""Pause between two tries while the counter actor does not answer."""

Reply = TypeVar("Reply")


class CounterTransport(Protocol):
    """Calls that reach the counter actor; each may raise anything."""

    async def route(self, call: RouterCall) -> RouterReply: ...
    async def poll(self, call: RouterCall) -> RouterReply: ...
    async def report(self, report: StepReport) -> ReportReply: ...


class RayTransport:
    """Calls the named actor; finds it again (or has ``find`` start it) after a call that failed.

    ``find`` blocks on Ray, so it runs on a thread.
    """

    def __init__(self, find: Callable[[], Any], actor: Any = None) -> None:
        self._find = find
        self._actor = actor

    async def route(self, call: RouterCall) -> RouterReply:
        reply: RouterReply = await self._call("route", call)
        return reply

    async def poll(self, call: RouterCall) -> RouterReply:
        reply: RouterReply = await self._call("poll", call)
        return reply

    async def report(self, report: StepReport) -> ReportReply:
        reply: ReportReply = await self._call("report", report)
        return reply

    async def _call(self, method: str, message: object) -> Any:
        from ray.exceptions import ActorDiedError

        if self._actor is None:
            self._actor = await asyncio.to_thread(self._find)
        try:
            return await getattr(self._actor, method).remote(message)
        except ActorDiedError:
            self._actor = None
            raise


class CounterLink:
    """One side's connection: every call has a time-out, and what it says about the actor is remembered.

    The actor counts as unreachable once no call has succeeded for ``call_timeout_s`` and one has just failed.
    """

    def __init__(self, config: CounterConfig, clock: Clock) -> None:
        self._timeout_s = config.call_timeout_s
        self._clock = clock
        self._last_success_s = clock.now_s()
        self.is_down = False
        self.num_faults = 0

    async def call(self, attempt: Callable[[], Awaitable[Reply]]) -> Reply | None:
        """The reply, or None when it did not come in time or the call failed."""
        began_s = self._clock.now_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await attempt()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.num_faults += 1
            # A first call after a long silence has the whole time-out, like any other.
            silent_s = self._clock.now_s() - max(self._last_success_s, began_s)
            if not self.is_down and (silent_s >= self._timeout_s or not isinstance(error, TimeoutError)):
                logger.warning("counter actor unreachable, going on without it: %r", error)
                self.is_down = True
            return None
        if self.is_down:
            logger.warning("counter actor reachable again")
        self.is_down = False
        self._last_success_s = self._clock.now_s()
        return reply


class RouterClient:
    """Gets grants for the requests of one router; keeps one batched call and one long poll in flight."""

    def __init__(self, book: RouterBook, transport: CounterTransport, config: CounterConfig, clock: Clock) -> None:
        self._book = book
        self._transport = transport
        self._clock = clock
        self._link = CounterLink(config, clock)
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
        self._waiters[request_id] = future
        self._book.want(
            submit,
            self._clock.now_s(),
            on_grant=lambda grant: self._on_grant(grant, future),
            on_refusal=lambda error: self._on_refusal(request_id, error, future),
        )
        self._waiting.set()
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

    def decline(self, grant: Grant) -> None:
        """The granted replica cannot be reached: the charge returns, and the replica is granted nothing for a while."""
        self._book.decline(grant, is_unreachable=True)
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
            self._book.forget(request_id)
            future.set_result(None)

    def _start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._send()), loop.create_task(self._poll())]

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._book.has_news:
                call = self._book.compose(self._clock.now_s())
                reply = await self._link.call(lambda call=call: self._transport.route(call))  # type: ignore[misc]
                await self._took(reply, to_poll=False)

    async def _poll(self) -> None:
        while True:
            if not len(self._book) and not self._link.is_down:
                self._waiting.clear()
                await self._waiting.wait()
            call = self._book.compose_poll()
            reply = await self._link.call(lambda call=call: self._transport.poll(call))  # type: ignore[misc]
            await self._took(reply, to_poll=True)
            if reply is not None and reply.resubmit:
                await asyncio.sleep(RETRY_S)  # polls have nothing to give until all is submitted again

    async def _took(self, reply: RouterReply | None, *, to_poll: bool) -> None:
        if reply is not None:
            self._book.replied(reply, to_poll=to_poll)
            if self._book.has_news:
                self._news.set()
            return
        if self._link.is_down:
            for request_id in list(self._waiters):
                self._let_go(request_id)
        await asyncio.sleep(RETRY_S)
