"""A hundred thousand names that come once: no table anywhere keeps them all."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from fairserve.dispatch.limits import DispatchLimits
from tests.dispatch.growth import above, sizes
from tests.toy_cluster import Shape, ToyCluster, ToyRequest

NUM_NAMES = 100_000
MAX_CLIENTS, KEPT_ACCOUNTS = 500, 200
BATCH = 500
LIMIT = 4_200
"""What is at work at the same time, and what is kept, a few times over; a leak of one entry for every name is 100,000,
of one for every twentieth 5,000."""


def cluster_of(policy: str = "vtc", prediction: str = "moving_mean") -> ToyCluster:
    limits = DispatchLimits(max_clients=MAX_CLIENTS, max_waiting=10 * BATCH)
    shape = Shape(slots=BATCH, kv_tokens=10**6)
    return ToyCluster(policy, shapes=[shape], limits=limits, prediction=prediction, kept_accounts=KEPT_ACCOUNTS)


def crowd(cluster: ToyCluster, num_names: int, name: Callable[[int], str], cancel_every: int = 0) -> None:
    """Each name sends one request; of some the caller leaves before, of others while it runs."""
    for start in range(0, num_names, BATCH):
        for i in range(start, start + BATCH):
            cluster.submit(ToyRequest(f"r{i}", name(i), 2, 2, 2))
        if cancel_every:
            for i in range(start, start + BATCH, cancel_every):
                cluster.cancel(f"r{i}")
        cluster.step()
        if cancel_every:
            for i in range(start + 1, start + BATCH, cancel_every):
                cluster.cancel(f"r{i}")
        while len(cluster.dispatcher.queue) or len(cluster.dispatcher.leases):
            cluster.step()
        cluster.requests.clear()
        cluster.granted.clear()
        cluster.grants.clear()
        for table in (cluster.served, *(r.delivered for r in cluster.replicas.values())):
            table.clear()
        for replica in cluster.replicas.values():
            replica.usage.clear()


def parts(cluster: ToyCluster) -> list[object]:
    replicas = cluster.replicas.values()
    return [cluster.dispatcher, *cluster.routers, *(r.book for r in replicas), *(r.reporter for r in replicas)]


def test_a_hundred_thousand_names_leave_no_large_table_anywhere() -> None:
    cluster = cluster_of()
    crowd(cluster, NUM_NAMES, lambda i: f"name-{i}")
    cluster.check()
    assert [above(part, LIMIT) for part in parts(cluster)] == [{}] * 4
    assert cluster.dispatcher.num_forgotten >= NUM_NAMES - MAX_CLIENTS - 1
    whole = cluster.dispatcher.ledger.whole
    assert (whole.num_input, whole.num_output) == (2 * NUM_NAMES, 2 * NUM_NAMES), "and every token is counted"


@pytest.mark.parametrize("policy", ["wsc", "drr", "d2lpm", "lcf", "fcfs", "rpm", "round_robin"])
def test_under_no_policy_names_stay(policy: str) -> None:
    cluster = cluster_of(policy)
    crowd(cluster, 5_000, lambda i: f"name-{i}", cancel_every=10)
    for _ in range(1_300 if policy == "rpm" else 30):  # rpm remembers a minute
        cluster.step()
    crowd(cluster, BATCH, lambda i: f"later-{i}")
    cluster.check()
    assert [above(part, LIMIT) for part in parts(cluster)] == [{}] * 4


def test_organisations_and_teams_go_with_their_last_client() -> None:
    cluster = cluster_of()
    crowd(cluster, 5_000, lambda i: f"organisation-{i // 4}/team-{i // 2}/user-{i}")
    cluster.check()
    assert [above(part, LIMIT) for part in parts(cluster)] == [{}] * 4
    assert len(cluster.dispatcher.watch.bounds) <= 3 * MAX_CLIENTS


def test_memory_does_not_grow_with_names_that_came_and_went() -> None:
    cluster = cluster_of()
    crowd(cluster, 5_000, lambda i: f"name-{i}", cancel_every=7)
    gc.collect()
    tracemalloc.start()
    try:
        crowd(cluster, 4_000, lambda i: f"later-{i}", cancel_every=7)
        gc.collect()
        (grown, _) = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    caches = 4_000 * 700  # path_of and group_of remember 131,072 names, whoever asks
    print(grown)
    assert grown < caches + 1_000_000


def test_ten_thousand_requests_that_are_sent_and_cancelled_leave_nothing_behind() -> None:
    cluster = cluster_of()
    crowd(cluster, BATCH, lambda i: "ann")
    before = [sizes(part) for part in parts(cluster)]
    for start in range(0, 10_000, 100):
        for i in range(start, start + 100):
            cluster.submit(ToyRequest(f"gone-{i}", "ann", 5, 10**6, 10**6))
        for i in range(start, start + 100, 3):
            cluster.cancel(f"gone-{i}")
        cluster.step()
        for i in range(start + 1, start + 100, 3):
            cluster.cancel(f"gone-{i}")
        cluster.step()
        for i in range(start + 2, start + 100, 3):
            cluster.cancel(f"gone-{i}")
        cluster.step()
        cluster.requests.clear()
    for _ in range(5):
        cluster.step()
    cluster.check()
    dispatcher, replica = cluster.dispatcher, cluster.replicas["replica-0"]
    assert (len(dispatcher.room), len(dispatcher.leases), len(replica.running), len(replica.needs)) == (0, 0, 0, 0)
    assert replica.free_kv_tokens == replica.shape.kv_tokens
    after = [sizes(part) for part in parts(cluster)]
    for was, now in zip(before, after, strict=True):
        assert {path: size for path, size in now.items() if size > was.get(path, 0) + 64} == {}
