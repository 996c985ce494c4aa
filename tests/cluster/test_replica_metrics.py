"""What replicas and routers export about their engine and their calls, without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from fairserve.clock import SystemClock, VirtualClock
from fairserve.cluster.counter_client import CounterLink
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.cluster.replica_metrics import ReplicaMetrics, replica_meter, router_meter
from fairserve.config import CounterConfig
from fairserve.engine.events import Limits, StepEvents
from fairserve.metric_table import METRICS, SERVE_LABELS

LIMITS = Limits(512, 1000, 4, 16, 258)
CONFIG = CounterConfig(call_timeout_s=0.05, poll_s=0.04)


@pytest.fixture
def sink() -> RecordedMetrics:
    return RecordedMetrics()


def step(num_prefill: int = 0, num_decode: int = 0, num_preempted: int = 0, step_s: float = 0.02) -> StepEvents:
    return StepEvents((), 2, 1, 600, 1, num_prefill, num_decode, num_preempted, step_s, 300)


def test_steps_are_counted_at_once_and_handed_on_once_an_interval(sink: RecordedMetrics) -> None:
    metrics = ReplicaMetrics(sink, LIMITS, 1.0, now_s=0.0)
    metrics.export(step(), 0.0)
    for _ in range(3):
        metrics.took(step(num_prefill=100, num_decode=2, num_preempted=1))
    metrics.took(replace(step(), num_failed=2, num_out_of_memory=1))
    metrics.took(replace(step(), num_started_tokens=300, num_cached_tokens=192))
    metrics.export(step(), 0.9)
    assert sink.counters == {}
    metrics.export(step(), 1.0)
    assert sink.counters == {
        ("fairserve_engine_tokens", "prefill"): 300,
        ("fairserve_engine_tokens", "decode"): 6,
        ("fairserve_engine_prompt_tokens", "cached"): 192,
        ("fairserve_engine_prompt_tokens", "uncached"): 108,
        ("fairserve_engine_preemptions",): 3,
        ("fairserve_engine_failed_requests",): 2,
        ("fairserve_engine_out_of_memory",): 1,
    }
    assert sink.histograms == {("fairserve_engine_step_seconds",): [0.02] * 3}
    metrics.export(step(), 2.0)
    assert sink.counters["fairserve_engine_tokens", "prefill"] == 300, "nothing is counted twice"


def test_the_state_of_the_engine_is_that_after_its_newest_step(sink: RecordedMetrics) -> None:
    ReplicaMetrics(sink, LIMITS, 1.0, now_s=0.0).export(replace(step(), idle_cached_tokens=64), 0.0)
    assert {name[0].removeprefix("fairserve_"): value for name, value in sink.gauges.items()} == {
        "engine_running": 2,
        "engine_waiting": 1,
        "engine_slots": 4,
        "engine_kv_resident_tokens": 300,
        "engine_kv_free_tokens": 600,
        "engine_kv_capacity_tokens": 1000,
        "engine_kv_cached_tokens": 64,
        "unmerged_tokens": 0,
    }


def test_an_idle_engine_s_wake_ups_are_no_steps(sink: RecordedMetrics) -> None:
    metrics = ReplicaMetrics(sink, LIMITS, 1.0, now_s=0.0)
    metrics.took(step(step_s=0.0))
    metrics.export(step(), 0.0)
    assert sink.histograms == {}


def test_tokens_are_unmerged_until_the_report_that_holds_them_is_acknowledged(sink: RecordedMetrics) -> None:
    metrics = ReplicaMetrics(sink, LIMITS, 1.0, now_s=0.0)

    def unmerged(now_s: float) -> float:
        metrics.export(step(), now_s)
        return sink.gauges["fairserve_unmerged_tokens",]

    metrics.took(step(num_prefill=50))
    metrics.reported()
    metrics.took(step(num_decode=3))
    assert unmerged(1.0) == 53
    metrics.merged()
    assert unmerged(2.0) == 3
    metrics.reported()
    metrics.merged()
    assert unmerged(3.0) == 0


async def test_calls_are_timed_and_failures_told_apart(sink: RecordedMetrics) -> None:
    link = CounterLink(CONFIG, SystemClock(), replica_meter(sink))

    async def answers() -> int:
        return 7

    async def hangs() -> int:
        await asyncio.Event().wait()
        return 7

    async def breaks() -> int:
        raise ConnectionError

    assert await link.call(answers) == 7
    assert len(sink.histograms["fairserve_report_call_seconds",]) == 1
    assert sink.gauges["fairserve_replica_degraded",] == 0
    assert await link.call(breaks) is None
    assert sink.gauges["fairserve_replica_degraded",] == 1
    assert await link.call(hangs) is None
    assert sink.counters == {
        ("fairserve_report_call_failures", "error"): 1,
        ("fairserve_report_call_failures", "timeout"): 1,
    }
    await link.call(answers)
    assert sink.gauges["fairserve_replica_degraded",] == 0


async def test_the_time_of_a_long_poll_is_not_measured(sink: RecordedMetrics) -> None:
    link = CounterLink(CONFIG, SystemClock(), router_meter(sink))

    async def answers() -> int:
        return 7

    await link.call(answers, is_long_poll=True)
    assert sink.histograms == {}
    assert sink.gauges == {("fairserve_router_degraded",): 0}


def test_everything_that_the_table_promises_of_a_replica_is_exported(
    sink: RecordedMetrics, clock: VirtualClock
) -> None:
    metrics, meter = ReplicaMetrics(sink, LIMITS, 1.0, clock.now_s()), replica_meter(sink)
    metrics.took(replace(step(1, 1, 1), num_failed=1, num_out_of_memory=1, num_started_tokens=1))
    metrics.export(step(), clock.now_s())
    meter.answered(0.1)
    meter.failed(TimeoutError(), is_down=True)
    assert sink.names == {metric.name for metric in METRICS if metric.source == "replica"}


def test_no_metric_claims_a_label_that_serve_gives_to_its_source() -> None:
    for metric in METRICS:
        if metric.source != "counter actor":
            assert not set(metric.labels) & set(SERVE_LABELS), metric
