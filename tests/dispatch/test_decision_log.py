"""The decision log: one JSON line for every submit, grant, refusal and finish, from which a run can be retold."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from fairserve.config import DispatchConfig, FairnessConfig, ThrottleConfig
from fairserve.dispatch.decision_log import LOG_VERSION, DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.leases import Lease, Waiting
from fairserve.errors import ClientQueueFull
from fairserve.fairness.catalog import make_policy
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job
from tests.dispatch.kit import Desk, submit


class Lines(list[str]):
    """Where a log writes to, and reads back."""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == event]


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def log(lines: Lines) -> DecisionLog:
    return DecisionLog(lines.append)


# -- lines -------------------------------------------------------------------------------------------------------------


def test_a_beginning_says_which_policy_and_which_version(log: DecisionLog, lines: Lines) -> None:
    log.began(policy="drr", epoch=3, now_s=1.23456789)
    assert lines.events == [{"t": 1.234568, "event": "began", "version": LOG_VERSION, "policy": "drr", "epoch": 3}]


def test_a_submit_holds_all_that_a_replay_needs_and_nothing_that_is_not_said(log: DecisionLog, lines: Lines) -> None:
    log.submitted(submit("r1", "acme/ann", 12, 34, weight=2.0, waited_s=0.5), 7.5, 10.0)
    log.submitted(
        submit("r2", application="chat", interaction="task", call_index=3, prefix=(1, 2**63), is_retry=True), 0.0, 10.0
    )
    plain, labelled = lines.events
    assert plain == {
        "t": 10.0,
        "event": "submit",
        "lift": 7.5,
        "request": "r1",
        "client": "acme/ann",
        "input": 12,
        "max_output": 34,
        "weight": 2.0,
        "waited_s": 0.5,
        "is_retry": False,
    }
    assert (
        labelled.items()
        >= {
            "application": "chat",
            "interaction": "task",
            "call_index": 3,
            "prefix": [1, 2**63],
            "is_retry": True,
        }.items()
    )


def test_a_refusal_says_why_and_until_when_and_what_was_refused(log: DecisionLog, lines: Lines) -> None:
    log.refused(submit("r1", "ann", 12, 34), ClientQueueFull("ann", 5, 5, 2.5), 1.0)
    (event,) = lines.events
    assert (
        event.items()
        >= {
            "event": "refuse",
            "reason": "client_queue_full",
            "retry_after_s": 2.5,
            "request": "r1",
            "input": 12,
        }.items()
    )


@pytest.mark.parametrize("name", ['"quoted"', "back\\slash", "new\nline", "tab\t", "naïve", "日本", "\ud800", "\x00"])
def test_no_name_breaks_a_line(log: DecisionLog, lines: Lines, name: str) -> None:
    lease = Lease(Waiting(submit("r", name), "east", 0.0), name, 1, 0.0, 1.0, (1.0,), 1.0, 9.0, 1)
    log.submitted(submit(name, name), 0.0, 0.0)
    log.granted(lease, 3.0, 0.0, 0.0)
    log.finished(name, lease, 0.0)
    assert len(lines) == 3 and all(line.isascii() and "\n" not in line for line in lines)
    assert [event.get("client") for event in lines.events] == [name, name, None]


# -- a run -------------------------------------------------------------------------------------------------------------


def test_one_request_from_its_submit_to_its_end(desk: Desk, log: DecisionLog, lines: Lines) -> None:
    desk.dispatcher = Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=1, log=log)
    router = desk.router()
    router.call(submit("a", "ann", 10, 20))
    desk.clock.advance(0.25)
    replica = desk.replica("r0")
    report = replica.compose(received=("a",), started=("a",), finished=("a",), served={"ann": (10, 7)})
    report.outputs["a"] = 7  # type: ignore[index]
    desk.clock.advance(1.0)
    replica.send(report)
    assert [(event["t"], event["event"]) for event in lines.events] == [
        (1_000.0, "submit"),
        (1_000.25, "grant"),
        (1_001.25, "finish"),
    ]
    _, grant, finish = lines.events
    assert (
        grant.items()
        >= {
            "request": "a",
            "client": "ann",
            "replica": "r0",
            "predicted": 0.0,
            "counter": 10.0,
            "waited_s": 0.25,
        }.items()
    )
    assert finish.items() >= {"request": "a", "output": 7, "started": True}.items()


def test_repeated_calls_and_reports_are_logged_once(desk: Desk, log: DecisionLog, lines: Lines) -> None:
    desk.dispatcher = Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=1, log=log)
    router, replica = desk.router(), desk.replica("r0")
    call = router.compose(submit("a"))
    for _ in range(3):
        desk.dispatcher.route(call, desk.now_s)
    report = replica.compose(received=("a",), started=("a",), finished=("a",), served={"ann": (10, 7)})
    for _ in range(3):
        replica.send(report)
    assert [event["event"] for event in lines.events] == ["submit", "grant", "finish"]


@pytest.mark.parametrize("policy", ["vtc", "rpm", "wsc", "d2lpm"])
@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_a_log_tells_every_submit_grant_refusal_and_finish_of_a_run(lines: Lines, policy: str, loss: float) -> None:
    rng = random.Random(3)
    prediction = "none" if loss else "moving_mean"
    cluster = BatchCluster(
        FairnessConfig(policy=policy, prediction=prediction, rpm_limit=15, throttle=ThrottleConfig(client_limit=5)),
        DispatchConfig(
            lookahead=1, reserve_output_tokens=None, prefix_block_tokens=BLOCK, max_waiting_per_client=12, lease_s=600.0
        ),
        num_replicas=2,
        loss=loss,
        rng=rng,
        log=DecisionLog(lines.append),
    )
    for i in range(60):
        for client in ("ann", "bob", "acme/cyd"):
            if rng.random() < 0.6:
                num_output = rng.randint(1, 12)
                cluster.submit(
                    Job(
                        f"{client}-{i}",
                        client,
                        rng.randint(1, 30),
                        num_output,
                        num_output + 5,
                        application=rng.choice(["", "chat"]),
                        interaction=rng.choice(["", "task"]),
                        call_index=i,
                        prefix=(1, 2, i)[: rng.randrange(4)],
                    )
                )
        cluster.step()
    cluster.run_to_rest()
    events = lines.events
    assert [event["t"] for event in events] == sorted(event["t"] for event in events), "in order"

    refused = {event["request"]: event for event in lines.of("refuse")}
    assert refused.keys() == cluster.refused.keys() and refused
    for request_id, error in cluster.refused.items():
        assert (refused[request_id]["reason"], refused[request_id]["retry_after_s"]) == (
            error.reason,
            error.retry_after_s,
        )

    submitted = {event["request"]: event for event in lines.of("submit")}
    assert submitted.keys() == cluster.jobs.keys() - refused.keys()
    for request_id, event in submitted.items():
        job = cluster.jobs[request_id]
        assert (event["client"], event["input"], event["max_output"]) == (job.client, job.num_input, job.max_output)
        assert event.get("application", "") == job.application
        assert event.get("interaction", "") == job.interaction
        assert tuple(event.get("prefix", ())) == job.prefix

    grants = lines.of("grant")
    assert len(grants) == cluster.dispatcher.num_granted == len(submitted)
    ran = {r: replica.name for replica in cluster.replicas for r in replica.ended}
    assert {event["request"]: event["replica"] for event in grants} == ran

    finished = {event["request"]: event for event in lines.of("finish")}
    assert finished.keys() == submitted.keys()
    assert {r: event["output"] for r, event in finished.items()} == {r: cluster.jobs[r].num_output for r in finished}
    assert all(event["started"] for event in finished.values())


def test_without_a_log_nothing_is_different(lines: Lines) -> None:
    def run(log: DecisionLog | None) -> list[tuple[str, float]]:
        cluster = BatchCluster(num_replicas=2, log=log)
        rng = random.Random(1)
        for i in range(30):
            num_output = rng.randint(1, 12)
            cluster.submit(Job(f"r{i}", rng.choice("abc"), rng.randint(1, 30), num_output, num_output))
            cluster.step()
        cluster.run_to_rest()
        return [(client, cluster.dispatcher.queue.counter(client)) for client in sorted(cluster.clients)]

    assert run(None) == run(DecisionLog(lines.append))
    assert lines
