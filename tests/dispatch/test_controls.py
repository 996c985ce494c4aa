"""What an operator sets live: weights, pauses, limits. Nothing is lost, nothing is charged twice, bounds stay."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from fairserve.dispatch.controls import NO_CONTROL, Control, Controls
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.errors import ClientQueueFull, ClientRateLimited, ClusterQueueFull
from fairserve.fairness.catalog import make_policy
from tests.dispatch.kit import Desk, submit
from tests.properties.crowd import Crowd, Habit
from tests.toy_cluster import Lossy, ToyCluster

MakeDesk = Callable[..., Desk]


def put(desk: Desk, client: str, **change: Any) -> None:
    controls = desk.dispatcher.controls
    desk.dispatcher.control(client, controls.of(client).with_changes(change), desk.now_s)
    desk.check()


# -- the values --------------------------------------------------------------------------------------------------------


def test_none_takes_a_field_back_and_the_others_stay() -> None:
    control = NO_CONTROL.with_changes({"weight": 4.0, "is_paused": True, "max_waiting": 3})
    control = control.with_changes({"weight": None, "is_paused": None})
    assert control == Control(max_waiting=3)
    assert control.dump() == {"max_waiting": 3}


def test_controls_come_back_as_they_were_dumped() -> None:
    controls, again = Controls(), Controls()
    controls.put("ann", Control(weight=2.0, is_paused=True))
    controls.put("bob", Control(requests_per_min=7))
    controls.put("bob", NO_CONTROL)
    again.load(controls.dump())
    assert list(again) == ["ann"]
    assert again.of("ann") == Control(weight=2.0, is_paused=True)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_live_weight_holds_from_the_next_pick_and_above_what_requests_carry(desk: Desk) -> None:
    router = desk.router()
    desk.replica(slots=2)
    put(desk, "ann", weight=4.0)
    router.call(submit("a", "ann", 40, weight=1.0), submit("b", "bob", 40, weight=1.0))
    assert (desk.counter("ann"), desk.counter("bob")) == (10, 40)
    put(desk, "ann", weight=None)
    assert desk.dispatcher.queue.table.weight("ann") == 1.0, "as its requests carry"


def test_a_weight_that_requests_carried_meanwhile_comes_back_when_the_live_one_goes(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a", "ann", weight=2.0))
    put(desk, "ann", weight=8.0)
    router.call(submit("b", "ann", weight=3.0))
    assert desk.dispatcher.queue.table.weight("ann") == 8.0
    put(desk, "ann", weight=None)
    assert desk.dispatcher.queue.table.weight("ann") == 3.0


@pytest.mark.parametrize(("before", "after"), [(1.0, 4.0), (4.0, 1.0)])
def test_what_was_received_stays_and_what_is_on_its_way_counts_at_the_new_weight(
    desk: Desk, before: float, after: float
) -> None:
    router, replica = desk.router(), desk.replica(slots=2)
    router.call(submit("a", "ann", 40, 20, weight=before), submit("w", "ann", 8, 4, weight=before))
    replica.report(received=("a",), started=("a",), served={"ann": (40, 0)}, free_slots=0)
    served = 40 / before
    assert desk.counter("ann") == served + 8 / before
    put(desk, "ann", weight=after)
    assert desk.counter("ann") == pytest.approx(served + 8 / after)
    assert desk.dispatcher.watch.unserved["ann"] == pytest.approx(8 / after)
    replica.report(received=("w",), started=("w",), served={"ann": (8, 10)}, finished=("a", "w"))
    assert desk.counter("ann") == pytest.approx(served + (8 + 20) / after)
    assert not desk.dispatcher.watch.unserved and not desk.dispatcher.watch.owed


def test_the_bound_covers_what_a_lighter_client_may_still_receive(desk: Desk) -> None:
    """At weight 8 it owes 25; at weight 1 it owes 200, and no pick will tell U of it."""
    router = desk.router()
    desk.replica(slots=1)
    router.call(submit("a", "ann", 80, 100, weight=8.0), submit("b", "bob", 8, 1))
    assert desk.dispatcher.bounds.unit < 200
    put(desk, "ann", weight=1.0)
    assert desk.dispatcher.bounds.unit >= 200


def test_a_level_that_falls_with_a_counter_is_a_return_like_any_other(desk: Desk) -> None:
    router = desk.router()
    desk.replica(slots=1)
    router.call(submit("a", "ann", 40, 20), submit("a2", "ann"))
    assert (desk.dispatcher.queue.level(), desk.dispatcher.bounds.returned) == (40, 0)
    put(desk, "ann", weight=4.0)
    assert (desk.dispatcher.queue.level(), desk.dispatcher.bounds.returned) == (10, 30)


def test_a_snapshot_keeps_the_weight_of_the_key_and_the_next_life_sets_the_live_one_over_it(desk: Desk) -> None:
    desk.router().call(submit("a", "ann", weight=2.0))
    put(desk, "ann", weight=8.0)
    data, controls = desk.dispatcher.dump(), desk.dispatcher.controls
    assert data["counters"]["ann"][1] == 2.0
    old, desk.dispatcher = (
        desk.dispatcher,
        Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=2, controls=controls),
    )
    desk.dispatcher.load(data)
    assert old is not desk.dispatcher
    assert desk.dispatcher.queue.table.weight("ann") == 8.0
    put(desk, "ann", weight=None)
    assert desk.dispatcher.queue.table.weight("ann") == 2.0


def test_four_times_the_weight_is_four_times_the_service_from_then_on() -> None:
    cluster = ToyCluster(slots=2)
    crowd = Crowd(cluster, [Habit("ann", depth=6), Habit("bob", depth=6)], random.Random(1))

    def shares(num_steps: int) -> float:
        before = [cluster.delivered(client) for client in ("ann", "bob")]
        crowd.run(num_steps)
        ann, bob = (cluster.delivered(c) - was for c, was in zip(("ann", "bob"), before, strict=True))
        return ann / bob

    assert shares(1_500) == pytest.approx(1.0, abs=0.15)
    cluster.dispatcher.control("ann", Control(weight=4.0), cluster.now_s)
    assert shares(1_500) == pytest.approx(4.0, abs=0.5)


# -- pauses ------------------------------------------------------------------------------------------------------------


def test_a_paused_client_waits_and_comes_back_in_its_order_with_its_waiting_time(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a1"))
    desk.clock.advance(1.0)
    router.call(submit("a2"))
    put(desk, "ann", is_paused=True)
    desk.clock.advance(1.0)
    router.call(submit("a3"), submit("b1", "bob"))
    replica = desk.replica(slots=1)
    router.poll()
    assert list(router.granted) == ["b1"]
    assert desk.dispatcher.room.num_waiting("ann") == 3 and not desk.dispatcher.queue.is_waiting("ann")
    put(desk, "ann", is_paused=None)
    waits: dict[str, float] = {}
    for request_id in ("b1", "a1", "a2", "a3"):
        replica.report(received=(request_id,), started=(request_id,), finished=(request_id,))
        waits.update({grant.request_id: grant.waited_s for grant in router.poll().grants})
    assert waits == {"a1": 2.0, "a2": 1.0, "a3": 0.0}
    assert list(router.granted) == ["b1", "a1", "a2", "a3"]


def test_what_a_paused_client_runs_goes_on_and_is_charged(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a1"))
    put(desk, "ann", is_paused=True)
    replica.report(received=("a1",), started=("a1",), served={"ann": (10, 5)})
    assert desk.num_leases == 1 and desk.counter("ann") == 20


def test_a_resumed_client_is_lifted_like_a_newcomer(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a1", "ann"), submit("b1", "bob"), submit("b2", "bob"))
    put(desk, "bob", is_paused=True)
    replica.report(received=("a1",), started=("a1",), served={"ann": (10, 45)}, free_slots=0)
    router.call(submit("a2", "ann"))
    put(desk, "bob", is_paused=None)
    assert desk.counter("bob") == desk.counter("ann") == 100
    assert desk.dispatcher.num_lifts == 1


def test_paused_requests_can_be_cancelled_and_leave_with_their_router(desk: Desk) -> None:
    east, west = desk.router("east"), desk.router("west")
    put(desk, "ann", is_paused=True)
    east.call(submit("e1"), submit("e2"))
    west.call(submit("w1"))
    east.call(cancels=("e1",))
    assert desk.dispatcher.room.num_waiting("ann") == 2
    desk.clock.advance(15)
    east.poll()
    desk.wait(10)
    assert [w.submit.request_id for w in [desk.dispatcher.room.first("ann")] if w] == ["e2"]
    assert len(desk.dispatcher.room) == 1


def test_a_grant_that_lapses_while_its_client_is_paused_waits_aside(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a1"))
    put(desk, "ann", is_paused=True)
    desk.clock.advance(3)
    router.poll()
    desk.clock.advance(3)
    replica.report()
    desk.wait(0)
    assert (desk.num_leases, desk.counter("ann")) == (0, 0)
    assert desk.dispatcher.room.num_waiting("ann") == 1 and not len(desk.dispatcher.queue)
    put(desk, "ann", is_paused=None)
    assert desk.num_leases == 1


def test_a_request_that_is_submitted_twice_waits_once_while_paused(desk: Desk) -> None:
    router = desk.router()
    put(desk, "ann", is_paused=True)
    router.call(submit("a1"))
    router.call(submit("a1", is_retry=True), is_full=True)
    assert len(desk.dispatcher.room) == 1


def test_paused_requests_count_towards_the_limits(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting=3)
    router = desk.router()
    put(desk, "ann", is_paused=True)
    router.call(*(submit(f"a{i}", max_waiting=2) for i in range(3)))
    assert isinstance(router.refused["a2"], ClientQueueFull)
    router.call(*(submit(f"b{i}", "bob") for i in range(3)))
    assert isinstance(router.refused["b2"], ClusterQueueFull), "3 wait, and bob has the equal share of 2 clients: 1.5"


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("live", "num"), [(1, 1), (4, 4), (None, 2)])
def test_a_live_limit_of_waiting_requests_takes_the_place_of_the_keys(desk: Desk, live: int | None, num: int) -> None:
    put(desk, "ann", max_waiting=live)
    router = desk.router()
    router.call(*(submit(f"a{i}", max_waiting=2) for i in range(6)))
    assert desk.dispatcher.room.num_waiting("ann") == num
    assert len(router.refused) == 6 - num


def test_a_rate_refuses_with_the_time_at_which_the_next_may_come(desk: Desk) -> None:
    put(desk, "ann", requests_per_min=2)
    router = desk.router()
    router.call(submit("a1"))
    desk.clock.advance(20)
    router.call(submit("a2"), submit("a3"), submit("b1", "bob"))
    error = router.refused["a3"]
    assert isinstance(error, ClientRateLimited)
    assert (error.reason, error.retry_after_s, error.fields["limit"]) == ("client_rate", 40.0, 2)
    assert list(router.refused) == ["a3"]
    desk.clock.advance(40)
    router.call(submit("a4"), submit("a5"))
    assert list(router.refused) == ["a3", "a5"]
    put(desk, "ann", requests_per_min=None)
    router.call(submit("a6"))
    assert list(router.refused) == ["a3", "a5"]


def test_a_retry_of_an_accepted_request_is_not_refused_by_the_rate(desk: Desk) -> None:
    put(desk, "ann", requests_per_min=1)
    router = desk.router()
    router.call(submit("a1"), submit("a2", is_retry=True))
    assert not router.refused


# -- the log -----------------------------------------------------------------------------------------------------------


def test_the_log_tells_changes_and_cancels(desk: Desk) -> None:
    lines: list[str] = []
    desk.dispatcher = Dispatcher(make_policy("vtc"), desk.cost, desk.limits, epoch=1, log=DecisionLog(lines.append))
    router = desk.router()
    router.call(submit("a1"), submit("a2"))
    put(desk, "ann", is_paused=True)
    router.call(cancels=("a1", "unknown"))
    desk.wait(30)
    tail = [line.split('"event":')[1] for line in lines[2:]]
    assert tail == [
        '"change","client":"ann","set":{"is_paused":true}}',
        '"cancel","request":"a1"}',
        '"cancel","request":"a2"}',
    ]


# -- anything, at any time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_no_request_is_lost_and_no_invariant_breaks_whatever_is_changed_when(seed: int) -> None:
    rng = random.Random(seed)
    policy = rng.choice(("vtc", "vtc", "vtc", "wsc", "drr", "fcfs"))
    prediction = rng.choice(("none", "moving_mean"))
    names = ["ann", "bob", "org/team/cas", "org/team/dee"]
    cluster = ToyCluster(
        policy,
        num_replicas=2,
        num_routers=2,
        lookahead=rng.randint(0, 1),
        network=Lossy(rng, rng.choice((0.0, 0.1))),
        prediction=prediction,
        swallow=lambda: rng.random() < 0.01,
    )
    habits = [
        Habit(name, awake_steps=40, sleep_steps=30 * i, phase=10 * i, cancels=0.01) for i, name in enumerate(names)
    ]
    crowd = Crowd(cluster, habits, rng)
    for _ in range(60):
        client, dispatcher = rng.choice(names), cluster.dispatcher
        field, value = rng.choice((("weight", rng.choice((0.5, 1.0, 4.0, None))), ("is_paused", rng.random() < 0.5)))
        dispatcher.control(client, dispatcher.controls.of(client).with_changes({field: value}), cluster.now_s)
        cluster.check()
        crowd.run(rng.randint(1, 8))
        cluster.check()
        if policy == "vtc" and not cluster.network.repeats():
            for group, gaps in dispatcher.watch.gaps.items():
                bounds = dispatcher.watch.bounds.get(group)
                assert bounds is None or gaps.worst <= bounds.bound + 1e-6, (group, gaps.worst, bounds.bound)
    for client in names:
        cluster.dispatcher.control(client, NO_CONTROL, cluster.now_s)
    cluster._swallow = lambda: False
    for _ in range(int(cluster.limits.lease_s / cluster.step_s) + 2):  # grants that were swallowed lapse
        cluster.step()
    cluster.run_until_quiet()
    cluster.check()
    assert not len(cluster.dispatcher.room) and not cluster.dispatcher.leases._leases
    ended = {request_id for replica in cluster.replicas.values() for request_id in replica.usage}
    assert not {r for r in cluster.requests if r not in ended and cluster.requests[r][1]._wanted.get(r)}, "nobody waits"
    for client in names:
        served = cluster.dispatcher.ledger.totals(client)
        assert (served.num_input, served.num_output) == cluster.told(client)
