"""The fairness bounds, on random runs in which some clients sleep and come back, measured on *delivered* service.

Always-busy clients alone prove little: with the lift deleted they still share evenly.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit
from tests.properties.crowd import Crowd, Habit, Watch
from tests.toy_cluster import Lossy, Perfect, ToyCluster

KV = 120
W_P, W_Q = 1, 2
STEPS = 600
seeds = st.integers(0, 10**6)


def crowd_of_four(rng: random.Random, weights: dict[str, float], cancels: float = 0.0) -> list[Habit]:
    """Two that always wait, one that sleeps long, one that comes by often; lengths differ and may need most of a
    replica's KV cache."""
    a, b, sleeper, visitor = weights
    return [
        Habit(a, weights[a], rng.randint(1, 80), rng.randint(1, 40), cancels=cancels),
        Habit(b, weights[b], rng.randint(1, 80), rng.randint(1, 40)),
        Habit(
            sleeper,
            weights[sleeper],
            rng.randint(1, 80),
            rng.randint(1, 40),
            awake_steps=150,
            sleep_steps=250,
            phase=rng.randrange(400),
        ),
        Habit(
            visitor,
            weights[visitor],
            rng.randint(1, 30),
            rng.randint(1, 20),
            depth=1,
            awake_steps=10,
            sleep_steps=rng.randint(5, 150),
            cancels=cancels,
        ),
    ]


EQUAL = {"ann": 1.0, "bob": 1.0, "sleeper": 1.0, "visitor": 1.0}


def live(
    cluster: ToyCluster, rng: random.Random, weights: dict[str, float] = EQUAL, cancels: float = 0.0, steps: int = STEPS
) -> Watch:
    watch = Watch(cluster, weights)
    Crowd(cluster, crowd_of_four(rng, weights, cancels), rng).run(steps)
    cluster.check()
    assert watch.num_pair_samples > steps, "two clients were waiting"
    return watch


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_two_waiting_clients_stay_within_the_papers_bound_on_one_replica(seed: int) -> None:
    """VTC theorem 4.4. One replica, lookahead 0, a report every step, all of max_tokens reserved. That the counters are
    one step old does not matter: what is in flight shares the KV cache with what runs."""
    rng = random.Random(seed)
    cluster = ToyCluster(num_routers=2, kv_tokens=KV)
    watch = live(cluster, rng)
    longest = max(request.num_input for request, _ in cluster.requests.values())
    paper = 2 * max(W_P * longest, W_Q * KV)
    assert watch.worst_pair <= paper
    assert cluster.dispatcher.bounds.unit <= paper / 2


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    num_replicas=st.integers(1, 4),
    lookahead=st.integers(0, 2),
    report_every=st.integers(1, 5),
    cancels=st.sampled_from([0.0, 0.0, 0.3]),
    loss=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_two_waiting_clients_stay_within_the_reported_bound_on_any_cluster(
    seed: int, num_replicas: int, lookahead: int, report_every: int, cancels: float, loss: float
) -> None:
    rng = random.Random(seed)
    cluster = ToyCluster(
        num_replicas=num_replicas,
        num_routers=2,
        kv_tokens=KV,
        lookahead=lookahead,
        report_every=report_every,
        network=Lossy(rng, loss) if loss else Perfect(),
    )
    watch = live(cluster, rng, cancels=cancels)
    bounds = cluster.dispatcher.bounds
    assert watch.worst_pair <= bounds.bound
    assert watch.worst <= bounds.bound, "and so does the gap that the authority itself sees"
    assert watch.worst_lag <= 3 * (bounds.unit + bounds.staleness)
    assert bounds.unit <= max(W_P, W_Q) * KV * num_replicas, "and the bound says something: U is at most w_q * sum of M"


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_a_waiting_client_falls_behind_no_other_by_more_than_four_units(seed: int) -> None:
    """W_g - W_f <= 4U for backlogged f and any g, asleep or awake. 3 (U + S) is what we derive; both hold."""
    rng = random.Random(seed)
    cluster = ToyCluster(num_routers=2, kv_tokens=KV)
    watch = live(cluster, rng)
    bounds = cluster.dispatcher.bounds
    assert watch.worst_lag <= 4 * W_Q * KV
    assert watch.worst_lag <= 3 * (bounds.unit + bounds.staleness)


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    weights=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=4, max_size=4),
    num_replicas=st.integers(1, 2),
)
def test_weighted_clients_stay_within_the_bound_in_service_per_weight(
    seed: int, weights: list[float], num_replicas: int
) -> None:
    rng = random.Random(seed)
    cluster = ToyCluster(num_replicas=num_replicas, num_routers=2, kv_tokens=KV)
    watch = live(cluster, rng, dict(zip(EQUAL, weights, strict=True)))
    bounds = cluster.dispatcher.bounds
    assert watch.worst_pair <= bounds.bound
    assert watch.worst_lag <= 3 * (bounds.unit + bounds.staleness)
    if num_replicas == 1:
        assert watch.worst_pair <= 2 * W_Q * KV / min(weights)
        assert watch.worst_lag <= 4 * W_Q * KV / min(weights)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, with_snapshot=st.booleans(), num_replicas=st.integers(1, 2))
