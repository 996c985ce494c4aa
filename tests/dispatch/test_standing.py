"""Where a client stands, as its grants tell it."""

from __future__ import annotations

from fairserve.dispatch.controls import Control
from fairserve.dispatch.messages import Grant, RouterReply, Standing
from tests.dispatch.kit import Desk, submit


def standing(reply: RouterReply, request_id: str) -> Standing:
    grant = next(one for one in reply.grants if one.request_id == request_id)
    assert isinstance(grant, Grant) and grant.standing is not None
    assert type(grant.standing) is tuple, "plain values travel for less"
    return Standing(*grant.standing)


def test_a_grant_tells_how_far_its_client_is_ahead_of_the_least_served_that_waits(desk: Desk) -> None:
    desk.replica(slots=1).report()
    router = desk.router()
    reply = router.call(submit("a1", "ann", 100), submit("b1", "bob", 10), submit("a2", "ann", 10))
    told = standing(reply, "a1")
    assert told.lead == desk.counter("ann") - desk.counter("bob") > 0


def test_with_nobody_waiting_a_client_is_ahead_of_nobody(desk: Desk) -> None:
    desk.replica().report()
    assert standing(desk.router().call(submit("a1")), "a1").lead == 0


def test_a_grant_tells_how_many_more_requests_may_wait(desk: Desk) -> None:
    desk.replica(slots=1).report()
    submits = [submit(f"a{i}", max_waiting=5) for i in range(4)]
    told = standing(desk.router().call(*submits), "a0")
    assert (told.max_requests, told.requests_left) == (5, 2)
    assert told.requests_reset_s > 0


def test_a_rate_that_is_nearer_than_the_queues_limit_is_told_instead(desk: Desk) -> None:
    desk.replica().report()
    desk.dispatcher.control("ann", Control(requests_per_min=3), desk.now_s)
    told = standing(desk.router().call(submit("a0"), submit("a1")), "a1")
    assert (told.max_requests, told.requests_left) == (3, 1)
    assert 0 < told.requests_reset_s <= 60
