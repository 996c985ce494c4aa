"""The dashboard that answers: is the service fair, and who gets what?"""

from __future__ import annotations

from fairserve import metric_table as table
from fairserve.observe.grafana_panels import (
    GREEN,
    PLAIN,
    RED,
    YELLOW,
    Dashboard,
    Mark,
    Panel,
    Query,
    Row,
    columns,
    from_zero,
    lines,
    stat,
)
from fairserve.observe.grafana_query import (
    Expr,
    each_per,
    moment,
    part_of_all,
    quantile,
    rate,
    value,
    while_positive,
)

NOT_OTHER = f'client!="{table.OTHER}"'
IS_EVEN = ((None, RED), (0.8, YELLOW), (0.9, GREEN))
MARKS = (
    Mark("New epoch: the actor began, or its settings changed", moment(table.EPOCH), YELLOW),
    Mark("The counter actor began", moment(table.ACTOR_START), RED),
)


def fairness_dashboard() -> Dashboard:
    return Dashboard(
        uid="fairserve-fairness",
        title="fairserve: fairness",
        description="Is the service fair, and who gets what? Made by `fairserve grafana build` from the metric table.",
        rows=(
            Row("Verdict", _verdict()),
            Row("Service", _service()),
            Row("Counters", _counters()),
            Row("Waiting", _waiting()),
            Row("Refused and throttled", _refused()),
        ),
        marks=MARKS,
        probe=table.WAITING,
        of_clients=table.CLIENT_WAITING,
    )


def _verdict() -> tuple[Panel, ...]:
    gap, bound = value(table.SERVICE_GAP), value(table.SERVICE_GAP_BOUND)
    worst = value(table.SERVICE_GAP_WORST)
    jain = value(table.JAIN_INDEX, how="min")
    overloaded = ((0.0, "no", GREEN), (1.0, "overload", YELLOW))
    return (
        stat("Fair now", value(table.IS_FAIR, how="min"), words=((0.0, "unfair", RED), (1.0, "fair", GREEN))),
        stat("Gap, of its bound", gap / bound, steps=from_zero(0.8, 1.0)),
        stat("Jain's index", jain, steps=IS_EVEN, decimals=3),
        stat("Clients that wait", value(table.BACKLOGGED_CLIENTS)),
        stat("Oldest wait", value(table.OLDEST_WAIT), steps=from_zero(30, 120)),
        stat("Overload", value(table.OVERLOAD), words=overloaded),
        lines(
            "Gap against its bound",
            [Query(gap, "gap now"), Query(worst, "worst so far"), Query(bound, "bound", is_dashed=True)],
            note="The gap may come near the bound under load; above it, the proof is broken.",
        ),
        lines("Jain's index over time", [Query(jain, "index")], width=6, steps=IS_EVEN, max_value=1.0),
        lines("Who waits and who is known", _populations(), width=6),
    )


def _populations() -> list[Query]:
    return [
        Query(value(table.BACKLOGGED_CLIENTS), "wait now"),
        Query(value(table.KNOWN_CLIENTS), "known", is_dashed=True),
    ]


def _service() -> tuple[Panel, ...]:
    per_client = rate(table.CLIENT_SERVICE, "client")
    weight = value(table.CLIENT_WEIGHT, "client", where=NOT_OTHER)
    waiting = value(table.CLIENT_WAITING, "client", where=NOT_OTHER)
    received = part_of_all(while_positive(rate(table.CLIENT_SERVICE, "client", where=NOT_OTHER), waiting, "client"))
    due = part_of_all(while_positive(weight, waiting, "client"))
    per_weight = each_per(
        rate(table.CLIENT_SERVICE, "client", where=NOT_OTHER), weight, "client", "service / weight / s"
    )
    return (
        lines("Service per second", [Query(per_client, "{{client}}")], is_stacked=True),
        lines(
            "Share received against share due",
            [Query(received, "{{client}}"), Query(due, "{{client}} is due", is_dashed=True)],
            note="Among the chosen clients that wait now; who does not wait has all that it asked for.",
            max_value=1.0,
        ),
        lines(
            "Service / weight per second",
            [Query(per_weight, "{{client}}")],
            note="Lines of clients that wait lie together when the service is fair.",
        ),
        lines("Tokens per second", [Query(rate(table.CLIENT_TOKENS, "kind"), "{{kind}}")], is_stacked=True),
        columns("Clients now", _columns(per_client, weight)),
    )


def _columns(per_client: Expr, weight: Expr) -> list[Query]:
    return [
        Query(per_client, "service / s"),
        Query(weight, "weight"),
        Query(value(table.CLIENT_LEAD, "client"), "lead"),
        Query(value(table.CLIENT_WAITING, "client"), "waiting"),
        Query(value(table.CLIENT_RUNNING, "client"), "running"),
        Query(value(table.CLIENT_OLDEST_WAIT, "client"), "oldest wait"),
        Query(quantile(0.95, table.QUEUE_WAIT, "client"), "95 % wait at most"),
        Query(rate(table.REQUESTS, "client"), "requests / s"),
    ]


def _counters() -> tuple[Panel, ...]:
    return (
        lines(
            "Lead over the least counter",
            [Query(value(table.CLIENT_LEAD, "client"), "{{client}}")],
            note="A client that leads waits until the others have caught up.",
        ),
        lines(
            "Lifts per second",
            [Query(rate(table.LIFTS), "lifts")],
            empty_until="an idle client comes back and is lifted",
        ),
    )


def _waiting() -> tuple[Panel, ...]:
    return (
        lines(
            "Waiting requests",
            [Query(value(table.CLIENT_WAITING, "client"), "{{client}}")],
            is_stacked=True,
        ),
        lines("Granted, not finished", [Query(value(table.CLIENT_RUNNING, "client"), "{{client}}")], is_stacked=True),
        lines(
            "Oldest waiting request",
            [
                Query(value(table.CLIENT_OLDEST_WAIT, "client"), "{{client}}"),
                Query(value(table.OLDEST_WAIT), "of all", is_dashed=True),
            ],
            note="Rises without end for a client that starves.",
            steps=from_zero(30, 120),
        ),
        lines(
            "Wait until the grant",
            [Query(quantile(share, table.QUEUE_WAIT), f"{share:.0%} at most") for share in (0.5, 0.95, 0.99)],
        ),
        lines("95 % of waits are shorter", [Query(quantile(0.95, table.QUEUE_WAIT, "client"), "{{client}}")]),
        lines(
            "95 % of first tokens come within",
            [Query(quantile(0.95, table.TIME_TO_FIRST_TOKEN, "client"), "{{client}}")],
        ),
    )


def _refused() -> tuple[Panel, ...]:
    refusal = "a request is refused"
    return (
        lines(
            "Refusals by reason", [Query(rate(table.REFUSALS, "reason"), "{{reason}}")], width=8, empty_until=refusal
        ),
        lines(
            "Refusals by client", [Query(rate(table.REFUSALS, "client"), "{{client}}")], width=8, empty_until=refusal
        ),
        lines(
            "Throttled interactions",
            [Query(rate(table.THROTTLED), "throttled")],
            width=8,
            steps=PLAIN,
            empty_until="an interaction is refused under overload",
        ),
        lines("How requests end", [Query(rate(table.REQUESTS, "outcome"), "{{outcome}}")], is_stacked=True),
        lines("Overload over time", [Query(value(table.OVERLOAD), "overload")], max_value=1.0),
    )
