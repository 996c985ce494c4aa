"""Every metric that fairserve exports, as one table of plain data.

It lies beside ``errors`` and ``views``, below all floors: the counter actor, the replicas and the routers (floor 4)
fill it, the API (floor 5) too, and ``fairserve.observe.metrics`` prints it. Nothing can be exported that is not a row
here, and no dashboard and no rule may name anything else; tests hold both.

A row's ``name`` is what the code says. Ray puts ``ray_`` in front of it and ``_total`` behind a counter's, which
:attr:`Metric.prometheus` gives. Every metric carries the label ``counters``: the name of the counter actor
(``counter.name``), so that two services on one cluster stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Source = Literal["counter actor", "replica", "router", "ingress"]

OTHER = "other"
"""The value of ``client`` that stands for everybody who is not among the busiest."""
COMMON_LABEL = "counters"
SERVE_LABELS = ("deployment", "replica", "application")
"""Ray Serve puts these on whatever a deployment exports. A router lives in the ingress, so they are the ingress's."""
RAY_LABELS = (
    "Component",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
)
"""Ray puts these on everything: aggregate over them, or a restarted process shows as a second series."""

WAIT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
STEP_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row. ``labels`` are its own, without those that every metric or Serve has; ``boundaries`` are a histogram's,
    in its unit."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    meaning: str
    source: Source
    boundaries: tuple[float, ...] = ()

    @property
    def prometheus(self) -> str:
        """The name that Prometheus knows; a histogram's without ``_bucket``, ``_sum``, ``_count``."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the series that Prometheus stores."""
        if self.kind == "histogram":
            return tuple(f"{self.prometheus}_{part}" for part in ("bucket", "sum", "count"))
        return (self.prometheus,)

    @property
    def all_labels(self) -> tuple[str, ...]:
        """``labels`` and what else to select and group by; :data:`RAY_LABELS` come on top."""
        serve = () if self.source == "counter actor" else SERVE_LABELS
        return (*self.labels, COMMON_LABEL, *serve)


def _gauge(name: str, unit: str, meaning: str, source: Source, *labels: str) -> Metric:
    return Metric(f"fairserve_{name}", "gauge", unit, labels, meaning, source)


def _counter(name: str, unit: str, meaning: str, source: Source, *labels: str) -> Metric:
    return Metric(f"fairserve_{name}", "counter", unit, labels, meaning, source)


def _histogram(
    name: str, boundaries: tuple[float, ...], meaning: str, source: Source, *labels: str, unit: str = "seconds"
) -> Metric:
    return Metric(f"fairserve_{name}", "histogram", unit, labels, meaning, source, boundaries)


# -- fairness -------------------------------------------------------------------------------------------------------
SERVICE_GAP = _gauge(
    "service_gap",
    "service / weight",
    "widest difference of service / weight among clients that wait now, since both wait",
    "counter actor",
)
SERVICE_GAP_WORST = _gauge(
    "service_gap_worst",
    "service / weight",
    "the widest that the gap has been since the actor began, or its settings changed",
    "counter actor",
)
SERVICE_GAP_BOUND = _gauge(
    "service_gap_bound", "service / weight", "what the proof allows the gap to be", "counter actor"
)
IS_FAIR = _gauge("is_fair", "0 or 1", "1: the gap lies within the bound", "counter actor")
JAIN_INDEX = _gauge(
    "jain_index",
    "ratio",
    "Jain's index of service / weight over the last 60 s among clients that waited throughout; 1 is even",
    "counter actor",
)
BACKLOGGED_CLIENTS = _gauge("backlogged_clients", "clients", "clients that wait now", "counter actor")
KNOWN_CLIENTS = _gauge("known_clients", "clients", "clients that have a counter", "counter actor")
LIFTS = _counter("lifts", "lifts", "idle clients that came back and were raised to the level", "counter actor")
CLIENT_SERVICE = _counter(
    "client_service", "service", "service received, not divided by weight", "counter actor", "client"
)
CLIENT_TOKENS = _counter(
    "client_tokens",
    "tokens",
    "tokens served; kind: input_computed, input_cached (found in the prefix cache) or output",
    "counter actor",
    "client",
    "kind",
)
CLIENT_LEAD = _gauge(
    "client_lead",
    "service / weight",
    "counter above the least counter among clients that wait or run; none for other",
    "counter actor",
    "client",
)
CLIENT_WEIGHT = _gauge("client_weight", "weight", "weight in force; none for other", "counter actor", "client")

# -- queueing -------------------------------------------------------------------------------------------------------
CLIENT_WAITING = _gauge("client_waiting", "requests", "requests in the cluster's queue", "counter actor", "client")
CLIENT_RUNNING = _gauge("client_running", "requests", "requests granted and not finished", "counter actor", "client")
CLIENT_OLDEST_WAIT = _gauge(
    "client_oldest_wait_seconds",
    "seconds",
    "how long the oldest waiting request has waited; 0 without one",
    "counter actor",
    "client",
)
OLDEST_WAIT = _gauge(
    "oldest_wait_seconds",
    "seconds",
    "how long the oldest waiting request of all clients that are not paused has waited (starvation)",
    "counter actor",
)
WAITING = _gauge("waiting", "requests", "requests in the cluster's queue", "counter actor")
RUNNING = _gauge("running", "requests", "requests granted and not finished", "counter actor")
QUEUE_WAIT = _histogram(
    "queue_wait_seconds", WAIT_S, "from the router to the grant; none without a grant", "ingress", "client"
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", WAIT_S, "from a checked request to its first output", "ingress", "client"
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "time_per_output_token_seconds",
    TOKEN_S,
    "mean time between output tokens of one sequence, after its first output",
    "ingress",
    "client",
)
REQUEST_TIME = _histogram(
    "request_seconds", WAIT_S, "from a checked request to its last output, of those that finished", "ingress", "client"
)
REQUESTS = _counter(
    "requests",
    "requests",
    "HTTP requests that ended; outcome: ok, refused, timeout, failed (a replica's or our fault) or left (the caller)",
    "ingress",
    "client",
    "outcome",
)

