"""One request's spans across ingress, router and replica, in one process, with the SDK's own exporter: no Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from fairserve.api.app import create_app
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.clock import SystemClock
from fairserve.cluster.counter_client import RouterClient, traced_acquire
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.replica import ReplicaCore
from fairserve.cluster.tracing import NO_TRACING, DispatchSpans, OtelTracing, Tracer, make_tracing
from fairserve.config import FairServeArgs, TracingConfig
from fairserve.dispatch.messages import Grant, Refusal, RouterCall, RouterReply, Submit
from fairserve.dispatch.replica_book import LocalBook
from fairserve.dispatch.router_book import RouterBook
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import ClientQueueFull
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.api.scripted import byte_tokenizer
from tests.cluster.scripted import ScriptedLoop, Wire, until

ARGS = FairServeArgs.model_validate(
    {
        "served_model_name": "tiny",
        "counter": {"call_timeout_s": 0.5, "poll_s": 0.05, "heartbeat_s": 0.05, "store": None},
    }
)
LIMITS = Limits(512, 1000, 4, 16, 258)
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class House:
    """The real ingress, router client, counter service and replica core; only HTTP, Ray and the model are missing."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.counter = CounterService(ARGS.model_dump_json())
        self.counter.main._spans = DispatchSpans(tracer)
        self.wire = Wire(self.counter)
        self.engine = ScriptedLoop(LocalBook(make_policy("vtc"), WeightedTokens()))
        clock = SystemClock()
        self.core = ReplicaCore("m-1", LIMITS, self.engine.book, self.wire, ARGS, clock, tracer=tracer)
        self.engine.core = self.core
        self.router = RouterClient(RouterBook("router", 1), self.wire, ARGS.counter, clock)
        service = OpenAIService(ARGS, [ServedModel(ARGS, self, byte_tokenizer(), 200)], environ={}, tracer=tracer)
        app = create_app(lambda: service)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fairserve")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """What FairRouter and the handle do."""
        submit = Submit(request.request_id, request.client, request.num_input, request.sampling.max_tokens)
        grant = await traced_acquire(self.tracer, request.trace, self.router, submit)
        async for output in self.core.generate(request, None if grant is None else grant.waited_s):
            yield output

    async def health(self) -> dict[str, Any]:
        return {"ready": True}

    async def ask(self, **headers: str) -> httpx.Response:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
        sent = {"authorization": "Bearer ann"} | headers
        asking = asyncio.create_task(self.http.post("/v1/completions", json=body, headers=sent))
        await until(lambda: bool(self.core._streams))
        (request_id,) = self.core._streams
        self.engine.step(self.engine.output(request_id, tokens=1))
        self.engine.step(self.engine.output(request_id, "length", tokens=1))
        return await asking


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def house(exported: InMemorySpanExporter) -> AsyncIterator[House]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    house = House(OtelTracing(provider))
    house.core.start(house.engine)
    yield house
    await house.router.close()
    await house.core.stop()
    await house.http.aclose()


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exported.get_finished_spans()
    names = [span.name.removeprefix("fairserve.") for span in spans]
    assert len(set(names)) == len(names)
    return dict(zip(names, spans, strict=True))


async def test_a_request_leaves_a_span_at_the_door_in_the_queue_in_the_actor_and_two_on_the_replica(
    house: House, exported: InMemorySpanExporter
) -> None:
    assert (await house.ask()).status_code == 200
    spans = by_name(exported)
    assert spans.keys() == {"request", "queue", "dispatch", "prefill", "decode"}
    root, in_actor = spans.pop("request"), spans.pop("dispatch")
    assert in_actor.parent is not None
    assert in_actor.parent.span_id == spans["queue"].context.span_id
    assert in_actor.context.trace_id == root.context.trace_id
    assert root.parent is None
    assert {span.parent.span_id for span in spans.values()} == {root.context.span_id}
    assert {span.context.trace_id for span in spans.values()} == {root.context.trace_id}
    starts = [spans[name].start_time for name in ("queue", "prefill", "decode")]
    assert root.start_time <= starts[0] <= starts[1] <= starts[2]
    assert spans["prefill"].end_time <= spans["decode"].end_time <= root.end_time


async def test_spans_tell_who_where_and_how_much(house: House, exported: InMemorySpanExporter) -> None:
    await house.ask()
    told = {name: dict(span.attributes or {}) for name, span in by_name(exported).items()}
    assert told["request"] == {
        "fairserve.client": "ann",
        "fairserve.model": "tiny",
        "fairserve.outcome": "ok",
        "fairserve.num_input": 3,
        "fairserve.num_output": 2,
    }
    assert told["queue"]["fairserve.replica"] == "m-1"
    assert told["queue"]["fairserve.is_granted"] is True
    assert 0 <= told["queue"]["fairserve.waited_s"] < 5
    assert told["dispatch"].items() >= {"fairserve.outcome": "granted", "fairserve.replica": "m-1"}.items()
    assert told["prefill"]["fairserve.num_input"] == 3
    assert told["decode"]["fairserve.finish_reason"] == "length"


async def test_the_trace_of_the_caller_goes_on(house: House, exported: InMemorySpanExporter) -> None:
    await house.ask(traceparent=CALLER)
    root = by_name(exported)["request"]
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]


@pytest.mark.parametrize("nonsense", ["", "00-0-0-00", "x" * 5000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_traceparent_that_is_none_begins_a_trace(
    house: House, exported: InMemorySpanExporter, nonsense: str
) -> None:
    assert (await house.ask(traceparent=nonsense)).status_code == 200
    assert by_name(exported)["request"].parent is None


async def test_a_request_that_goes_without_a_grant_says_so(house: House, exported: InMemorySpanExporter) -> None:
    house.wire.is_cut = True
    assert (await house.ask()).status_code == 200
    queue = by_name(exported)["queue"]
    assert dict(queue.attributes or {})["fairserve.is_granted"] is False


async def test_the_actor_s_span_ends_with_whatever_becomes_of_the_request(exported: InMemorySpanExporter) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    spans = DispatchSpans(OtelTracing(provider))
    names = ("granted", "refused", "cancelled", "declined", "lost", "waiting")
    submits = tuple(Submit(name, "ann", 3, 2, trace=CALLER) for name in names)
    spans.called(RouterCall("r", 1, 1, 0, (*submits, Submit("untraced", "ann", 3, 2))))
    refusal = Refusal("refused", ClientQueueFull("ann", 1, 1, 1.0))
    spans.replied(RouterReply(1, (Grant("granted", "m-1", 0.5, 1),), (refusal,)))
    spans.replied(RouterReply(1, (Grant("granted", "m-1", 0.5, 1), Grant("untraced", "m-1", 0.5, 2))))
    spans.called(RouterCall("r", 1, 2, 1, cancels=("cancelled",), declined=("declined",)))
    spans.keep(lambda request_id: request_id == "waiting")
    outcomes = [dict(span.attributes or {})["fairserve.outcome"] for span in exported.get_finished_spans()]
    assert outcomes == ["granted", "client_queue_full", "cancelled", "cancelled", "lost"]


async def test_a_request_that_fails_ends_its_spans_with_an_error(house: House, exported: InMemorySpanExporter) -> None:
    asking = asyncio.create_task(house.http.post("/v1/completions", json={"model": "tiny", "prompt": "abc"}))
    await until(lambda: bool(house.core._streams))
    (request_id,) = house.core._streams
    house.engine.step(house.engine.output(request_id, "error", error="secret text of the caller"))
    assert (await asking).status_code == 503
    root = by_name(exported)["request"]
    assert (root.status.is_ok, root.status.description) == (False, "ReplicaFailed")
    assert "secret" not in root.to_json()


async def test_what_is_not_sampled_at_the_door_is_recorded_nowhere(exported: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    span = OtelTracing(provider).begin("fairserve.request")
    elsewhere = TracerProvider()  # another process, with the default sampler: parent-based
    elsewhere.add_span_processor(SimpleSpanProcessor(exported))
    OtelTracing(elsewhere).begin("fairserve.prefill", span.traceparent).end()
    span.end()
    assert exported.get_finished_spans() == ()


async def test_off_nothing_travels_and_a_caller_s_trace_is_not_passed_on() -> None:
    house = House(NO_TRACING)
    house.core.start(house.engine)
    assert (await house.ask(traceparent=CALLER)).status_code == 200
    await house.router.close()
    await house.core.stop()
    await house.http.aclose()
    assert NO_TRACING.begin("fairserve.request", CALLER).traceparent == ""
    assert make_tracing(TracingConfig()) is NO_TRACING


def test_off_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, fairserve.cluster.counter_client, fairserve.cluster.tracing as t, fairserve.config as c\n"
        "t.make_tracing(c.TracingConfig()).begin('x').end()\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
