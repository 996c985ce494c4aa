"""A hundred thousand names that come once: no table anywhere keeps them all."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from fairserve.dispatch.limits import DispatchLimits
from tests.dispatch.growth import Sizes, above, sizes
from tests.dispatch.kit import Desk, submit
from tests.toy_cluster import Shape, ToyCluster, ToyRequest

NUM_NAMES = 100_000
MAX_CLIENTS, KEPT_ACCOUNTS, BATCH = 100, 50, 100
STEP_S = 2.0
"""Of virtual time, so that what is kept for a minute is kept for ten batches."""
LIMIT = 1_500
"""What is at work at the same time, and what is kept, and what came in the last minute; the 64 x 64 leads of a
GapMonitor, and the seconds of a minute, aside."""


def cluster_of(policy: str = "vtc") -> ToyCluster:
    limits = DispatchLimits(max_clients=MAX_CLIENTS, max_waiting=10 * BATCH, lease_s=20.0)
    shape = Shape(slots=BATCH, kv_tokens=10**6)
    cluster = ToyCluster(
        policy,
        shapes=[shape],
        limits=limits,
        prediction="moving_mean",
        kept_accounts=KEPT_ACCOUNTS,
        step_s=STEP_S,
    )
    cluster.dispatcher.usage.max_clients = MAX_CLIENTS
    return cluster


def crowd(cluster: ToyCluster, num_names: int, name: Callable[[int], str], cancel_every: int = 0) -> None:
    """Each name sends one request; of some the caller leaves before, of others while it runs."""
    for start in range(0, num_names, BATCH):
        for i in range(start, start + BATCH):
            cluster.submit(ToyRequest(f"r{i}", name(i), 2, 2, 2))
        for i in range(start, start + BATCH, cancel_every or BATCH + 1):
            cluster.cancel(f"r{i}")
        cluster.step()
        for i in range(start + 1, start + BATCH, cancel_every or BATCH + 1):
            cluster.cancel(f"r{i}")
        while len(cluster.dispatcher.queue) or len(cluster.dispatcher.leases):
            cluster.step()
        for table in (cluster.requests, cluster.granted, cluster.grants, cluster.served):
            table.clear()
        for replica in cluster.replicas.values():
            replica.usage.clear()
            replica.delivered.clear()


def parts(cluster: ToyCluster) -> list[object]:
    replicas = cluster.replicas.values()
    return [cluster.dispatcher, *cluster.routers, *(r.book for r in replicas), *(r.reporter for r in replicas)]


def large(cluster: ToyCluster, limit: int = LIMIT) -> Sizes:
    """Tables with more than so many entries."""
    found = {path: size for part in parts(cluster) for path, size in above(part, limit).items()}
    return {path: size for path, size in found.items() if ".gaps[]._" not in path and "._seconds" not in path}


def test_a_hundred_thousand_names_leave_no_large_table_at_the_authority(make_desk: Callable[..., Desk]) -> None:
    desk = make_desk(max_clients=MAX_CLIENTS, max_waiting=10**6, lookahead=0)
    router, replica = desk.router(), desk.replica(slots=1_000, kv=10**6)
    for start in range(0, NUM_NAMES, 1_000):
        names = tuple(f"name-{i}" for i in range(start, start + 1_000))
        router.call(*(submit(name, name) for name in names))
        replica.totals.clear()  # of names that do not come again
        replica.report(received=names, started=names, served=dict.fromkeys(names, (10, 1)), free_slots=0)
        replica.seq += 1
        desk.dispatcher.report(
            replica_report := replica.compose(finished=names[:900]),
            desk.now_s,
        )
        assert replica_report.totals == {}
        router.call(cancels=names[900:])
        desk.clock.advance(10.0)
        replica.report(finished=names[900:])
        router.call()
        desk.dispatcher.tick(desk.now_s)
    dispatcher = desk.dispatcher
    found = above(dispatcher, 12_000)
    # The voice closes no account: one replica's book is all that there is of a hundred thousand.
    assert found == {"Dispatcher.ledger._books[].totals": NUM_NAMES}
    assert dispatcher.num_forgotten == NUM_NAMES - MAX_CLIENTS
    assert dispatcher.ledger.whole.num_input == 10 * NUM_NAMES, "and every token is counted"


def test_names_leave_no_large_table_at_authority_router_and_replica() -> None:
    cluster = cluster_of()
    crowd(cluster, 6_000, lambda i: f"name-{i}", cancel_every=10)
    cluster.check()
    assert large(cluster) == {}
    assert not cluster.dispatcher.state.idlers.overlooked()
    replica = cluster.replicas["replica-0"]
    assert len(replica.reporter._totals) <= KEPT_ACCOUNTS + 2 * BATCH
    assert len(replica.book._queue.table) <= KEPT_ACCOUNTS + 2 * BATCH


@pytest.mark.parametrize("policy", ["wsc", "drr", "d2lpm", "lcf", "fcfs", "rpm", "round_robin"])
def test_under_no_policy_names_stay(policy: str) -> None:
    cluster = cluster_of(policy)
    crowd(cluster, 2_000, lambda i: f"name-{i}", cancel_every=10)
    cluster.check()
    assert large(cluster) == {}


def test_organisations_and_teams_go_with_their_last_client() -> None:
    cluster = cluster_of()
    crowd(cluster, 3_000, lambda i: f"organisation-{i // 4}/team-{i // 2}/user-{i}")
    cluster.check()
    assert large(cluster) == {}
    assert len(cluster.dispatcher.queue.groups) <= 1 + 2 * MAX_CLIENTS
    assert not cluster.dispatcher.state.idlers.overlooked()


def test_memory_does_not_grow_with_names_that_came_and_went() -> None:
    cluster = cluster_of()
    crowd(cluster, 2_000, lambda i: f"name-{i}", cancel_every=7)
    gc.collect()
    tracemalloc.start()
    try:
        crowd(cluster, 2_000, lambda i: f"later-{i}", cancel_every=7)
        gc.collect()
        (grown, _) = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 2_000 * 700 + 500_000, "path_of and group_of cache 131,072 names, whoever asks"


def test_ten_thousand_requests_that_are_sent_and_cancelled_leave_nothing_behind() -> None:
    cluster = cluster_of()
    crowd(cluster, BATCH, lambda i: "ann")
    before = [sizes(part) for part in parts(cluster)]
    for start in range(0, 10_000, 100):
        for i in range(start, start + 100):
            cluster.submit(ToyRequest(f"gone-{i}", "ann", 5, 10**6, 10**6))
        for when in range(3):  # before it is submitted, once it is granted, while it runs
            for i in range(start + when, start + 100, 3):
                cluster.cancel(f"gone-{i}")
            cluster.step()
        cluster.requests.clear()
    for _ in range(5):
        cluster.step()
    cluster.check()
    dispatcher, replica = cluster.dispatcher, cluster.replicas["replica-0"]
    assert (len(dispatcher.room), len(dispatcher.leases), len(replica.running), len(replica.needs)) == (0, 0, 0, 0)
    assert replica.free_kv_tokens == replica.shape.kv_tokens
    for was, now in zip(before, [sizes(part) for part in parts(cluster)], strict=True):
        assert {path: size for path, size in now.items() if size > was.get(path, 0) + 64} == {}
