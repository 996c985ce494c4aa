"""The dispatcher when all goes well: picks, charges, grants, refusals, and what it tells people."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fairserve.errors import ClientQueueFull, ClusterQueueFull, RateLimited
from fairserve.fairness.cost import ProfiledQuadratic, WeightedTokens
from tests.dispatch.kit import Desk, submit

MakeDesk = Callable[..., Desk]

# -- picks and charges -------------------------------------------------------------------------------------------------


def test_the_input_is_charged_in_the_same_step_as_the_pick_so_that_the_next_pick_sees_it(desk: Desk) -> None:
    router = desk.router()
    router.call(*(submit(f"{client}{i}", client, num_input=10) for client in ("ann", "bob") for i in range(3)))
    desk.replica(slots=4)
    router.poll()
    assert list(router.granted) == ["ann0", "bob0", "ann1", "bob1"]
    assert (desk.counter("ann"), desk.counter("bob")) == (20, 20)


def test_a_client_with_four_times_the_weight_is_picked_four_times_as_often(desk: Desk) -> None:
    router = desk.router()
    router.call(
        *(submit(f"big{i}", "big", weight=4.0) for i in range(20)), *(submit(f"one{i}", "one") for i in range(20))
    )
    desk.replica(slots=10)
    router.poll()
    assert sum(request_id.startswith("big") for request_id in router.granted) == 8


def test_the_started_report_replaces_the_provisional_charge_by_what_was_really_computed(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a", num_input=100))
    assert desk.counter("ann") == 100
    replica.report(received=("a",))
    assert desk.counter("ann") == 100
    replica.report(started=("a",), served={"ann": (100, 0)}, cached={"ann": 64})
    assert desk.counter("ann") == 36
    replica.report(served={"ann": (0, 3)})
    assert desk.counter("ann") == 42
    replica.report(finished=("a",), served={"ann": (0, 1)})
    assert desk.counter("ann") == 44
    assert desk.num_leases == 0


def test_received_started_and_finished_may_come_in_one_report(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a", num_input=100))
    replica.report(received=("a",), started=("a",), finished=("a",), served={"ann": (100, 5)})
    assert (desk.counter("ann"), desk.num_leases) == (110, 0)


def test_the_general_cost_is_charged_at_the_pick_for_the_input_and_then_by_increments(make_desk: MakeDesk) -> None:
    cost = ProfiledQuadratic()
    desk = make_desk(cost=cost)
    router, replica = desk.router(), desk.replica()
    router.call(submit("a", num_input=100))
    assert desk.counter("ann") == pytest.approx(cost.service(100, 0))
    replica.report(received=("a",), started=("a",), served={"ann": (100, 7)})
    assert desk.counter("ann") == pytest.approx(cost.service(100, 7))


def test_nothing_is_granted_before_a_replica_has_spoken(desk: Desk) -> None:
    router = desk.router()
    assert router.call(submit("a")).grants == ()
    desk.replica()
    assert [grant.replica for grant in router.poll().grants] == ["r0"]


def test_the_first_head_that_fits_nowhere_stops_all_grants(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("ann", "ann", num_input=900, max_output=50), submit("bob", "bob", num_input=1, max_output=1))
    replica = desk.replica(kv=1_000)
    router.poll()
    assert list(router.granted) == ["ann", "bob"]
    router.call(submit("ann2", "ann", num_input=900, max_output=50), submit("cyd", "cyd", num_input=1))
    desk.dispatcher.queue.set_counter("ann", 0.0)
    replica.report(received=("ann", "bob"), free_kv=30, free_slots=2)
    router.poll()
    assert "cyd" not in router.granted, "the small request would fit, but it is not its client's turn"


def test_the_grant_goes_to_the_replica_with_most_room_and_counts_what_is_in_flight(desk: Desk) -> None:
    for name, kv in (("r0", 500), ("r1", 600)):
        desk.replica(name, kv=kv)
    router = desk.router()
    router.call(*(submit(request_id, num_input=100, max_output=100) for request_id in "abc"))
    assert list(router.granted.values()) == ["r1", "r0", "r1"]


def test_the_reserve_for_output_can_be_capped(make_desk: MakeDesk) -> None:
    desk = make_desk(reserve_output_tokens=10)
    desk.replica(kv=200)
    router = desk.router()
    router.call(*(submit(request_id, num_input=90, max_output=1_000) for request_id in "abc"))
    assert list(router.granted) == ["a", "b"]


def test_a_grant_tells_how_long_the_request_has_waited_since_its_router_got_it(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a", waited_s=1.5))
    desk.clock.advance(2.0)
    desk.replica()
    assert [grant.waited_s for grant in router.poll().grants] == [3.5]


def test_a_request_that_waited_elsewhere_is_placed_by_its_whole_waiting_time(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("young"), submit("old", waited_s=9.0))
    desk.replica(slots=1)
    router.poll()
    assert list(router.granted) == ["old"]


def test_requests_of_all_routers_share_one_order(desk: Desk) -> None:
    east, west = desk.router("east"), desk.router("west")
    east.call(*(submit(f"a{i}", "ann") for i in range(3)))
    west.call(submit("b0", "bob"))
    desk.replica(slots=2)
    east.poll()
    west.poll()
    assert (list(east.granted), list(west.granted)) == (["a0"], ["b0"])


def test_a_submit_that_is_known_already_changes_nothing(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    router.call(submit("a"))
    assert desk.status()["waiting"] == 1
    desk.replica()
    router.call(submit("a"))
    assert (desk.status()["waiting"], desk.counter("ann")) == (0, 10)


def test_three_thousand_requests_wait_and_all_are_served(desk: Desk) -> None:
    routers = [desk.router(f"router-{i}") for i in range(3)]
    for i, router in enumerate(routers):
        router.call(*(submit(f"{i}-{j}", f"client-{j % 7}", num_input=5, max_output=5) for j in range(1_000)))
    assert desk.status()["waiting"] == 3_000
    desk.check()
    replica = desk.replica(slots=100, kv=10_000)
    done: set[str] = set()
    while len(done) < 3_000:
        for router in routers:
            router.poll()
        new = tuple(r for router in routers for r in router.granted if r not in done)
        assert new
        done.update(new)
        served: dict[str, tuple[int, int]] = {}
        for request_id in new:
            client = f"client-{int(request_id.split('-')[1]) % 7}"
            served[client] = (served.get(client, (0, 0))[0] + 5, 0)
        replica.report(received=new, started=new, finished=new, served=served)
    assert sum(totals.num_input for totals in desk.dispatcher.ledger.accounts().values()) == 5 * 3_000


# -- the lift ----------------------------------------------------------------------------------------------------------


def test_a_newcomer_is_lifted_and_the_lift_is_counted(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(*(submit(f"a{i}") for i in range(3)))
    replica.report(received=("a0",), started=("a0",), finished=("a0",), served={"ann": (10, 20)})
    before = desk.counter("ann")
    router.call(submit("n", "new"))
    assert desk.counter("new") == before > 0
    assert desk.status()["lifts"] == 1


def test_a_request_that_is_sent_again_lifts_like_any_other(desk: Desk) -> None:
    """Its client may have idled for an hour before: what the others received meanwhile is no credit."""
    router = desk.router()
    router.call(submit("a"))
    desk.dispatcher.queue.set_counter("ann", 5_000.0)
    router.call(submit("r", "returns", is_retry=True))
    assert desk.counter("returns") == 5_000


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_client_over_its_limit_is_refused_and_told_when_to_return(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=2)
    router = desk.router()
    router.call(*(submit(f"a{i}") for i in range(3)), submit("b", "bob"))
    error = router.refused["a2"]
    assert isinstance(error, ClientQueueFull)
    assert (error.client, error.num_waiting, error.limit) == ("ann", 2, 2)  # type: ignore[attr-defined]
    assert error.retry_after_s > 0
    assert list(router.refused) == ["a2"]
    assert desk.status()["refused"] == 1


def test_a_clients_own_limit_takes_the_place_of_the_clusters(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=2)
    router = desk.router()
    router.call(*(submit(f"a{i}", max_waiting=3) for i in range(4)), submit("b", "bob", max_waiting=0))
    assert list(router.refused) == ["a3", "b"]


def test_running_requests_do_not_count_as_waiting(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    desk.replica(slots=2)
    router = desk.router()
    for request_id in "abcd":
        router.call(submit(request_id))
    assert list(router.refused) == ["d"]


def test_a_full_cluster_refuses_the_flood_and_still_takes_a_client_below_an_equal_share(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting=4)
    router = desk.router()
    router.call(*(submit(f"a{i}") for i in range(6)), submit("b", "bob"))
    assert list(router.refused) == ["a4", "a5"]
    assert isinstance(router.refused["a4"], ClusterQueueFull)


def test_requests_that_find_a_free_slot_do_not_count_as_waiting(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=3)
    desk.replica("r0", slots=8).report()
    router = desk.router()
    router.call(*(submit(f"a{i}") for i in range(8)))
    assert router.refused == {}


def test_a_cluster_that_is_full_twice_over_refuses_everybody(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting=2)
    router = desk.router()
    router.call(*(submit(name, name) for name in "abcde"))
    assert list(router.refused) == ["e"]


def test_a_retry_is_never_refused(make_desk: MakeDesk) -> None:
    desk = make_desk("rpm", max_waiting=1, max_waiting_per_client=1)
    router = desk.router()
    router.call(submit("a"), *(submit(f"r{i}", is_retry=True) for i in range(70)))
    assert router.refused == {}
    assert desk.status()["waiting"] == 71


def test_rpm_refuses_above_its_limit_and_counts_only_what_it_accepted(make_desk: MakeDesk) -> None:
    desk = make_desk("rpm", max_waiting_per_client=61)
    router = desk.router()
    router.call(*(submit(f"a{i}") for i in range(62)))
    assert [type(router.refused[f"a{i}"]) for i in (60, 61)] == [RateLimited, RateLimited]
    assert router.refused["a60"].retry_after_s == 60  # type: ignore[attr-defined]
    desk.clock.advance(60.0)
    router.call(submit("later"))
    assert "later" not in router.refused


def test_the_time_to_return_follows_how_fast_the_client_is_granted(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    replica, router = desk.replica(slots=1), desk.router()
    router.call(submit("w"))
    for i in range(30):  # one grant every 4 s
        router.call(submit(f"a{i}"))
        desk.clock.advance(4.0)
        done = [r for r in router.granted if r in desk.dispatcher.leases]
        replica.report(received=tuple(done), started=tuple(done), finished=tuple(done))
        router.poll()
    router.call(submit("x"))
    router.call(submit("y"))
    assert router.refused["y"].retry_after_s == pytest.approx(4.0, rel=0.25)  # type: ignore[attr-defined]


# -- a free request, a tiny charge -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "weight"), [(WeightedTokens(output_weight=0.0), 1.0), (WeightedTokens(), 1e6), (WeightedTokens(), 1e9)]
)
def test_amounts_that_vanish_in_rounding_do_no_harm(make_desk: MakeDesk, cost: WeightedTokens, weight: float) -> None:
    desk = make_desk(cost=cost)
    router, replica = desk.router(), desk.replica()
    router.call(*(submit(request_id, num_input=1, max_output=1, weight=weight) for request_id in "abc"))
    for request_id in "abc":
        replica.report(received=(request_id,), started=(request_id,), served={"ann": (1, 0)})
        desk.check()
    for request_id in "abc":
        replica.report(finished=(request_id,), served={"ann": (0, 1)})
        desk.check()
    assert desk.num_leases == 0


# -- for people --------------------------------------------------------------------------------------------------------


def test_the_status_is_plain_and_complete(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"), submit("b", "bob", weight=2.0), *(submit(f"w{i}") for i in range(4)))
    replica.report(received=("a",), started=("a",), served={"ann": (10, 3)}, cached={"ann": 4}, free_slots=3)
    desk.clock.advance(1.5)
    status = desk.status()
    assert json.loads(json.dumps(status)) == {**status, "worst_pair": None}
    ann = status["clients"]["ann"]
    assert (ann["num_input"], ann["num_cached"], ann["num_output"], ann["service"]) == (10, 4, 3, 12.0)
    assert (ann["waiting"], ann["running"], ann["weight"]) == (2, 3, 1.0)
    assert status["clients"]["bob"]["weight"] == 2.0
    assert (status["waiting"], status["leases"], status["granted"], status["routers"]) == (2, 4, 4, 1)
    room = status["replicas"]["r0"]
    assert (room["report_age_s"], room["granted_unconfirmed"]) == (1.5, 3)
    assert status["bound"] == 2 * (status["bound_unit"] + status["staleness"]) > 0
    assert status["policy"] == "vtc"


def test_routers_to_wake_are_named_once(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    assert desk.dispatcher.take_routers_to_wake() == set()
    desk.replica()
    assert desk.dispatcher.take_routers_to_wake() == {"east"}
    assert desk.dispatcher.take_routers_to_wake() == set()


def test_the_reply_to_a_report_carries_the_counters_of_the_replicas_clients(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"), submit("b", "bob", num_input=7))
    reply = replica.report(received=("a",), started=("a",), served={"ann": (10, 1)}, clients=("bob", "stranger"))
    assert reply.counters == {"ann": 12.0, "bob": 7.0}
    assert (reply.epoch, reply.ack, reply.need_full) == (1, 2, False)


def test_an_idle_authority_says_so(desk: Desk) -> None:
    assert desk.dispatcher.is_idle
    desk.replica()
    assert not desk.dispatcher.is_idle


def test_whoever_is_granted_its_last_request_waits_no_more(desk: Desk) -> None:
    desk.router().call(submit("a", "ann"), submit("b", "bob"), submit("c", "bob"))
    desk.replica(slots=2)
    assert desk.dispatcher.num_granted == 2
    assert set(desk.dispatcher.recent._waiting_since) == {"bob"}


def test_retry_after_goes_by_how_fast_the_clients_own_requests_are_granted(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    router = desk.router()
    router.call(submit("a", "ann"))
    desk.replica(slots=1)
    desk.wait(15.0)
    router.call(submit("a1", "ann"), submit("a2", "ann"), submit("e1", "eve"), submit("e2", "eve"))
    after_s = {request_id: error.retry_after_s for request_id, error in router.refused.items()}
    assert after_s["e2"] == 5.0, "nothing of it was ever granted"
    assert after_s["a2"] > 10.0, "one in 15 s"