def test_killing_the_authority_widens_the_gap_by_a_bounded_amount(
    seed: int, with_snapshot: bool, num_replicas: int
) -> None:
    """Before and after, the bound holds; across the crash it holds once more. A newcomer of just before the crash has
    far less in the replicas' totals than the others: it must not get all of that now."""
    rng = random.Random(seed)
    cluster = ToyCluster(num_replicas=num_replicas, num_routers=2, kv_tokens=KV)
    watch = Watch(cluster, {**EQUAL, "late": 1.0})
    crowd = Crowd(cluster, crowd_of_four(rng, EQUAL), rng)
    crowd.run(STEPS)
    crowd.habits.append(Habit("late"))
    crowd.run(30)
    cluster.crash_authority(snapshot=with_snapshot)
    cluster.dispatcher.watch.gaps[""] = watch  # type: ignore[assignment]
    crowd.run(STEPS)
    assert watch.worst_pair <= 2 * 2 * W_Q * KV * num_replicas


@pytest.mark.parametrize("policy", ["lcf", "fcfs"])
def test_the_same_runs_break_the_bound_under_a_policy_without_the_lift_or_without_counters(policy: str) -> None:
    """So the tests above can fail."""
    broken = 0
    for seed in range(5):
        rng = random.Random(seed)
        cluster = ToyCluster(policy, num_routers=2, kv_tokens=KV)
        broken += live(cluster, rng).worst_pair > 2 * W_Q * KV
    assert broken >= 3


def test_charges_that_return_one_after_the_other_are_part_of_the_bound() -> None:
    """Each client in turn is lifted to the level, and then its own input in flight returns and lowers the level for the
    next. The level falls by one charge per client, so the last to come has that much to catch up."""
    desk = Desk()
    router, slow = desk.router(), desk.replica("slow", slots=8)
    chain = [f"x{i}" for i in range(6)]
    router.call(*(submit(f"{client}-early", client, num_input=100, max_output=1) for client in chain))
    slow.report(received=tuple(f"{client}-early" for client in chain), free_slots=0)  # they never start there
    fast = desk.replica("fast", slots=1)
    serve_one_by_one(router, fast, 12, only=("base",))
    router.call(submit("base-last", "base", num_input=100, max_output=1), submit("x0-late", "x0"))
    for client, following in pairwise([*chain, "late"]):
        before = desk.counter(client)
        router.call(cancels=(f"{client}-early",))
        assert desk.counter(client) == before - 100
        router.call(submit(f"{following}-late", following))
        router.call(cancels=(f"{client}-late",))
    serve_one_by_one(router, fast, 12, only=("base", "late"))
    desk.check()
    bounds, worst = desk.dispatcher.bounds, desk.dispatcher.gaps.worst
    assert worst > 2 * (bounds.unit + bounds.staleness - bounds.returned), "what returned is needed"
    assert worst <= bounds.bound


def serve_one_by_one(router: RouterVoice, replica: ReplicaVoice, num: int, only: tuple[str, ...]) -> None:
    """``only`` these clients always wait; ``replica``, with its one slot, runs what it is granted, at once."""
    desk = router.desk
    for i in range(num):
        router.call(*(submit(f"{client}-{replica.seq}-{i}", client, num_input=100, max_output=1) for client in only))
        mine = {r: lease for r, lease in desk.dispatcher.leases.items() if lease.replica == replica.name}
        clients = [lease.waiting.submit.client for lease in mine.values()]
        ids = tuple(mine)
        replica.report(received=ids, started=ids, finished=ids, served=dict.fromkeys(clients, (100, 1)))
    granted = tuple(r for r, lease in desk.dispatcher.leases.items() if lease.replica == replica.name)
    replica.report(received=granted, free_slots=0)
