"""Crashes, losses and partitions in the simulated cluster: what is lost, what goes on, and that charges stay right."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fairserve.assembly import make_local_book
from fairserve.config import FairnessConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest
from fairserve.simulate.cluster import ClusterSetup, Fault, SimCluster, simulate
from fairserve.simulate.records import Arrival, RunRecord
from tests.simulate.cluster_kit import cluster, crowd, one, outcomes, served, stream

STORMS: dict[str, tuple[Fault, ...]] = {
    "calm": (),
    "replicas": (
        Fault(1.0, "replica_crash", "replica-0"),
        Fault(3.0, "replica_return", "replica-0"),
        Fault(3.5, "replica_crash", "replica-1"),
    ),
    "all replicas": (
        *(Fault(2.0, "replica_crash", f"replica-{i}") for i in range(3)),
        *(Fault(3.0, "replica_return", f"replica-{i}") for i in range(3)),
    ),
    "actor, without snapshot": (Fault(2.0, "actor_crash", with_snapshot=False),),
    "actor, twice": (Fault(2.0, "actor_crash"), Fault(5.0, "actor_crash")),
    "partitions": (
        Fault(1.0, "partition", "replica-0"),
        Fault(2.0, "partition", "router-1"),
        Fault(4.0, "heal", "replica-0"),
        Fault(6.0, "heal", "router-1"),
    ),
    "everything": (
        Fault(1.0, "partition", "replica-2"),
        Fault(2.0, "replica_crash", "replica-2"),
        Fault(2.0, "actor_crash"),
        Fault(2.5, "replica_crash", "replica-0"),
        Fault(2.5, "replica_return", "replica-2"),
        Fault(4.0, "heal", "replica-2"),
        Fault(4.0, "replica_return", "replica-0"),
        Fault(5.0, "actor_crash", with_snapshot=False),
    ),
}


def stormy(storm: str, seed: int, **more: object) -> ClusterSetup:
    numbers: dict[str, object] = {
        "num_replicas": 3,
        "num_ingress": 2,
        "jitter": 0.1,
        "loss": (0.0, 0.2)[seed % 2],
        "network_delay_s": (0.0, 0.001, 0.05)[seed % 3],
        "dispatch": {"lookahead": seed % 3, "reserve_output_tokens": (None, 5)[seed % 2]},
    }
    return cluster(seed=seed, faults=STORMS[storm], **{**numbers, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("storm", STORMS)
def test_charges_are_what_was_delivered_and_nothing_waits_for_ever(storm: str, seed: int) -> None:
    """``check`` compares requests, replicas and the authority's ledger, to the token."""
    record = simulate(stormy(storm, seed), crowd(seed), check=True)
    assert {request.reason for request in record.requests if request.outcome == "unfinished"} <= {"replica_failed"}


def test_an_authority_that_is_gone_when_the_run_ends_learns_all_afterwards() -> None:
    faults = (Fault(1.0, "actor_crash"),)
    setup = cluster(num_replicas=2, faults=faults, actor_restart_s=1_000.0)
    record = simulate(setup, crowd(4), check=True)
    assert "unfinished" not in outcomes(record)


class Cheating(LocalBook[GenerateRequest]):
    """Charges nothing for the third token of anybody."""

    def output(self, request_id: str, num_tokens: int) -> None:
        if self._open[request_id].num_output != 2 or not self._open[request_id].num_input:
            super().output(request_id, num_tokens)
        else:
            self._open[request_id].num_output += 1


def test_a_token_that_was_not_charged_is_found() -> None:
    config = FairnessConfig()
    book = make_local_book(config)
    setup = cluster(make_book=lambda: Cheating(book._queue.policy, book._cost))
    with pytest.raises(AssertionError, match="delivered"):
        simulate(setup, [one()], check=True)


# -- replicas ----------------------------------------------------------------------------------------------------------


def after_the_crash(placement: str) -> RunRecord:
    """Twelve requests at once on two replicas of four slots; one replica dies in the middle of its fifth step or so."""
    arrivals = [one(f"r{i}", num_output=30, max_output=30) for i in range(12)]
    faults = (Fault(0.15, "replica_crash", "replica-0"),)
    return simulate(cluster(num_replicas=2, faults=faults, placement=placement), arrivals, check=True)


@pytest.mark.parametrize("placement", ["central", "round_robin", "least_loaded", "d2lpm"])
def test_a_crash_loses_what_runs_and_no_request_that_never_started(placement: str) -> None:
    record = after_the_crash(placement)
    lost = [request for request in record.requests if request.outcome == "unfinished"]
    assert len(lost) == 4, "one per slot"
    assert all(request.num_output > 0 and request.reason == "replica_failed" for request in lost)
    assert outcomes(record) == {"finished": 8, "unfinished": 4}


def test_a_replica_that_returns_serves_again() -> None:
    faults = (Fault(1.0, "replica_crash", "replica-0"), Fault(5.0, "replica_return", "replica-0"))
    record = simulate(cluster(faults=faults), stream("ann", 20, 0.5), check=True)
    done = [request.finished_s for request in record.requests if request.finished_s is not None]
    assert len(done) >= 19
    assert not any(1.0 < at_s < 5.0 for at_s in done)
    assert max(done) > 5.0


