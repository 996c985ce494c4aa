"""Organisations and teams on a whole cluster: one share per tenant, a bound per group, and a restart in between."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.assembly import make_dispatcher
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.dispatch.status import status
from fairserve.fairness.hierarchy import path_of
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job
from tests.dispatch.kit import Desk, submit


def keep_busy(cluster: BatchCluster, clients: list[str], rng: random.Random, depth: int = 2) -> None:
    """Tops everybody's backlog up."""
    for client in clients:
        for _ in range(depth - cluster.dispatcher.queue.backlog.num_waiting(client)):
            num_output = rng.randint(1, 12)
            request_id = f"{client}-{len(cluster.jobs)}"
            cluster.submit(Job(request_id, client, rng.randint(1, 30), num_output, num_output + rng.randint(0, 4)))


@pytest.mark.parametrize("prediction", ["none", "moving_mean"])
@pytest.mark.parametrize("num_keys", [1, 7, 40])
def test_a_tenant_with_k_keys_gets_one_share_of_what_the_cluster_serves(num_keys: int, prediction: str) -> None:
    rng = random.Random(num_keys)
    cluster = BatchCluster(FairnessConfig(prediction=prediction), num_replicas=2, rng=rng)
    keys = [f"acme/key{i}" for i in range(num_keys)]
    for _ in range(250):
        keep_busy(cluster, [*keys, "modest"], rng, depth=10)
        cluster.step()
    tenant = sum(cluster.made(key) for key in keys)
    assert cluster.made("modest") == pytest.approx(tenant, rel=0.07)


TREE = ["acme/r/ann", "acme/r/bob", "acme/s/cyd", "zeta/dan", "zeta/eve", "solo"]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prediction=st.sampled_from(["none", "moving_mean", "foretold"]),
    num_replicas=st.integers(1, 3),
    loss=st.sampled_from([0.0, 0.2]),
)
def test_every_group_keeps_its_own_bound(seed: int, prediction: str, num_replicas: int, loss: float) -> None:
    rng = random.Random(seed)
    cluster = BatchCluster(
        FairnessConfig(prediction=prediction, group_weights={"acme": 2.0, "acme/r": 3.0}),
        DispatchConfig(lookahead=1, reserve_output_tokens=rng.choice([None, 3]), prefix_block_tokens=BLOCK),
        num_replicas=num_replicas,
        kv_tokens=120,
        slots=3,
        loss=loss,
        rng=rng,
    )
    for step in range(80):
        keep_busy(
            cluster, [c for i, c in enumerate(TREE) if (step // 15 + i) % 4], rng
        )  # everybody sleeps now and then
        cluster.step()
    now = status(cluster.dispatcher, cluster.now_s)
    assert now["worst_gap_by_group"].keys() == {"", "acme/", "acme/r/", "acme/s/", "zeta/"}
    for group, worst in now["worst_gap_by_group"].items():
        assert worst <= now["bounds_by_group"][group] + 1e-6
    assert min(now["worst_gap_by_group"][group] for group in ("", "acme/", "acme/r/", "zeta/")) > 0


def test_a_tree_survives_a_restart(desk: Desk) -> None:
    desk.dispatcher = make_dispatcher(
        FairnessConfig(group_weights={"acme": 2.0, "zeta": 5.0}), DispatchConfig(lookahead=0), epoch=1
    )
    router, replica = desk.router(), desk.replica("r0", slots=8)
    for i, client in enumerate(TREE):
        router.call(submit(f"r{i}", client))
        served = {client: (10, i)}
        replica.report(received=(f"r{i}",), started=(f"r{i}",), finished=(f"r{i}",), served=served)
    replica.report(free_slots=0)
    router.call(submit("waits", "zeta/eve"), submit("waits-too", "acme/r/bob"))
    router.call(cancels=("waits",))
    old = desk.dispatcher
    data = old.dump()
    new = make_dispatcher(
        FairnessConfig(group_weights={"acme": 2.0, "zeta": 1.0}), DispatchConfig(lookahead=0), epoch=2
    )
    new.load(data)
    nodes = {node for client in TREE for node in path_of(client)}
    base = min(old.queue.counter(node) for node in nodes)
    assert {node: new.queue.counter(node) for node in nodes} == {node: old.queue.counter(node) - base for node in nodes}
    assert new.queue.table.weight("acme/") == 2.0
    assert new.queue.table.weight("zeta/") == 1.0, "weights of groups are those of the new settings"
    assert new.queue.groups["zeta/"].last_to_leave == "zeta/eve"
    assert new.queue.groups["acme/r/"].last_to_leave == "acme/r/bob", "who waited then, and was the least served"
    for client in ("zeta/new", "acme/r/new"):
        new.queue.arrive(client, client, None, 0.0)  # type: ignore[arg-type]
        reference = client.replace("new", "eve" if "zeta" in client else "bob")
        assert new.queue.counter(client) == new.queue.counter(reference)
    new.queue.check()
