"""The protocol between routers, authority and replicas: loss, repeats and crashes at any point change no total."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy_cluster import Lossy, ToyCluster, ToyRequest

CLIENTS = ("ann", "bob", "cyd")


def random_life(cluster: ToyCluster, rng: random.Random, steps: int, crashes: bool, cancels: bool) -> None:
    for _ in range(steps):
        for _ in range(rng.randrange(3)):
            output = rng.randrange(1, 8)
            name, client, num_input = f"r{len(cluster.requests)}", rng.choice(CLIENTS), rng.randrange(1, 30)
            request = ToyRequest(name, client, num_input, output, output + rng.randrange(4))
            cluster.submit(request, router=rng.randrange(len(cluster.routers)))
        if cancels and cluster.requests and rng.random() < 0.3:
            cluster.cancel(rng.choice(list(cluster.requests)))
        if crashes and rng.random() < 0.05:
            cluster.crash_authority(snapshot=rng.random() < 0.5)
        cluster.step()
        cluster.check()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from([0.0, 0.1, 0.5]),
    crashes=st.booleans(),
    cancels=st.booleans(),
    policy=st.sampled_from(["vtc", "fcfs", "lcf"]),
    lookahead=st.integers(0, 2),
)
def test_every_token_is_merged_exactly_once_whatever_is_lost_repeated_or_restarted(
    seed: int, loss: float, crashes: bool, cancels: bool, policy: str, lookahead: int
) -> None:
    rng = random.Random(seed)
    network = Lossy(rng, loss)
    cluster = ToyCluster(policy, num_replicas=2, num_routers=2, lookahead=lookahead, network=network, step_s=0.3)
    random_life(cluster, rng, 60, crashes, cancels)
    cluster.run_until_quiet()
    cluster.check()
    for client in CLIENTS:
        totals = cluster.dispatcher.ledger.totals(client)
        assert (totals.num_input, totals.num_output) == cluster.told(client)
        assert totals.service == totals.num_input + 2 * totals.num_output


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), loss=st.sampled_from([0.0, 0.3]))
def test_every_request_runs_exactly_once(seed: int, loss: float) -> None:
    rng = random.Random(seed)
    cluster = ToyCluster(num_replicas=3, num_routers=2, lookahead=1, network=Lossy(rng, loss), step_s=0.5)
    random_life(cluster, rng, 50, crashes=True, cancels=False)
    cluster.run_until_quiet()
    ran = [request_id for request_id, _ in cluster.granted]
    assert sorted(ran) == sorted(cluster.requests)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_lifts_a_counter_is_exactly_the_service_received(seed: int) -> None:
    rng = random.Random(seed)
    cluster = ToyCluster("lcf", num_replicas=2, num_routers=2, lookahead=1, network=Lossy(rng, 0.2), step_s=0.3)
    random_life(cluster, rng, 60, crashes=False, cancels=True)
    cluster.run_until_quiet()
    for client in CLIENTS:
        assert abs(cluster.dispatcher.queue.counter(client) - cluster.dispatcher.ledger.totals(client).service) < 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_dead_replica_loses_no_request_that_it_never_confirmed(seed: int) -> None:
    rng = random.Random(seed)
    cluster = ToyCluster(num_replicas=2, num_routers=1, lookahead=1, step_s=0.5)
    random_life(cluster, rng, 20, crashes=False, cancels=False)
    cluster.kill_replica("replica-1")
    random_life(cluster, rng, 20, crashes=False, cancels=False)
    cluster.run_until_quiet()
    dead = cluster.replicas["replica-1"]
    lost = set(dead.running) | set(dead.needs)
    ran = {request_id for request_id, _ in cluster.granted}
    assert ran == set(cluster.requests)
    done = {r for replica in cluster.replicas.values() for r in replica.usage}
    assert done | lost >= set(cluster.requests)
