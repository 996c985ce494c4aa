"""What routers and replicas export about themselves and their calls to the counter actor."""

from __future__ import annotations

from fairserve import metric_table as table
from fairserve.cluster.metrics_sink import MetricsSink
from fairserve.engine.events import Limits, StepEvents
from fairserve.metric_table import Metric


class CallMeter:
    """Calls to the counter actor, from one side."""

    def __init__(self, sink: MetricsSink, time: Metric, failures: Metric, degraded: Metric) -> None:
        self._sink = sink
        self._time = time
        self._failures = failures
        self._degraded = degraded

    def answered(self, time_s: float | None) -> None:
        """``time_s``: how long it took; None for a long poll, whose time tells nothing."""
        if time_s is not None:
            self._sink.observe(self._time, time_s)
        self._sink.set(self._degraded, 0.0)

    def failed(self, error: Exception, *, is_down: bool) -> None:
        self._sink.add(self._failures, reason="timeout" if isinstance(error, TimeoutError) else "error")
        self._sink.set(self._degraded, float(is_down))


def router_meter(sink: MetricsSink) -> CallMeter:
    return CallMeter(sink, table.ROUTER_CALL_TIME, table.ROUTER_CALL_FAILURES, table.ROUTER_DEGRADED)


def replica_meter(sink: MetricsSink) -> CallMeter:
    return CallMeter(sink, table.REPLICA_CALL_TIME, table.REPLICA_CALL_FAILURES, table.REPLICA_DEGRADED)


class ReplicaMetrics:
    """Collects step after step on the event loop, and hands it on every ``interval_s``."""

    def __init__(self, sink: MetricsSink, limits: Limits, interval_s: float, now_s: float) -> None:
        self._sink = sink
        self._limits = limits
        self._interval_s = interval_s
        self._exported_s = now_s - interval_s
        self._steps_s: list[float] = []
        self._num_prefill = self._num_decode = self._num_preempted = 0
        self._num_failed = self._num_out_of_memory = 0
        self._num_started = self._num_cached = 0
        self._num_computed = self._num_reported = self._num_merged = 0

    def took(self, events: StepEvents) -> None:
        """One step."""
        num_prefill, num_decode = events.num_prefill_tokens, events.num_decode_tokens
        if num_prefill or num_decode:
            self._steps_s.append(events.step_s)
            self._num_prefill += num_prefill
            self._num_decode += num_decode
            self._num_computed += num_prefill + num_decode
        self._num_started += events.num_started_tokens
        self._num_cached += events.num_cached_tokens
        self._num_preempted += events.num_preempted
        self._num_failed += events.num_failed
        self._num_out_of_memory += events.num_out_of_memory

    def reported(self) -> None:
        """A report with everything until now is on its way."""
        self._num_reported = self._num_computed

    def merged(self) -> None:
        """It was acknowledged."""
        self._num_merged = self._num_reported

    def export(self, newest: StepEvents, now_s: float) -> None:
        """Nothing happens before its time. ``newest``: the engine's state."""
        if now_s - self._exported_s < self._interval_s:
            return
        self._exported_s = now_s
        set_, limits = self._sink.set, self._limits
        set_(table.ENGINE_RUNNING, newest.num_running)
        set_(table.ENGINE_WAITING, newest.num_waiting)
        set_(table.ENGINE_SLOTS, limits.max_num_seqs)
        set_(table.KV_RESIDENT, newest.resident_tokens)
        set_(table.KV_FREE, newest.free_kv_tokens)
        set_(table.KV_CAPACITY, limits.kv_capacity_tokens)
        set_(table.KV_CACHED, newest.idle_cached_tokens)
        set_(table.UNMERGED_TOKENS, self._num_computed - self._num_merged)
        self._sink.add(table.ENGINE_TOKENS, self._num_prefill, kind="prefill")
        self._sink.add(table.ENGINE_TOKENS, self._num_decode, kind="decode")
        self._sink.add(table.PROMPT_TOKENS, self._num_cached, kind="cached")
        self._sink.add(table.PROMPT_TOKENS, self._num_started - self._num_cached, kind="uncached")
        self._sink.add(table.ENGINE_PREEMPTIONS, self._num_preempted)
        self._sink.add(table.ENGINE_FAILED, self._num_failed)
        self._sink.add(table.ENGINE_OUT_OF_MEMORY, self._num_out_of_memory)
        for step_s in self._steps_s:
            self._sink.observe(table.STEP_TIME, step_s)
        self._steps_s.clear()
        self._num_prefill = self._num_decode = self._num_preempted = 0
        self._num_failed = self._num_out_of_memory = 0
        self._num_started = self._num_cached = 0
