"""The model replica: an engine thread, its local book, and the reporter that tells the counter actor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from fairserve.assembly import book_settings, make_local_book
from fairserve.clock import Clock, SystemClock
from fairserve.cluster.counter_actor import start_counter_actor, without_keys
from fairserve.cluster.counter_client import RETRY_S, CounterLink, CounterTransport, RayTransport, for_ever
from fairserve.cluster.metrics_sink import NO_METRICS, MetricsSink, deployment_metrics
from fairserve.cluster.multiplex import Message, Outlet, Own, Trunks
from fairserve.cluster.node_reports import way_of_reports
from fairserve.cluster.outputs import OutputStream
from fairserve.cluster.replica_metrics import ReplicaMetrics, replica_meter
from fairserve.cluster.tracing import NO_TRACING, PhaseSpans, Tracer, make_tracing
from fairserve.config import FairnessConfig, FairServeArgs
from fairserve.dispatch.replica_book import BookEvents, LocalBook, Reporter
from fairserve.engine.events import Limits, StepEvents
from fairserve.engine.grammar import COMPILING
from fairserve.engine.request import GenerateRequest, RequestOutput, Usage, failure
from fairserve.errors import ReplicaDied, ReplicaFailed

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""Python's thread switch interval: at the default 5 ms the event loop wakes late beside an engine thread."""

STOP_S = 10.0
"""How long the engine thread may take for its last step."""
KEEP_S, MAX_KEEP_S = 1.0, 30.0
"""How long a request without a grant is kept waiting, at first and at the most, once the counter actor answers."""
NO_USAGE = Usage(0, 0, 0)
ENDED = "the engine thread has ended"
MOST_USERS = 10_000
"""Clients whose usage is told apart; beyond, the one that ended a request the longest ago counts as nobody ("")."""


