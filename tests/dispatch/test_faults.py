"""What the dispatcher does when callers leave, messages are lost, and routers and replicas die."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

MakeDesk = Callable[..., Desk]

# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_lease_that_nobody_confirms_lapses_charge_returned_and_place_kept(desk: Desk) -> None:
    router = desk.router()
    replica = desk.replica(slots=1)
    router.call(submit("first"))
    desk.clock.advance(0.1)
    router.call(submit("second"))
    assert (list(router.granted), state(desk)) == (["first"], (10, 1, 1))
    router.granted.clear()
    desk.wait(5.1)
    assert (desk.status()["lapsed"], state(desk)) == (1, (0, 2, 0)), "the replica is stale by now"
    replica.report()
    router.poll()
    assert list(router.granted) == ["first"], "before the one that came after it"
    assert state(desk) == (10, 1, 1)


def test_a_confirmed_lease_does_not_lapse(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"))
    replica.report(received=("a",))
    for _ in range(20):
        desk.wait(1.0)
        replica.report()
        router.poll()
    assert (desk.num_leases, desk.counter("ann")) == (1, 10)


def test_a_request_that_comes_back_is_no_credit_for_its_client(make_desk: MakeDesk) -> None:
    desk = make_desk()
    router, lost = desk.router(), desk.replica("lost", slots=1)
    router.call(submit("a"))
    assert router.granted == {"a": "lost"}
    replica = desk.replica("r1", slots=1)
    for i in range(40):  # bob is served while ann's grant is lost
        router.call(submit(f"b{i}", "bob", num_input=100))
        router.call(submit(f"c{i}", "bob", num_input=100))
        done = tuple(r for r, where in router.granted.items() if where == "r1" and r in desk.dispatcher.leases)
        replica.report(received=done, started=done, finished=done, served={"bob": (100 * len(done), 0)})
        desk.wait(0.1)
    assert desk.counter("bob") > 3_000
    desk.wait(2.0)
    router.poll()
    desk.wait(3.0)
    lost.report()
    assert desk.counter("ann") >= desk.counter("bob") - 200


# -- cancels, at every stage -------------------------------------------------------------------------------------------


def state(desk: Desk) -> tuple[float, int, int]:
    status = desk.status()
    return desk.counter("ann"), status["waiting"], status["leases"]


def test_a_cancel_while_it_waits_leaves_nothing(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    router.call(cancels=("a",))
    assert state(desk) == (0, 0, 0)
    desk.replica()
    assert router.poll().grants == ()


def test_a_cancel_of_a_grant_on_its_way_takes_the_grant_back(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    replica = desk.replica(slots=1)
    assert state(desk) == (10, 0, 1)
    assert router.call(cancels=("a",)).grants == ()
    assert state(desk) == (0, 0, 0)
    router.call(submit("b"))
    assert list(router.granted) == ["b"], "the slot is free again"
    replica.report(received=("b",))


def test_a_cancel_after_the_grant_was_acknowledged_returns_the_charge(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a"))
    router.poll()
    assert desk.session().outbox == {}
    router.call(cancels=("a",))
    assert state(desk) == (0, 0, 0)
    replica.report(received=("a",), finished=("a",))  # it was on its way and was aborted there
    assert state(desk) == (0, 0, 0)


def test_a_cancel_of_a_confirmed_request_returns_the_charge(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"))
    replica.report(received=("a",))
    router.call(cancels=("a",))
    assert state(desk) == (0, 0, 0)
    replica.report(finished=("a",))
    assert state(desk) == (0, 0, 0)


def test_a_cancel_of_a_started_request_pays_what_was_served_and_no_more(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a", num_input=30, max_output=500))
    replica.report(received=("a",), started=("a",), served={"ann": (30, 10)})
    router.call(cancels=("a",))
    assert state(desk) == (50, 0, 0)
    replica.report(finished=("a",))
    assert state(desk) == (50, 0, 0)


def test_a_cancel_that_overtakes_the_started_report_is_settled_by_it(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a", num_input=30))
    router.call(cancels=("a",))
    replica.report(received=("a",), started=("a",), finished=("a",), served={"ann": (30, 10)})
    assert state(desk) == (50, 0, 0)


def test_a_cancel_of_something_unknown_changes_nothing(desk: Desk) -> None:
    router = desk.router()
    router.call(cancels=("never",), declined=("heard",))
    assert state(desk) == (0, 0, 0)


def test_a_request_aborted_on_the_replica_before_it_ran_costs_nothing(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"))
    replica.report(received=("a",))
    replica.report(finished=("a",))
    assert state(desk) == (0, 0, 0)


# -- lost and repeated messages ----------------------------------------------------------------------------------------


def test_a_lost_reply_loses_no_grant(desk: Desk) -> None:
    router = desk.router()
    desk.replica()
    desk.dispatcher.route(router.compose(submit("a")), desk.now_s)  # carried out, reply lost
    assert router.granted == {}
    router.poll()
    assert list(router.granted) == ["a"]
    assert router.poll().grants == (), "acknowledged by the poll"


def test_a_repeated_call_changes_nothing_and_is_answered_the_same(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    router = desk.router()
    call = router.compose(submit("a"), submit("b"))
    first = desk.dispatcher.route(call, desk.now_s)
    router.call(cancels=("a",))
    again = desk.dispatcher.route(call, desk.now_s)
    assert [refusal.request_id for refusal in first.refusals] == ["b"]
    assert (state(desk), again.grants) == ((0, 0, 0), ())


def test_a_repeated_report_changes_nothing_and_is_acknowledged(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    router.call(submit("a"))
    report = replica.compose(received=("a",), started=("a",), served={"ann": (10, 5)})
    replies = [replica.send(report) for _ in range(3)]
    assert desk.counter("ann") == 20
    assert {reply.ack for reply in replies} == {2}


def test_a_declined_grant_returns_its_charge_and_the_request_may_come_again_in_the_same_call(desk: Desk) -> None:
    router = desk.router()
    desk.replica("r0", kv=1_000)
    desk.replica("r1", kv=900)
    router.call(submit("a"))
    assert router.granted == {"a": "r0"}
    router.call(submit("a", is_retry=True), declined=("a",), unreachable=("r0",))
    assert (router.granted, state(desk)) == ({"a": "r1"}, (10, 0, 1))


def test_an_unreachable_replica_is_granted_nothing_for_a_second(desk: Desk) -> None:
    router = desk.router()
    replica = desk.replica("r0")
    router.call(submit("a"))
    router.call(declined=("a",), unreachable=("r0",))
    router.call(submit("b"))
    replica.report()
    assert list(router.granted) == ["a"]
    desk.wait(1.0)
    router.poll()
    assert list(router.granted) == ["a", "b"]


# -- requests that turn out to be somewhere already --------------------------------------------------------------------


def test_a_request_that_waits_again_but_is_on_a_replica_already_is_not_granted_twice(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a"))
    desk.wait(2.5)
    router.poll()
    desk.wait(2.6)
    assert state(desk)[1] == 1, "the lease lapsed: the reports were lost"
    replica.report(received=("a",), started=("a",), served={"ann": (10, 2)}, free_slots=0)
    assert state(desk) == (14, 0, 0)


def test_a_router_that_wants_a_void_request_all_the_same_gets_its_turn(desk: Desk) -> None:
    """It could not reach the replica, which had received the request nevertheless."""
    router = desk.router()
    replica = desk.replica("r0", slots=1)
    router.call(submit("a"))
    router.call(submit("a", is_retry=True), declined=("a",), unreachable=("r0",))
    replica.report(received=("a",), finished=("a",))
    reply = router.poll()
    assert (reply.grants, reply.resubmit) == ((), True)
    desk.replica("r1")
    reply = router.call(submit("a", is_retry=True), is_full=True)
    assert (router.granted["a"], reply.resubmit) == ("r1", False)


def test_a_report_of_another_replica_does_not_confirm_a_lease(desk: Desk) -> None:
    router = desk.router()
    desk.replica("r0", kv=1_000)
    other = desk.replica("r1", kv=500)
    router.call(submit("a"))
    other.report(received=("a",))
    assert state(desk) == (0, 0, 0), "it is on r1: the lease on r0 is void"


# -- dead routers ------------------------------------------------------------------------------------------------------


def test_a_dead_routers_waiting_requests_are_dropped_and_its_running_ones_go_on(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=2)
    router.call(*(submit(request_id) for request_id in "abc"))
    replica.report(received=("a",), free_slots=1)
    for _ in range(5):
        desk.wait(4.5)
        replica.report(free_slots=1)
    assert state(desk) == (10, 0, 1)
    assert desk.status()["routers"] == 0
    replica.report(started=("a",), finished=("a",), served={"ann": (10, 1)})
    assert state(desk) == (12, 0, 0)


def test_a_router_that_leaves_its_grants_unfetched_is_dead_before_it_blocks_the_replicas_for_long(desk: Desk) -> None:
    """Else each of its waiting requests would hold a slot until its lease lapses, one after another."""
    dead, alive, replica = desk.router("dead"), desk.router("alive"), desk.replica(slots=1)
    dead.call(*(submit(f"d{i}") for i in range(20)))
    alive.call(submit("b", "bob"))
    desk.wait(3.1)
    assert state(desk) == (0, 0, 1) and "b" in desk.dispatcher.leases, "d0's charge returned; bob's turn came"
    alive.poll()
    replica.report(received=("b",), free_slots=0)
    assert alive.granted == {"b": "r0"}
    assert desk.status()["routers"] == 1


def test_a_router_whose_grants_are_on_their_replicas_may_be_silent(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a"))
    replica.report(received=("a",), free_slots=0)
    desk.wait(10.0)
    assert desk.status()["routers"] == 1


def test_a_router_that_was_only_silent_is_asked_to_submit_again(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    desk.wait(21.0)
    assert state(desk) == (0, 0, 0)
    assert router.poll().resubmit
    assert not router.call(submit("a", waited_s=21.0), is_full=True).resubmit
    assert state(desk) == (0, 1, 0)


def test_a_routers_next_life_begins_with_nothing(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("a"))
    reborn = desk.router(incarnation=2)
    reborn.call(submit("b"))
    assert [waiting.submit.request_id for waiting in desk.dispatcher.queue.backlog] == ["b"]


def test_a_late_call_of_a_routers_former_life_does_not_end_the_present_one(desk: Desk) -> None:
    router, reborn = desk.router(incarnation=1), desk.router(incarnation=2)
    late = router.compose(submit("a"))
    reborn.call(submit("b"))
    assert desk.dispatcher.route(late, desk.now_s).grants == ()
    assert router.poll().resubmit is False
    desk.replica()
    reborn.poll()
    assert list(reborn.granted) == ["b"]


# -- dead replicas -----------------------------------------------------------------------------------------------------


def two_with_one_request_each_stage(desk: Desk) -> tuple[RouterVoice, ReplicaVoice]:
    """On r0: a started, b confirmed, c granted."""
    router, replica = desk.router(), desk.replica("r0", slots=3)
    router.call(submit("a"), submit("b"), submit("c"))
    replica.report(received=("a", "b"), started=("a",), served={"ann": (10, 4)}, free_slots=1)
    assert state(desk) == (38, 0, 3)
    return router, replica


def test_a_silent_replica_gets_nothing_more_then_counts_as_dead(desk: Desk) -> None:
    router, _ = two_with_one_request_each_stage(desk)
    desk.wait(2.5)
    router.poll()
    desk.wait(3.0)
    assert state(desk) == (28, 1, 2), "c lapsed and waits; r0 is stale"
    for _ in range(4):
        router.poll()
        desk.wait(4.0)
    assert state(desk) == (18, 1, 0), "what started stays paid; what only waited there is returned"
    assert desk.status()["replicas"] == {}
    desk.replica("r1")
    router.granted.clear()
    router.poll()
    assert router.granted == {"c": "r1"}


def test_a_replica_that_began_anew_frees_what_its_former_life_held(desk: Desk) -> None:
    router, _ = two_with_one_request_each_stage(desk)
    router.poll()
    desk.replica("r0", incarnation=2, slots=3)
    router.poll()
    assert state(desk) == (28, 0, 1), "c is granted again, to the new life"
    assert router.granted["c"] == "r0"


def test_a_late_report_of_a_former_life_is_merged_but_says_nothing_about_room(desk: Desk) -> None:
    _, old = two_with_one_request_each_stage(desk)
    desk.replica("r0", incarnation=2, slots=0)
    old.report(served={"ann": (0, 6)}, finished=("a",), free_slots=99)
    assert desk.dispatcher.ledger.totals("ann").num_output == 10
    room = desk.dispatcher.capacity.get("r0")
    assert room is not None
    assert (room.incarnation, room.free_slots) == (2, 0)


def test_a_replica_that_comes_back_from_a_partition_loses_no_token(desk: Desk) -> None:
    router, replica = two_with_one_request_each_stage(desk)
    desk.wait(25.0)
    replica.report(started=("b", "c"), finished=("a", "b", "c"), served={"ann": (20, 9)})
    assert desk.dispatcher.ledger.totals("ann").num_output == 13
    assert desk.counter("ann") == 30 + 2 * 13
    router.poll()


@pytest.mark.parametrize("loss", ["replica", "router"])
def test_nothing_is_left_behind_when_everything_is_gone(desk: Desk, loss: str) -> None:
    router, replica = two_with_one_request_each_stage(desk)
    router.poll()
    for _ in range(12):
        desk.wait(4.0)
        if loss == "replica":
            router.poll()
        else:
            replica.report(free_slots=1)
    if loss == "router":
        replica.report(finished=("a", "b"))
    else:
        router.call(cancels=("c",))
    assert state(desk)[1:] == (0, 0)
    watch, leases = desk.dispatcher.watch, desk.dispatcher.leases
    assert not (watch.unserved or watch.owed or leases._unconfirmed)
    assert not any(leases._on.values())
    assert not leases._of
