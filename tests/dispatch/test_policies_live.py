"""Every policy, with every cost function, with and without prediction, as the configuration makes them: on a cluster
with all that can go wrong, everything ends, every invariant holds, and charges equal what was delivered."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import get_args

import pytest

from fairserve.assembly import make_dispatcher
from fairserve.config import CostConfig, DispatchConfig, FairnessConfig, ThrottleConfig
from fairserve.fairness.accounts import account_of
from fairserve.fairness.catalog import POLICIES
from fairserve.fairness.hierarchy import is_group, path_of
from fairserve.fairness.prediction import PREDICTORS
from tests.dispatch.batch_cluster import BLOCK, BatchCluster, Job
from tests.dispatch.kit import Desk, submit

COSTS = ["weighted_tokens", "profiled_quadratic", "kv_token_time"]
CLIENTS = {"ann": 1.0, "bob": 3.0, "acme/cyd": 1.0, "acme/r/dan": 2.0, "sleeper": 1.0}


def config(policy: str, cost: str, prediction: str, **more: object) -> FairnessConfig:
    return FairnessConfig.model_validate(
        {
            "policy": policy,
            "prediction": prediction,
            "rpm_limit": 1_000,
            "quantum": 80.0,
            "replica_quantum": 150.0,
            "locality_window": 4,
            "group_weights": {"acme": 2.0},
            "expected_service": {"chat": 40.0},
            "cost": CostConfig(kind=cost, cached_fraction=0.5),
            **more,
        }
    )


def random_job(rng: random.Random, request_id: str, client: str) -> Job:
    num_input, num_output = rng.randint(1, 40), rng.randint(1, 15)
    return Job(
        request_id,
        client,
        num_input,
        num_output,
        num_output + rng.randint(0, 10),
        CLIENTS[client],
        application=rng.choice(["", "chat", "agent"]),
        interaction=rng.choice(["", "task", f"task-{request_id}"]),
        call_index=rng.randrange(3),
        prefix=tuple(range(1_000 * len(client), 1_000 * len(client) + rng.randrange(num_input // BLOCK + 1))),
        num_cached=rng.choice([0, num_input // 2]),
        foretold=rng.choice([None, 0, num_output, 50]),
    )


def live(cluster: BatchCluster, rng: random.Random, steps: int, rate: float = 0.3) -> None:
    for step in range(steps):
        for client in CLIENTS:
            awake = client != "sleeper" or step % 20 < 5
            if awake and rng.random() < rate:
                cluster.submit(random_job(rng, f"{client}-{cluster.num_steps}", client))
        if cluster.jobs and rng.random() < 0.1:
            cluster.cancel(rng.choice(sorted(cluster.jobs)))
        cluster.step()


def assert_all_ended_and_adds_up(cluster: BatchCluster) -> None:
    dispatcher = cluster.dispatcher
    assert len(dispatcher.queue) == len(dispatcher.leases) == 0
    assert dispatcher.watch.unserved == dispatcher.watch.owed == {}
    ended = {r: s for replica in (*cluster.replicas, *cluster.dead) for r, s in replica.ended.items()}
    for request_id, job in cluster.jobs.items():
        if request_id not in cluster.cancelled | cluster.refused.keys():
            assert len(ended[request_id].output) == job.num_output, request_id
    for client in cluster.clients:
        totals = dispatcher.ledger.totals(client)
        accounts = [account_of(client, application) for application in ("", "chat", "agent")]
        parts = [dispatcher.ledger.accounts()[a] for a in accounts if a in dispatcher.ledger.accounts()]
        assert totals.service == pytest.approx(sum(part.service for part in parts))
        if not cluster.dead:
            usages = [s.usage for s in ended.values() if s.request.client == client]
            assert totals.num_input == sum(usage.num_input for usage in usages)
            assert totals.num_cached == sum(usage.num_cached for usage in usages)
            assert totals.num_output == sum(usage.num_output for usage in usages)
            assert totals.service == pytest.approx(cluster.made(client))


def assert_counters_are_charges(cluster: BatchCluster) -> None:
    """Where nothing is lifted and applications are not priced, a counter is service / weight at every level."""
    dispatcher = cluster.dispatcher
    for node in dispatcher.queue.table:
        below = [c for c in cluster.clients if node in path_of(c)] if is_group(node) else [node]
        service = sum(dispatcher.ledger.totals(client).service for client in below)
        assert dispatcher.queue.counter(node) == pytest.approx(service / dispatcher.queue.table.weight(node)), node


def test_the_configuration_and_the_catalog_name_the_same_policies_and_predictors() -> None:
    fields = FairnessConfig.model_fields
    assert set(get_args(fields["policy"].annotation)) == POLICIES.keys()
    assert set(get_args(fields["prediction"].annotation)) == PREDICTORS.keys()
    assert set(get_args(CostConfig.model_fields["kind"].annotation)) == set(COSTS)


@pytest.mark.parametrize("prediction", ["none", "moving_mean"])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_with_every_cost_serves_all_and_charges_what_it_serves(
    policy: str, cost: str, prediction: str
) -> None:
    rng = random.Random(f"{policy} {cost} {prediction}")
    cluster = BatchCluster(
        config(policy, cost, prediction),
        DispatchConfig(lookahead=1, reserve_output_tokens=rng.choice([None, 3]), prefix_block_tokens=BLOCK),
        num_replicas=2,
        kv_tokens=160,
        loss=rng.choice([0.0, 0.2]),
        report_every=rng.choice([1, 2]),
        rng=rng,
    )
    live(cluster, rng, 40)
    cluster.run_to_rest()
    assert not cluster.refused
    assert_all_ended_and_adds_up(cluster)
    if policy in ("lcf", "fcfs", "rpm", "round_robin"):
        assert_counters_are_charges(cluster)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_survives_dying_replicas_throttling_and_preemption_at_once(policy: str) -> None:
    rng = random.Random(policy)
    cluster = BatchCluster(
        config(
            policy,
            "weighted_tokens",
            "moving_mean",
            throttle=ThrottleConfig(
                client_limit=5, application_limit=3, enter_wait_s=0.2, leave_wait_s=0.1, hold_s=0.1
            ),
        ),
        DispatchConfig(
            lookahead=1, reserve_output_tokens=3, preempt_gap=60.0, prefix_block_tokens=BLOCK, max_waiting_per_client=15
        ),
        num_replicas=3,
        kv_tokens=120,
        slots=2,
        loss=0.1,
        rng=rng,
    )
    for i in range(3):
        live(cluster, rng, 15, rate=0.9)
        cluster.kill(i)
    live(cluster, rng, 15, rate=0.9)
    cluster.run_to_rest()
    assert cluster.refused, "the throttle or a full queue had something to do"
    assert_all_ended_and_adds_up(cluster)


# -- wsc: what an application and an interaction change ----------------------------------------------------------------


GRACE = 500.0


@pytest.fixture
def wsc(make_desk: Callable[..., Desk]) -> Desk:
    """A typical request costs 100; a ``small`` one 10 and a ``large`` one 1,000, as the operator says."""
    desk = make_desk("wsc", lookahead=0)
    expected = {"small": 10.0, "large": 1_000.0}
    fairness = FairnessConfig(policy="wsc", quantum=GRACE, expected_service=expected)
    desk.dispatcher = make_dispatcher(fairness, DispatchConfig(lookahead=0), epoch=1)
    desk.dispatcher.queue.policy.finished("somebody", "", "r9", 10.0, 100.0)
    return desk


@pytest.mark.parametrize(("application", "price"), [("small", 10.0), ("large", 0.1), ("", 1.0), ("unknown", 1.0)])
def test_under_wsc_the_counter_counts_typical_requests_from_the_grant_to_the_end(
    wsc: Desk, application: str, price: float
) -> None:
    router, replica = wsc.router(), wsc.replica("r0")
    router.call(submit("a", "ann", num_input=10, max_output=20, application=application))
    assert wsc.counter("ann") == pytest.approx(10 * price), "the input, when it is picked"
    account = account_of("ann", application)
    replica.report(received=("a",), started=("a",), served={account: (10, 0)})
    assert wsc.counter("ann") == pytest.approx(10 * price), "the same, once it is served"
    replica.report(served={account: (0, 5)})
    assert wsc.counter("ann") == pytest.approx(20 * price)
    assert wsc.dispatcher.ledger.totals("ann").service == 20, "service itself has no price"


def test_under_wsc_applications_of_one_client_are_priced_each_by_itself(wsc: Desk) -> None:
    router, replica = wsc.router(), wsc.replica("r0")
    router.call(submit("a", application="small"), submit("b", application="large"))
    served = {"ann|small": (10, 5), "ann|large": (10, 5)}
    replica.report(received=("a", "b"), started=("a", "b"), served=served)
    assert wsc.counter("ann") == pytest.approx(20 * 10.0 + 20 * 0.1)


def test_under_wsc_an_interaction_under_way_goes_first_within_the_grace_and_until_it_is_idle(wsc: Desk) -> None:
    router, replica = wsc.router(), wsc.replica("r0", slots=1)

    def picks(num: int) -> list[str]:
        """One after the other through the only slot, a hundred tokens each."""
        found = []
        for _ in range(num):
            replica.report()
            (request_id,) = wsc.dispatcher.leases
            client = wsc.dispatcher.leases.get(request_id).waiting.submit.client  # type: ignore[union-attr]
            done = {"received": (request_id,), "started": (request_id,), "finished": (request_id,)}
            replica.report(**done, served={client: (100, 0)}, free_slots=0)
            found.append(client)
        return found

    replica.report(free_slots=0)
    calls = [submit(f"z{i}", "zoe", interaction="task", call_index=i) for i in range(12)]
    router.call(*calls, *(submit(f"a{i}", "ann") for i in range(12)))
    counters = []
    while picks(1) == ["zoe"]:
        counters.append(wsc.counter("zoe"))
    assert len(counters) > 3 and counters[-2] < GRACE <= counters[-1], "past the grace it is ann's turn"
    for _ in range(14):
        wsc.clock.advance(5.0)
        replica.report(free_slots=0)
        router.poll()
        wsc.dispatcher.tick(wsc.now_s)
    assert wsc.dispatcher.queue.is_under_way("zoe"), "calls of it still wait"
    router.call(cancels=tuple(f"z{i}" for i in range(12)))
    wsc.clock.advance(2.0)
    for _ in range(14):
        wsc.clock.advance(5.0)
        replica.report(free_slots=0)
        router.poll()
        wsc.dispatcher.tick(wsc.now_s)
    assert not wsc.dispatcher.queue.is_under_way("zoe")