class ReplicaCore:
    """One engine on its thread, seen from an event loop; knows nothing of Ray.

    ``engine_loop`` is an :class:`~fairserve.engine.loop.EngineLoop` whose ``on_step`` is :meth:`on_step`.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        book: LocalBook[GenerateRequest],
        transport: CounterTransport,
        args: FairServeArgs,
        clock: Clock,
        metrics: MetricsSink = NO_METRICS,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self.limits = limits
        self._name = name
        self._tracer = tracer
        self._book = book
        self._transport = transport
        self._config = args.counter
        self._fairness = args.fairness
        """By which the local queue goes."""
        self._clock = clock
        self._metrics = ReplicaMetrics(metrics, limits, args.metrics.interval_s, clock.now_s())
        self._link = CounterLink(args.counter, clock, replica_meter(metrics))
        self._reporter = Reporter(name, time.time_ns())
        self._streams: dict[str, OutputStream | Outlet] = {}
        self._trunks = Trunks(name)
        self._clients: dict[str, str] = {}
        """request id -> client of what the engine has, also of aborted requests until their last output."""
        self._usage: dict[str, Usage] = {}
        self._return_at_s: dict[str, float] = {}
        """Requests that came without a grant and have not started: when to give each back."""
        self._returning: set[str] = set()
        self._is_draining = False
        """Serve stops this replica, or its engine has ended: it begins nothing more."""
        self._is_leaving = False
        self._newest = StepEvents(free_kv_tokens=limits.kv_capacity_tokens, free_slots=limits.max_num_seqs)
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine_loop: Any = None
        self._reporting: asyncio.Task[None] | None = None

    def start(self, engine_loop: Any) -> None:
        self._engine_loop = engine_loop
        engine_loop.start()
        self._reporting = self._loop.create_task(for_ever(self._report_news))

    async def stop(self) -> None:
        """End the engine and say goodbye with a last report, which has room for nothing."""
        self._is_leaving = True
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
        await asyncio.to_thread(self._engine_loop.stop, STOP_S)
        await asyncio.sleep(0)  # the last step's events were handed to this loop
        await self._report()

    async def generate(
        self,
        request: GenerateRequest,
        waited_s: float | None = None,
        num_returns: int = 0,
        ingress: str | None = None,
    ) -> AsyncIterator[RequestOutput | Own]:
        """Run one request; outputs of several steps are merged when the reader is slow. Closing it aborts. With
        ``ingress`` its outputs are numbered, and most of them go over that ingress's trunk when there is one.

        Without ``waited_s`` it comes without a grant, from a router that cannot reach the counter actor. If it has not
        started by the time the actor answers here again, its only output says ``returned``, for the cluster's queue to
        have it: the time that it is kept doubles with ``num_returns``. A draining replica gives back at once what it
        has not begun. An output without tokens and without a finish reason says that the request has started.

        Raises:
            ReplicaFailed: the engine failed this request, or has a request of this id already.
            ReplicaDied: the engine is broken, or has ended.
            ModelFailed: the model failed on this very request.
            InvalidRequest: the engine does not take it.
        """
        request_id = request.request_id
        grammar = request.sampling.grammar
        if grammar is not None and not (grammars := self._engine_loop.grammars).is_prepared(grammar):
            await self._loop.run_in_executor(COMPILING, grammars.prepare, grammar)
        if self._is_draining and self.is_healthy:
            yield RequestOutput(request_id, "", (), Usage(0, 0, 0), finish_reason="returned")
            return
        if request_id in self._clients:  # a second try of Serve's, whose first one got here after all
            raise ReplicaFailed(f"it has request {request_id!r} already")
        self._engine_loop.submit(request)
        self._clients[request_id] = request.client
        spans = PhaseSpans(self._tracer, request, self._name) if request.trace else None
        saw = None if spans is None else spans.saw
        if ingress is None:
            stream: OutputStream | Outlet = OutputStream(waited_s, saw)
        else:
            stream = self._trunks.open(ingress, request_id, waited_s, saw)
        self._streams[request_id] = stream
        if waited_s is None:
            keep_s = min(KEEP_S * 2**num_returns, MAX_KEEP_S)
            self._return_at_s[request_id] = self._clock.now_s() + keep_s
        finished, reason = False, "left"
        try:
            async for item in stream:
                output = item.output if isinstance(item, Own) else item
                if output is not None and output.finish_reason is not None:
                    finished, reason = True, output.finish_reason
                if output is not None and output.finish_reason == "error":
                    error = failure(output)
                    is_gone = self._is_leaving or not self.is_healthy
                    if is_gone and isinstance(error, ReplicaFailed):
                        error = ReplicaDied(output.error or "the engine failed")
                    raise error
                yield item
        finally:
            del self._streams[request_id]
            if ingress is not None:
                self._trunks.close(ingress, request_id)
            self._return_at_s.pop(request_id, None)
            if spans is not None:
                spans.end(reason)
            if not finished:
                with contextlib.suppress(ReplicaFailed):  # stopped meanwhile: it aborts all by itself
                    self._engine_loop.abort(request_id)

    def trunk(self, ingress: str) -> AsyncGenerator[Message, None]:
        """See :meth:`Trunks.attach`."""
        return self._trunks.attach(ingress)

    def usage(self) -> dict[str, Usage]:
        """Tokens by client of every request that has ended here, also of those whose reader left: what callers were
        told, or would have been. In the long run the counter actor's totals are the sum of these, to the token. Those
        of the longest idle of very many clients are under ""."""
        return dict(self._usage)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_trunks(self) -> int:
        """Trunks that ingresses have opened here."""
        return self._trunks.num_trunks

    @property
    def load(self) -> tuple[int, int]:
        """Requests running and waiting here after the newest step."""
        return self._newest.num_running, self._newest.num_waiting

    @property
    def is_healthy(self) -> bool:
        return bool(self._engine_loop.is_alive())

    @property
    def why_ended(self) -> str:
        """Of a replica that is not healthy."""
        return f"{ENDED}: {self._engine_loop.ended}"

    # -- engine thread ------------------------------------------------------------------------------------------------

    def on_step(self, events: StepEvents) -> None:
        """One crossing to the event loop per step."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._take, events, self._book.take_events())

    # -- event loop ---------------------------------------------------------------------------------------------------

    def _take(self, events: StepEvents, book: BookEvents) -> None:
        self._newest = events
        self._metrics.took(events)
        self._reporter.add(book)
        has_output = {output.request_id for output in events.outputs}
        for request_id in book.started:
            self._return_at_s.pop(request_id, None)
            if request_id in self._streams and request_id not in has_output:  # a long prompt takes several steps
                self._streams[request_id].put(RequestOutput(request_id, "", (), Usage(0, 0, 0)))
        for output in events.outputs:
            if output.finish_reason is not None:
                self._count(output)
                if output.request_id in self._returning:
                    self._returning.discard(output.request_id)
                    if output.finish_reason == "abort":
                        output = replace(output, finish_reason="returned")
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
        if self._reporter.has_news:
            self._news.set()

    def _give_back(self) -> None:
        """Ungranted requests that have waited here long enough: the cluster's queue is fairer than ours, and as long as
        they stand here the replica looks full to it."""
        now_s = self._clock.now_s()
        self._return([request_id for request_id, at_s in self._return_at_s.items() if at_s <= now_s])

    def _drain(self) -> None:
        """Finish what runs; what only waits here is sooner served elsewhere."""
        logger.info("replica %s drains: %d requests are here", self._name, len(self._streams))
        self._is_draining = True
        self._trunks.drain()
        self._news.set()
        with contextlib.suppress(ReplicaFailed):  # stopped meanwhile
            self._return(list(self._streams))

    def _return(self, request_ids: list[str]) -> None:
        """Give these back, those that have not begun by the time that the engine looks."""
        for request_id in request_ids:
            self._return_at_s.pop(request_id, None)
            self._returning.add(request_id)
            self._engine_loop.abort(request_id, only_if=partial(self._book.is_unserved, request_id))

    def _count(self, output: RequestOutput) -> None:
        client = self._clients.pop(output.request_id, None)
        if client is not None:
            self._usage[client] = _plus(self._usage.pop(client, NO_USAGE), output.usage)
            if len(self._usage) > MOST_USERS:
                nobodys = self._usage.pop("", NO_USAGE)
                self._usage[""] = _plus(nobodys, self._usage.pop(next(iter(self._usage))))

    async def _report_news(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.heartbeat_s):
                await self._news.wait()
        self._news.clear()
        self._metrics.export(self._newest, self._clock.now_s())
        if not self.is_healthy:
            self._fail_all()
            await self._say_goodbye()
        elif await self._report():
            self._give_back()
        else:
            await asyncio.sleep(RETRY_S)

    async def _say_goodbye(self) -> None:
        """Tell the last tokens, and room for nothing; then no more reports: what is silent is granted nothing."""
        if not self._is_leaving or self._reporter.has_news:
            self._is_leaving = True
            await self._report()

    def _fail_all(self) -> None:
        for request_id, stream in self._streams.items():
            error = self.why_ended
            stream.put(RequestOutput(request_id, "", (), Usage(0, 0, 0), finish_reason="error", error=error))

    async def _report(self) -> bool:
        """One report, and its reply into the local book; False when none came."""
        newest = self._newest
        report = self._reporter.compose(
            free_kv_tokens=0 if self._is_leaving else newest.free_kv_tokens,
            free_slots=0 if self._is_leaving else newest.free_slots,
            kv_capacity_tokens=self.limits.kv_capacity_tokens,
            max_slots=self.limits.max_num_seqs,
            num_running=newest.num_running,
            num_waiting=newest.num_waiting,
            is_draining=self._is_draining or self._is_leaving,
        )
        self._metrics.reported()
        reply = await self._link.call(lambda: self._transport.report(report))
        if reply is None:
            return False
        self._metrics.merged()
        reported = self._reporter.replied(reply)
        if reported is not None and reply.fairness:
            self._take_settings(FairnessConfig.model_validate_json(reply.fairness))
        if reported is not None and reply.counters:
            with contextlib.suppress(ReplicaFailed):  # stopped meanwhile
                self._engine_loop.call(lambda: self._book.apply_counters(reply.counters, reported))
        if idle := self._reporter.idle():
            with contextlib.suppress(ReplicaFailed):
                self._engine_loop.call(lambda: self._book.close(idle))
        if self._reporter.has_news:
            self._news.set()
        if reply.is_draining and not self._is_draining:
            self._drain()
        return True

    def _take_settings(self, fairness: FairnessConfig) -> None:
        """What is in force, live changes included: the local queue goes by the same policy as the cluster's."""
        if fairness == self._fairness:
            return
        with contextlib.suppress(ReplicaFailed):  # stopped meanwhile
            self._engine_loop.call(lambda: self._book.take_settings(**book_settings(fairness)))
        self._fairness = fairness


