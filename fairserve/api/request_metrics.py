"""What callers get, measured at the door: waits, first tokens, ends. About eight numbers per request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from starlette.requests import ClientDisconnect

from fairserve import metric_table as table
from fairserve.api.merging import Batch
from fairserve.api.streaming import Batches, Deadline
from fairserve.clock import Clock
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.cluster.tracing import NO_SPAN, Span
from fairserve.dispatch.top_clients import TopClients
from fairserve.errors import Refused, RequestTimeout, unwrapped
from fairserve.metric_table import OTHER

RELABEL_S = 1.0


class RequestMetrics:
    """Of one ingress process; which clients have a label of their own is decided by what they asked for here."""

    def __init__(self, sink: MetricsSink, top_clients: int, clock: Clock) -> None:
        self.sink = sink
        self.clock = clock
        self._top = TopClients(top_clients, OTHER)
        self._activity: dict[str, float] = {}
        self._relabelled_s = clock.now_s() - RELABEL_S

    def label(self, client: str, amount: float) -> str:
        """``amount``: what the client's request came to, in tokens."""
        self._activity[client] = self._activity.get(client, 0.0) + amount
        now_s = self.clock.now_s()
        if self._top.has_room or now_s - self._relabelled_s >= RELABEL_S:
            self._relabelled_s = now_s
            self._top.update(self._activity, now_s)
            self._activity = {}
        return self._top.label(client)


class RequestMeter:
    """One HTTP request, from when it was read; ``span`` ends with it. What is found wrong with it before
    :meth:`watching` is not counted: mistakes of callers have nobody's service in them."""

    def __init__(self, metrics: RequestMetrics, client: str, span: Span = NO_SPAN) -> None:
        self.span = span
        self._metrics = metrics
        self._client = client
        self._began_s = metrics.clock.now_s()
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._num_first: dict[int, int] = {}
        self._num_output: dict[int, int] = {}
        self._num_input = 0
        self._waits_s: list[float] = []

    @asynccontextmanager
    async def watching(self, deadline: Deadline) -> AsyncIterator[None]:
        """``deadline``, and account of how the request ended."""
        try:
            async with deadline:
                yield
        except BaseException as error:
            self._ended(_outcome(error), error)
            raise
        self._ended("ok")

    async def outputs(self, batches: Batches) -> AsyncGenerator[Batch, None]:
        """``batches``, looked at as they pass."""
        async with aclosing(batches):
            async for batch in batches:
                self._saw(batch)
                yield batch

    def _saw(self, batch: Batch) -> None:
        now_s = self._metrics.clock.now_s()
        for index, output in batch.items():
            num_output = output.usage.num_output
            if index not in self._first_s:
                self._first_s[index] = now_s
                self._num_first[index] = num_output
                self._num_input += output.usage.num_input
            if output.waited_s is not None:
                self._waits_s.append(output.waited_s)
            if num_output != self._num_output.get(index):
                self._num_output[index], self._last_s[index] = num_output, now_s

    def _ended(self, outcome: str, error: BaseException | None = None) -> None:
        metrics = self._metrics
        sink, now_s = metrics.sink, metrics.clock.now_s()
        client = metrics.label(self._client, 1.0 + self._num_input + sum(self._num_output.values()))
        sink.add(table.REQUESTS, client=client, outcome=outcome)
        if isinstance(error, Exception) and isinstance(refused := unwrapped(error), Refused):
            sink.add(table.REFUSALS, client=client, reason=refused.reason)
        for wait_s in self._waits_s:
            sink.observe(table.QUEUE_WAIT, wait_s, client=client)
        if self._first_s:
            sink.observe(table.TIME_TO_FIRST_TOKEN, min(self._first_s.values()) - self._began_s, client=client)
        for index, num_output in self._num_output.items():
            num_later = num_output - self._num_first[index]
            if num_later > 0:
                token_s = (self._last_s[index] - self._first_s[index]) / num_later
                sink.observe(table.TIME_PER_OUTPUT_TOKEN, token_s, client=client)
        self.span.note(outcome=outcome, num_input=self._num_input, num_output=sum(self._num_output.values()))
        self.span.end(error)
        if outcome == "ok":
            sink.observe(table.REQUEST_TIME, now_s - self._began_s, client=client)


def _outcome(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError | ClientDisconnect | GeneratorExit):
        return "left"
    cause = unwrapped(error) if isinstance(error, Exception) else error
    if isinstance(cause, Refused):
        return "refused"
    return "timeout" if isinstance(cause, RequestTimeout) else "failed"