def test_dead_replicas_are_not_idle_capacity() -> None:
    faults = (Fault(0.0, "replica_crash", "replica-0"), Fault(3.0, "replica_return", "replica-0"))
    record = simulate(cluster(faults=faults), [one(at_s=0.5)], check=True)
    assert outcomes(record) == {"finished": 1}
    assert record.idle_while_waiting_s < 0.2


# -- the authority -----------------------------------------------------------------------------------------------------


def test_service_goes_on_while_the_authority_is_gone() -> None:
    setup = cluster(num_replicas=2, faults=(Fault(2.0, "actor_crash"),), actor_restart_s=3.0)
    record = simulate(setup, stream("ann", 60, 0.1), check=True)
    assert outcomes(record) == {"finished": 60}
    started = [request.first_token_s for request in record.requests if request.first_token_s is not None]
    assert sum(2.3 < at_s < 5.0 for at_s in started) >= 20


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_debt_outlives_the_authority_only_by_a_snapshot(with_snapshot: bool) -> None:
    """Greedy is served alone for a while; then the authority dies, and modest, which it knew, asks for more."""
    faults = (Fault(5.5, "actor_crash", with_snapshot=with_snapshot),)
    setup = cluster("lcf", faults=faults, duration_s=10.0, actor_restart_s=0.2)
    more = [replace(arrival, arrival_s=arrival.arrival_s + 6.0) for arrival in stream("modest", 200, 0.02)]
    record = simulate(setup, [one("hello", "modest"), *stream("greedy", 400, 0.02), *more], check=True)
    gain = {
        client: served(record, 10.0)[client] - served(record, 8.0).get(client, 0.0) for client in ("greedy", "modest")
    }
    if with_snapshot:
        assert gain["greedy"] == 0.0, "lcf: modest has all to catch up"
    else:
        assert gain["greedy"] > 0.7 * gain["modest"], "both began level"


def test_lost_calls_are_made_again() -> None:
    record = simulate(cluster(num_replicas=2, num_ingress=2, loss=0.5), crowd(3, cancels=0.0), check=True)
    assert outcomes(record) == {"finished": 150}


# -- partitions --------------------------------------------------------------------------------------------------------


def granted_between(record: RunRecord, ingress: int, start_s: float, end_s: float) -> int:
    return sum(
        request.granted_s is not None and start_s < request.granted_s < end_s
        for request in record.requests
        if request.arrival.ingress == ingress
    )


def two_streams() -> list[Arrival]:
    return stream("ann", 80, 0.1, ingress=0) + stream("bob", 80, 0.1, ingress=1)


def test_a_router_without_the_authority_sends_its_requests_on_by_itself() -> None:
    faults = (Fault(2.0, "partition", "router-1"), Fault(6.0, "heal", "router-1"))
    setup = cluster(num_replicas=4, num_ingress=2, faults=faults)
    record = simulate(setup, two_streams(), check=True)
    assert outcomes(record) == {"finished": 160}
    assert granted_between(record, 1, 2.0, 2.8) == 0, "it takes a time-out to find out"
    assert granted_between(record, 1, 3.0, 6.0) >= 25


def test_what_was_sent_without_a_grant_comes_back_to_the_clusters_queue() -> None:
    """Greedy's flood was let through while its router was alone; when the authority answers again, what has not started
    makes way for modest."""
    faults = (Fault(0.5, "partition", "router-0"), Fault(2.0, "heal", "router-0"))
    flood = [one(f"flood-{i}", "greedy", 1.0, num_output=100, max_output=100, ingress=0) for i in range(40)]
    modest = [one("modest", "modest", 3.5, ingress=1)]
    cluster_of_one = SimCluster(cluster(faults=faults, num_ingress=2), flood + modest)
    cluster_of_one.run()
    by_id = {request.arrival.request_id: request for request in cluster_of_one.records}
    assert all(request.outcome == "finished" for request in by_id.values())
    modest_s = by_id["modest"].finished_s
    assert modest_s is not None
    assert sum(request.finished_s < modest_s for request in by_id.values() if request.finished_s) < 16
    cluster_of_one.check()


def test_each_time_that_it_comes_back_it_may_stay_twice_as_long() -> None:
    """Its router never reaches the authority, its replica always does."""
    long = [one(f"long-{i}", num_output=300, max_output=300) for i in range(4)]
    faults = (Fault(0.5, "partition", "router-0"),)
    run = SimCluster(cluster(faults=faults), [*long, one("kept", at_s=1.6)])
    sent: list[float] = []
    send = run.send
    run.send = lambda live, replica, **more: (sent.append(run.timeline.now_s), send(live, replica, **more))  # type: ignore
    run.run()
    stays = [later - earlier for earlier, later in itertools.pairwise(sent[4:])]
    assert stays == pytest.approx([1.0, 2.0], abs=0.1)
    assert outcomes(run.record()) == {"finished": 5}


def test_a_replica_cut_off_gets_nothing_new_and_its_charges_arrive_later() -> None:
    faults = (Fault(1.0, "partition", "replica-1"), Fault(20.0, "heal", "replica-1"))
    setup = cluster(num_replicas=2, faults=faults)
    record = simulate(setup, stream("ann", 120, 0.2), check=True)
    assert outcomes(record) == {"finished": 120}
    there = [request.granted_s for request in record.requests if request.replica == "replica-1" and request.granted_s]
    assert not any(7.0 < at_s < 20.0 for at_s in there), "stale after 5 s"
    assert any(at_s > 20.0 for at_s in there)