# -- refusals, throttling -------------------------------------------------------------------------------------------
REFUSALS = _counter(
    "refusals",
    "requests",
    "requests refused with 429; reason: the code in the error body, such as client_queue_full",
    "ingress",
    "client",
    "reason",
)
OVERLOAD = _gauge("overload", "0 or 1", "1: overload, interactions may be throttled", "counter actor")
THROTTLED = _counter("throttled", "requests", "interactions refused under overload", "counter actor")

# -- mechanism ------------------------------------------------------------------------------------------------------
ACTOR_START = _gauge(
    "actor_start_time_seconds", "Unix time", "when this life of the counter actor began", "counter actor"
)
EPOCH = _gauge(
    "epoch_start_time_seconds",
    "Unix time",
    "when this epoch began: a life of the actor, or new settings",
    "counter actor",
)
RESTORED = _gauge(
    "actor_restored",
    "0 or 1",
    "1 for the source of this life's counters; source: first (there was none before), snapshot, or scratch (the actor "
    "was restarted and found no snapshot: all counters began level)",
    "counter actor",
    "source",
)
GRANTS = _counter("grants", "requests", "requests granted to a replica", "counter actor")
PREEMPTING_GRANTS = _counter(
    "preempting_grants", "requests", "requests granted over a full replica, so that another gives way", "counter actor"
)
LAPSED_LEASES = _counter("lapsed_leases", "leases", "grants that no replica confirmed in time", "counter actor")
REPLICAS = _gauge("replicas", "replicas", "model replicas; state: live, stale or draining", "counter actor", "state")
ROUTERS = _gauge("routers", "routers", "ingress processes that submit requests", "counter actor")
REPORT_AGE = _gauge(
    "report_age_seconds",
    "seconds",
    "since the newest report of a replica; 0 for one that drains or is gone",
    "counter actor",
    "replica",
)
OVERVIEW_TIME = _gauge(
    "overview_seconds", "seconds", "CPU time of the newest overview inside the actor", "counter actor"
)
UNMERGED_TOKENS = _gauge(
    "unmerged_tokens", "tokens", "tokens computed here that no acknowledged report holds", "replica"
)
REPLICA_CALL_TIME = _histogram(
    "report_call_seconds", CALL_S, "time of one report to the counter actor and its answer", "replica"
)
REPLICA_CALL_FAILURES = _counter(
    "report_call_failures",
    "calls",
    "reports without an answer; reason: timeout, or error (the call itself failed)",
    "replica",
    "reason",
)
REPLICA_DEGRADED = _gauge("replica_degraded", "0 or 1", "1: this replica cannot reach the counter actor", "replica")
ROUTER_CALL_TIME = _histogram(
    "route_call_seconds", CALL_S, "time of one submitting call to the counter actor (long polls left out)", "router"
)
ROUTER_CALL_FAILURES = _counter(
    "route_call_failures",
    "calls",
    "submits and polls without an answer; reason: timeout, or error (the call itself failed)",
    "router",
    "reason",
)
ROUTER_DEGRADED = _gauge("router_degraded", "0 or 1", "1: this router cannot reach the counter actor", "router")
UNGRANTED_REQUESTS = _counter(
    "ungranted_requests", "requests", "requests sent to a replica without a grant (degraded mode)", "router"
)
RESENT_REQUESTS = _counter(
    "resent_requests",
    "requests",
    "requests sent to another replica; reason: returned (a replica gave it back unserved), unstarted (its replica died "
    "before it said that it had begun) or continued (its replica died under it)",
    "ingress",
    "reason",
)

# -- engine ---------------------------------------------------------------------------------------------------------
ENGINE_RUNNING = _gauge("engine_running", "requests", "requests in the batch", "replica")
ENGINE_WAITING = _gauge("engine_waiting", "requests", "requests in the replica's own queue", "replica")
ENGINE_SLOTS = _gauge("engine_slots", "requests", "requests that may run at the same time", "replica")
KV_RESIDENT = _gauge("engine_kv_resident_tokens", "tokens", "tokens whose keys and values are in the cache", "replica")
KV_FREE = _gauge("engine_kv_free_tokens", "tokens", "tokens neither held nor reserved; may be negative", "replica")
KV_CAPACITY = _gauge("engine_kv_capacity_tokens", "tokens", "tokens that the KV cache holds", "replica")
KV_CACHED = _gauge(
    "engine_kv_cached_tokens",
    "tokens",
    "tokens of finished requests that a new one may find; their room is free",
    "replica",
)
PROMPT_TOKENS = _counter(
    "engine_prompt_tokens",
    "tokens",
    "prompt tokens of requests that start; kind: cached (found in the prefix cache) or uncached",
    "replica",
    "kind",
)
STEP_TIME = _histogram("engine_step_seconds", STEP_S, "time of one engine step", "replica")
ENGINE_TOKENS = _counter(
    "engine_tokens",
    "tokens",
    "tokens computed, recomputed ones too; kind: prefill or decode",
    "replica",
    "kind",
)
ENGINE_PREEMPTIONS = _counter("engine_preemptions", "requests", "running requests put back", "replica")
ENGINE_FAILED = _counter(
    "engine_failed_requests", "requests", "requests that the model failed on: it raised, or gave NaN", "replica"
)
ENGINE_OUT_OF_MEMORY = _counter(
    "engine_out_of_memory", "steps", "steps that ran out of memory, and were planned again smaller", "replica"
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in METRICS}
