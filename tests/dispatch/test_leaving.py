"""Replicas that leave: some die at once, some are stopped and finish what they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import Grant, ReportReply, RouterReply
from fairserve.dispatch.overview import Moment, replica_view
from fairserve.dispatch.replica_book import Reporter
from fairserve.dispatch.router_book import RouterBook
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

MakeDesk = Callable[..., Desk]


def each_stage(desk: Desk) -> tuple[RouterVoice, ReplicaVoice]:
    """On r0: a started, b confirmed, c on its way there, d granted and the grant not heard of."""
    router, replica = desk.router(), desk.replica("r0", slots=4)
    router.call(submit("a"), submit("b"))
    replica.report(received=("a", "b"), started=("a",), served={"ann": (10, 4)}, free_slots=2)
    router.call(submit("c"))
    desk.dispatcher.route(router.compose(submit("d")), desk.now_s)  # the reply is lost, "c" is acknowledged
    assert sorted(desk.dispatcher.leases) == ["a", "b", "c", "d"]
    assert (desk.counter("ann"), list(router.granted)) == (48, ["a", "b", "c"])
    return router, replica


def state_of(desk: Desk, name: str) -> str:
    room = desk.dispatcher.capacity.get(name)
    assert room is not None
    return str(replica_view(Moment(desk.dispatcher, desk.now_s, 0.0), room)["state"])


def kinds(dispatcher: Dispatcher) -> list[str]:
    return [event.kind for event in dispatcher.events.after(0, 100)]


# -- death -------------------------------------------------------------------------------------------------------------


def test_what_a_dead_replica_was_charged_and_did_not_serve_returns_at_once(desk: Desk) -> None:
    router, _ = each_stage(desk)
    router.call(gone=("r0",))
    assert desk.counter("ann") == 18, "what it reported stays paid"
    assert desk.status()["replicas"] == {}
    assert kinds(desk.dispatcher) == ["joined", "lost"]
    desk.check()


def test_only_a_grant_that_no_router_took_is_granted_again_by_itself(desk: Desk) -> None:
    """Whoever sent a request there notices, and asks again: a second grant for it would only be declined."""
    router, _ = each_stage(desk)
    router.call(gone=("r0",))
    assert (desk.num_leases, desk.status()["waiting"]) == (0, 1)
    desk.replica("r1")
    router.call(submit("b~1", is_retry=True), submit("c", is_retry=True), cancels=("b",), declined=("c",))
    assert {r: router.granted[r] for r in ("b~1", "c", "d")} == dict.fromkeys(("b~1", "c", "d"), "r1")
    assert desk.counter("ann") == 48


def test_the_last_words_of_a_dead_replica_count_and_draw_no_grant(desk: Desk) -> None:
    router, replica = each_stage(desk)
    late = replica.compose(started=("b",), served={"ann": (10, 3)})
    router.call(gone=("r0",))
    replica.send(late)
    assert desk.dispatcher.ledger.totals("ann").num_output == 7
    assert (desk.counter("ann"), desk.status()["replicas"], desk.num_leases) == (34, {}, 0)


def test_a_replica_that_was_wrongly_said_to_be_dead_comes_back(desk: Desk) -> None:
    router, replica = each_stage(desk)
    router.call(gone=("r0",))
    desk.wait(5.1)
    replica.report(free_slots=2)
    assert "r0" in desk.status()["replicas"]
    router.poll()
    assert router.granted["d"] == "r0"


def test_a_death_that_two_routers_tell_of_is_one_death(desk: Desk) -> None:
    router, _ = each_stage(desk)
    other = desk.router("west")
    router.call(gone=("r0",))
    other.call(gone=("r0", "never-heard-of"))
    assert kinds(desk.dispatcher).count("lost") == 1


# -- drain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", ["router", "replica"])
def test_a_draining_replica_is_granted_nothing_more_and_finishes_what_it_has(desk: Desk, says: str) -> None:
    router, replica = each_stage(desk)
    if says == "router":
        router.call(draining=("r0",))
    else:
        replica.send(replace(replica.compose(), is_draining=True))
    assert state_of(desk, "r0") == "draining"
    assert sorted(desk.dispatcher.leases) == ["a", "b", "c"]
    reply = replica.report(free_slots=4)
    assert reply.is_draining, "the replica is told, too"
    router.call(submit("e"))
    assert desk.status()["waiting"] == 2, "d and e"
    desk.replica("r1")
    router.poll()
    assert (router.granted["d"], router.granted["e"]) == ("r1", "r1")
    replica.report(finished=("a",), served={"ann": (0, 6)})
    assert desk.dispatcher.ledger.totals("ann").num_output == 10
    desk.check()


def test_what_a_draining_replica_gives_back_is_granted_elsewhere_in_its_old_place(desk: Desk) -> None:
    router, replica = each_stage(desk)
    desk.wait(1.0)
    router.call(submit("late"), draining=("r0",))
    replica.report(received=("c",), finished=("b", "c"))
    desk.replica("r1", slots=1)
    assert desk.status()["leases"] == 2, "a runs, and d is first"
    router.call(submit("b~1", is_retry=True, waited_s=1.0), cancels=("b", "d"))
    assert router.granted["b~1"] == "r1", "before the one that came later"


def test_a_drained_replica_that_ended_is_forgotten_sooner_than_a_silent_one(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica("r0")
    router.call(submit("a"), draining=("r0",))
    replica.report()
    desk.wait(5.1)
    assert desk.status()["replicas"] == {}
    assert kinds(desk.dispatcher) == ["joined", "draining", "draining"]


def test_a_draining_replica_that_dies_with_work_on_it_is_lost(desk: Desk) -> None:
    router, _ = each_stage(desk)
    router.call(draining=("r0",))
    for _ in range(5):
        desk.wait(4.5)
        router.poll()
    assert desk.status()["replicas"] == {}
    assert kinds(desk.dispatcher)[-1] == "lost"
    assert desk.counter("ann") == 18


def test_a_draining_replica_is_no_room_for_those_that_give_way(make_desk: MakeDesk) -> None:
    desk = make_desk(preempt_gap=1.0)
    router, replica = desk.router(), desk.replica("r0", slots=1)
    router.call(submit("greedy", "bob", num_input=100))
    replica.report(received=("greedy",), started=("greedy",), served={"bob": (100, 50)}, free_slots=0)
    router.call(submit("modest", "ann"), draining=("r0",))
    assert desk.status()["granted_over"] == 0


# -- the routers' and the replicas' side -------------------------------------------------------------------------------


def test_a_router_tells_of_replicas_until_it_is_heard() -> None:
    book = RouterBook("east", 1)
    book.gone("r0")
    book.draining("r1")
    assert book.has_news
    assert [(call.gone, call.draining) for call in (book.compose(0.0), book.compose(1.0))] == [(("r0",), ("r1",))] * 2
    book.replied(RouterReply(1), to_poll=False)
    assert not book.has_news
    book.decline(Grant("a", "r2", 0.0, 1), is_unreachable=False)
    assert (book.compose(2.0).gone, book.compose(2.0).draining) == ((), ())


def test_a_reporter_says_that_the_replica_drains() -> None:
    reporter = Reporter("r0", 1)
    room = {"free_kv_tokens": 1, "free_slots": 1, "kv_capacity_tokens": 1, "max_slots": 1}
    assert not reporter.compose(**room).is_draining
    reporter.replied(ReportReply(1, 1))
    assert reporter.compose(**room, is_draining=True).is_draining
