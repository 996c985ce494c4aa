"""What the ingress measures of a request, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from starlette.requests import ClientDisconnect

from fairserve.api.merging import Batch
from fairserve.api.request_metrics import RequestMeter, RequestMetrics
from fairserve.clock import VirtualClock
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.engine.request import RequestOutput, Usage
from fairserve.errors import ClientQueueFull, ReplicaFailed, RequestTimeout


@pytest.fixture
def sink() -> RecordedMetrics:
    return RecordedMetrics()


@pytest.fixture
def metrics(sink: RecordedMetrics, clock: VirtualClock) -> RequestMetrics:
    return RequestMetrics(sink, 2, clock)


@asynccontextmanager
async def no_deadline():
    yield


def output(num_output: int, waited_s: float | None = None) -> RequestOutput:
    return RequestOutput("r", "", (), Usage(10, 0, num_output), waited_s=waited_s)


async def run(
    meter: RequestMeter, clock: VirtualClock, *steps: tuple[float, Batch], error: BaseException | None = None
):
    async def batches() -> AsyncGenerator[Batch, None]:
        for after_s, batch in steps:
            clock.advance(after_s)
            yield batch
        if error is not None:
            raise error

    async with meter.watching(no_deadline()):
        async for _ in meter.outputs(batches()):
            pass


async def test_waits_first_tokens_and_ends_are_told_by_client(metrics, sink, clock) -> None:
    meter = RequestMeter(metrics, "ann")
    clock.advance(0.5)  # tokenizing
    await run(meter, clock, (2.0, {0: output(1, waited_s=1.5)}), (0.4, {0: output(3)}), (0.6, {0: output(6)}))
    assert sink.histograms == {
        ("fairserve_queue_wait_seconds", "ann"): [1.5],
        ("fairserve_time_to_first_token_seconds", "ann"): [2.5],
        ("fairserve_time_per_output_token_seconds", "ann"): [pytest.approx(1.0 / 5)],
        ("fairserve_request_seconds", "ann"): [pytest.approx(3.5)],
    }
    assert sink.counters == {("fairserve_requests", "ann", "ok"): 1}


async def test_each_sequence_of_a_request_has_its_own_wait_and_pace(metrics, sink, clock) -> None:
    meter = RequestMeter(metrics, "ann")
    both = {0: output(1, waited_s=0.1), 1: output(1, waited_s=0.3)}
    await run(meter, clock, (1.0, both), (1.0, {0: output(2), 1: output(5)}))
    assert sink.histograms["fairserve_queue_wait_seconds", "ann"] == [0.1, 0.3]
    assert sink.histograms["fairserve_time_per_output_token_seconds", "ann"] == [1.0, 0.25]
    assert len(sink.histograms["fairserve_time_to_first_token_seconds", "ann"]) == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ClientQueueFull("ann", 5, 5, 1.0), "refused"),
        (RequestTimeout(10.0), "timeout"),
        (ReplicaFailed("it died"), "failed"),
        (ZeroDivisionError(), "failed"),
        (ClientDisconnect(), "left"),
        (asyncio.CancelledError(), "left"),
    ],
)
async def test_every_end_is_told_apart_and_only_good_ones_are_timed(metrics, sink, clock, error, outcome) -> None:
    with pytest.raises(type(error)):
        await run(RequestMeter(metrics, "ann"), clock, error=error)
    assert sink.counters["fairserve_requests", "ann", outcome] == 1
    assert sink.histograms == {}


async def test_a_refusal_names_its_reason(metrics, sink, clock) -> None:
    with pytest.raises(ClientQueueFull):
        await run(RequestMeter(metrics, "ann"), clock, error=ClientQueueFull("ann", 5, 5, 1.0))
    assert sink.counters["fairserve_refusals", "ann", ClientQueueFull.reason] == 1


async def test_a_flood_of_names_does_not_become_a_flood_of_labels(metrics, sink, clock) -> None:
    for i in range(500):
        clock.advance(0.1)
        await run(RequestMeter(metrics, f"client-{i}"), clock, (0.0, {0: output(1)}))
    labels = {key[1] for key in sink.counters}
    assert "other" in labels and len(labels) <= 11
    assert sum(sink.counters.values()) == 500
