"""What the cluster floor's tests without Ray share: a transport that may be cut, and an engine loop on a string."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.replica import ReplicaCore
from fairserve.dispatch.messages import RouterCall, StepReport
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import StepEvents
from fairserve.engine.request import FinishReason, GenerateRequest, RequestOutput, Usage
from fairserve.errors import ReplicaFailed


class Wire:
    """Calls a CounterService directly; may be cut, or hang like a partition."""

    def __init__(self, service: CounterService) -> None:
        self.service = service
        self.is_cut = False
        self.hangs = False
        self.num_calls = 0
        self.reports: list[StepReport] = []

    async def route(self, call: RouterCall) -> Any:
        await self._pass()
        return await self.service.route(call)

    async def poll(self, call: RouterCall) -> Any:
        await self._pass()
        return await self.service.poll(call)

    async def report(self, report: StepReport) -> Any:
        await self._pass()
        self.reports.append(report)
        return await self.service.report(report)

    async def _pass(self) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_cut:
            raise ConnectionError("cut")


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until the condition holds; they are event-driven, so this is no guess at a time."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition is a plain object's state, there is no event to await
            await asyncio.sleep(0.001)


@dataclass
class ScriptedLoop:
    """Stands for the engine thread: the test says when a step happens and what it makes. One slot per request."""

    book: LocalBook[GenerateRequest]
    core: ReplicaCore | None = None
    is_running: bool = False
    is_stopped: bool = False
    ended: str | None = None
    requests: dict[str, GenerateRequest] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    calls: int = 0
    holds: set[str] = field(default_factory=set)
    """Requests that stay in the local queue."""

    def start(self) -> None:
        self.is_running = True

    def stop(self, timeout: float | None = None) -> bool:
        self.is_stopped = True
        self.is_running = False
        self.step(*[self.output(request_id, "error", error="stopped") for request_id in list(self.requests)])
        return True

    def is_alive(self) -> bool:
        return self.is_running

    def submit(self, request: GenerateRequest) -> None:
        self._refuse_when_stopped()
        self.requests[request.request_id] = request
        self.made[request.request_id] = 0
        self.book.received(request)
        self.book.push(request)
        if request.request_id in self.holds:
            return
        self.book.pop()
        self.book.started(request.request_id, request.num_input, 0)

    def abort(self, request_id: str, only_if: Callable[[], bool] = lambda: True) -> None:
        self._refuse_when_stopped()
        if only_if():
            self.aborted.append(request_id)

    def call(self, fn: Callable[[], None]) -> None:
        self._refuse_when_stopped()
        self.calls += 1
        fn()

    def step(self, *outputs: RequestOutput) -> None:
        """One step of the engine: these outputs and what the book has gathered."""
        assert self.core is not None
        num = len(self.requests)
        self.core.on_step(StepEvents(outputs, num, 0, 1000 - 100 * num, 4 - num))

    def output(
        self, request_id: str, finish_reason: FinishReason | None = None, tokens: int = 0, error: str | None = None
    ) -> RequestOutput:
        """So many new tokens of one request, charged; text "t" for each."""
        num_input = self.requests[request_id].num_input
        if tokens:
            self.book.output(request_id, tokens)
        self.made[request_id] += tokens
        usage = Usage(num_input, 0, self.made[request_id])
        if finish_reason is not None:
            self.book.remove(request_id)
            self.book.finished(request_id)
            del self.requests[request_id]
        return RequestOutput(request_id, "t" * tokens, (7,) * tokens, usage, finish_reason=finish_reason, error=error)

    def _refuse_when_stopped(self) -> None:
        if self.is_stopped:
            raise ReplicaFailed("its engine was stopped")
