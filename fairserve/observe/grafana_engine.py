"""The dashboard that answers: do the replicas work well, and does the mechanism behind the fairness?"""

from __future__ import annotations

from fairserve import metric_table as table
from fairserve.metric_table import Metric
from fairserve.observe.grafana_fairness import MARKS
from fairserve.observe.grafana_panels import GREEN, RED, YELLOW, Dashboard, Panel, Query, Row, from_zero, lines, stat
from fairserve.observe.grafana_query import age, one_minus, quantile, rate, value

DEGRADED = ((0.0, "no", GREEN), (1.0, "degraded", RED))
QUANTILES = (0.5, 0.9, 0.99)


def engine_dashboard() -> Dashboard:
    return Dashboard(
        uid="fairserve-engine",
        title="fairserve: engine and mechanism",
        description="Do replicas and counter actor work well? Made by `fairserve grafana build` from the metric table.",
        rows=(
            Row("At a glance", _glance()),
            Row("Engine", _engine()),
            Row("Latency", _latency()),
            Row("Counter actor", _actor()),
            Row("Grants", _grants()),
        ),
        marks=MARKS,
        probe=table.RUNNING,
        of_clients=table.CLIENT_RUNNING,
    )


def _glance() -> tuple[Panel, ...]:
    not_live = value(table.REPLICAS, how="sum", where='state!="live"')
    return (
        stat("Live replicas", value(table.REPLICAS, where='state="live"'), steps=((None, RED), (1, GREEN))),
        stat("Stale or draining", not_live, steps=((None, GREEN), (1, YELLOW))),
        stat("Running", value(table.RUNNING)),
        stat("Waiting", value(table.WAITING)),
        stat("Oldest report", value(table.REPORT_AGE), steps=from_zero(2, 10)),
        stat("Counter actor lives", age(table.ACTOR_START)),
    )


def _engine() -> tuple[Panel, ...]:
    capacity = value(table.KV_CAPACITY, "replica")
    started = rate(table.PROMPT_TOKENS, "replica")
    return (
        lines("Replicas by state", [Query(value(table.REPLICAS, "state"), "{{state}}")], width=8),
        lines("Routers", [Query(value(table.ROUTERS), "routers")], width=8),
        lines(
            "Tokens computed per second",
            [Query(rate(table.ENGINE_TOKENS, "kind"), "{{kind}}")],
            width=8,
            is_stacked=True,
        ),
        lines(
            "KV cache in use",
            [
                Query(value(table.KV_RESIDENT, "replica") / capacity, "{{replica}} holds"),
                Query(
                    one_minus(value(table.KV_FREE, "replica") / capacity), "{{replica}} with reserved", is_dashed=True
                ),
                Query(value(table.KV_CACHED, "replica") / capacity, "{{replica}} keeps to be found again"),
            ],
            note="Above 100 % reserved, a replica has promised more than it has and may preempt.",
        ),
        lines(
            "Batch",
            [
                Query(value(table.ENGINE_RUNNING, "replica"), "{{replica}} runs"),
                Query(value(table.ENGINE_SLOTS, "replica"), "{{replica}} slots", is_dashed=True),
            ],
        ),
        lines("Own queue", [Query(value(table.ENGINE_WAITING, "replica"), "{{replica}}")], width=8),
        lines("Step time", _quantiles(table.STEP_TIME), width=8),
        lines(
            "Preemptions per second",
            [Query(rate(table.ENGINE_PREEMPTIONS, "replica"), "{{replica}}")],
            width=8,
            empty_until="a running request is put back",
        ),
        lines(
            "Prompt tokens found in the prefix cache",
            [Query(rate(table.PROMPT_TOKENS, "replica", where='kind="cached"') / started, "{{replica}}")],
            width=8,
            empty_until="a request starts",
        ),
        lines(
            "Requests that the model failed on per second",
            [Query(rate(table.ENGINE_FAILED, "replica"), "{{replica}}")],
            width=8,
            empty_until="the model fails on a request",
        ),
        lines(
            "Steps without memory per second",
            [Query(rate(table.ENGINE_OUT_OF_MEMORY, "replica"), "{{replica}}")],
            width=8,
            empty_until="a step runs out of memory",
        ),
    )


def _quantiles(metric: Metric) -> list[Query]:
    return [Query(quantile(share, metric), f"{share:.0%} within") for share in QUANTILES]


def _latency() -> tuple[Panel, ...]:
    return (
        lines("Time to first token", _quantiles(table.TIME_TO_FIRST_TOKEN), width=8),
        lines("Time per output token", _quantiles(table.TIME_PER_OUTPUT_TOKEN), width=8),
        lines("Whole request", _quantiles(table.REQUEST_TIME), width=8),
    )


def _actor() -> tuple[Panel, ...]:
    outage = "a call to the counter actor gets no answer"
    return (
        stat("Replicas degraded", value(table.REPLICA_DEGRADED, how="max"), words=DEGRADED, width=6),
        stat("Routers degraded", value(table.ROUTER_DEGRADED, how="max"), words=DEGRADED, width=6),
        stat(
            "Counters from scratch",
            value(table.RESTORED, where='source="scratch"'),
            width=6,
            steps=((None, GREEN), (1, YELLOW)),
            empty_until="the actor restarts without a snapshot",
        ),
        stat("Epoch lasts", age(table.EPOCH), width=6),
        lines(
            "Age of the newest report",
            [Query(value(table.REPORT_AGE, "replica"), "{{replica}}")],
            width=8,
            steps=from_zero(2, 10),
        ),
        lines("Report, call and answer", _quantiles(table.REPLICA_CALL_TIME), width=8),
        lines("Submit, call and answer", _quantiles(table.ROUTER_CALL_TIME), width=8),
        lines("Tokens not yet merged", [Query(value(table.UNMERGED_TOKENS, "replica"), "{{replica}}")], width=8),
        lines("CPU time of one overview", [Query(value(table.OVERVIEW_TIME), "overview")], width=8),
        lines(
            "Calls without an answer",
            [
                Query(rate(table.REPLICA_CALL_FAILURES, "reason"), "reports: {{reason}}"),
                Query(rate(table.ROUTER_CALL_FAILURES, "reason"), "submits: {{reason}}"),
            ],
            width=8,
            empty_until=outage,
        ),
    )


def _grants() -> tuple[Panel, ...]:
    return (
        lines("Grants per second", [Query(rate(table.GRANTS), "grants")], width=6),
        lines(
            "Grants over a full replica",
            [Query(rate(table.PREEMPTING_GRANTS), "grants")],
            width=6,
            empty_until="a request is granted so that another gives way",
        ),
        lines(
            "Lapsed leases",
            [Query(rate(table.LAPSED_LEASES), "leases")],
            width=6,
            empty_until="a grant is not confirmed",
        ),
        lines(
            "Sent without a grant",
            [Query(rate(table.UNGRANTED_REQUESTS), "requests")],
            width=6,
            empty_until="a router cannot reach the counter actor",
        ),
        lines(
            "Sent to another replica",
            [Query(rate(table.RESENT_REQUESTS, "reason"), "{{reason}}")],
            empty_until="a replica dies or drains",
        ),
    )