def _plus(one: Usage, other: Usage) -> Usage:
    return Usage(one.num_input + other.num_input, one.num_cached + other.num_cached, one.num_output + other.num_output)


class ModelReplica:
    """The Serve deployment class: builds a :class:`ReplicaCore` round the configured model."""

    async def __init__(self, args_json: str, slot: str = "") -> None:  # type: ignore[misc]
        """``args_json``: of the whole service; ``slot``: which of its models this is."""
        from ray import serve

        from fairserve.engine.engine import build_engine
        from fairserve.engine.loop import EngineLoop
        from fairserve.engine.sizing import num_threads, uses_gpu

        sys.setswitchinterval(SWITCH_INTERVAL_S)
        whole = FairServeArgs.model_validate_json(args_json)
        args = whole.of_model(slot)
        actor = await asyncio.to_thread(_begin, whole)
        clock = SystemClock()
        book: LocalBook[GenerateRequest] = make_local_book(args.fairness)
        if args.engine.tensor_parallel_size > 1:
            from fairserve.cluster.shards import start_shards
            from fairserve.engine.shards import Rank, join

            address, self._shards = await asyncio.to_thread(start_shards, whole, slot)
            await asyncio.to_thread(join, Rank(0, args.engine.tensor_parallel_size, address))
        engine = await asyncio.to_thread(
            build_engine,
            args.model,
            args.engine,
            reserve_output_tokens=args.dispatch.reserve_output_tokens,
            preempt_gap=args.dispatch.preempt_gap,
            queue=book,
            account=book,
            num_threads=num_threads(args, whole),
            clock=clock,
        )
        name = serve.get_replica_context().replica_id.unique_id
        transport = way_of_reports(
            whole, RayTransport(lambda: start_counter_actor(whole), actor, slot), clock, slot=slot
        )
        metrics = deployment_metrics(args.metrics, args.counter.name)
        tracer = make_tracing(args.tracing)
        self._core = ReplicaCore(name, engine.limits, book, transport, args, clock, metrics, tracer)
        loop = EngineLoop(
            engine,
            self._core.on_step,
            clock=clock,
            step_timeout_s=args.engine.step_timeout_s,
            nice=0 if uses_gpu(args.engine) else args.engine.cpu_nice,
        )
        self._core.start(loop)

    async def generate(
        self,
        request: GenerateRequest,
        waited_s: float | None = None,
        num_returns: int = 0,
        first_sent_s: float | None = None,
        replaces: str | None = None,
        ingress: str | None = None,
    ) -> AsyncIterator[RequestOutput | Own]:
        """See :meth:`ReplicaCore.generate`; ``first_sent_s`` and ``replaces``, the id under which an earlier replica
        had the request, are for the router."""
        async for output in self._core.generate(request, waited_s, num_returns, ingress):
            yield output

    async def trunk(self, ingress: str, replica: str) -> AsyncIterator[Message]:
        """See :meth:`Trunks.attach`; ``replica``, which is this one, is for the router."""
        async with contextlib.aclosing(self._core.trunk(ingress)) as messages:
            async for message in messages:
                yield message

    async def limits(self) -> Limits:
        """What this replica's engine can hold."""
        return self._core.limits

    async def usage(self) -> dict[str, Usage]:
        """See :meth:`ReplicaCore.usage`; ``handle.broadcast("usage")`` asks all replicas."""
        return self._core.usage()

    async def load(self) -> tuple[int, int]:
        """See :attr:`ReplicaCore.load`."""
        return self._core.load

    async def num_trunks(self) -> int:
        """See :attr:`ReplicaCore.num_trunks`."""
        return self._core.num_trunks

    async def check_health(self) -> None:
        """
        Raises:
            RuntimeError: the engine is broken, or its thread gone; Serve then replaces the replica.
        """
        if not self._core.is_healthy:
            raise RuntimeError(self._core.why_ended)

    async def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            await core.stop()


def _begin(args: FairServeArgs) -> Any:
    """Start the counter actor, or hand it this deployment's settings."""
    import ray

    actor = start_counter_actor(args)
    with contextlib.suppress(ray.exceptions.RayError):  # it may be restarting: it was started with its own settings
        ray.get(actor.configure.remote(without_keys(args).model_dump_json()), timeout=30)
    return actor
