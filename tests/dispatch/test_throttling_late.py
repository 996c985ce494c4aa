"""OIT at the pick: what waits is refused when it is its turn, fits nowhere and may not begin; the refusal arrives."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fairserve.dispatch import granting
from fairserve.dispatch.decision_log import DecisionLog
from fairserve.dispatch.messages import RouterCall
from fairserve.errors import InteractionThrottled
from fairserve.fairness.throttle import ThrottleSettings
from tests.dispatch.kit import Desk, submit
from tests.dispatch.scene import LIMIT, Scene


@pytest.fixture
def make_scene(make_desk: Callable[..., Desk]) -> Callable[..., Scene]:
    def build(policy: str = "vtc", **limits: object) -> Scene:
        limits = {"lease_s": 1e6, "max_waiting_per_client": 1_000} | limits
        return Scene(make_desk(policy, **limits), ThrottleSettings(client_limit=LIMIT))

    return build


@pytest.fixture
def scene(make_scene: Callable[..., Scene]) -> Scene:
    """Overloaded: ``flood`` has one interaction of 30 calls; one runs, the others wait, and it is its turn."""
    made = make_scene()
    made.overload()
    ahead(made)
    return made


def ahead(scene: Scene) -> None:
    """ann has had more than the others."""
    scene.desk.dispatcher.queue.register("ann")
    scene.desk.dispatcher.queue.set_counter("ann", scene.desk.counter("flood") + 500.0)


def greedy(scene: Scene, num: int, client: str = "ann") -> list[str]:
    """Interactions of one call each, accepted one after the other."""
    requests = [f"{client}{i}" for i in range(num)]
    assert all(scene.call(client, request, f"task-{request}") for request in requests)
    return requests


def its_turn(scene: Scene, client: str = "ann") -> None:
    """Whoever else waits is further ahead from now on."""
    queue = scene.desk.dispatcher.queue
    for other in [other for other in queue.backlog.clients() if other != client]:
        queue.set_counter(other, queue.counter(client) + 1_000.0)


def test_past_its_rate_a_client_waits_and_is_refused_when_it_is_its_turn(scene: Scene) -> None:
    requests = greedy(scene, LIMIT + 2)
    scene.wait(5.0)
    assert not scene.router.refused, "as long as others go first it only waits"
    its_turn(scene)
    scene.wait(1.0)
    assert list(scene.router.refused) == requests[:2]
    assert [request in scene.desk.dispatcher.queue for request in requests] == [False] * 2 + [True] * LIMIT
    error = scene.router.refused[requests[0]]
    assert isinstance(error, InteractionThrottled)
    assert error.fields == {
        "client": "ann",
        "application": "",
        "num_recent": LIMIT + 1,
        "limit": LIMIT,
        "retry_after_s": pytest.approx(60.0 - 5.25),
    }
    status = scene.desk.status()
    assert (status["throttled"], status["refused"], status["wasted_tokens"], status["interactions_cut"]) == (2, 2, 0, 0)


def test_what_is_left_is_within_the_rate_and_waits(scene: Scene) -> None:
    greedy(scene, LIMIT + 2)
    its_turn(scene)
    scene.wait(10.0)
    assert scene.is_overloaded and len(scene.router.refused) == 2


def test_what_fits_is_never_refused(scene: Scene) -> None:
    requests = greedy(scene, LIMIT + 2)
    its_turn(scene)
    running = tuple(scene.desk.dispatcher.leases)
    scene.finish(*running)  # the room that this makes goes to the first, before the second is looked at
    assert requests[0] in scene.desk.dispatcher.leases
    assert requests[0] not in scene.router.refused


def test_without_overload_all_wait(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    greedy(scene, 10 * LIMIT)
    scene.router.poll()
    scene.desk.dispatcher.dispatch(scene.desk.now_s)
    assert not scene.is_overloaded and not scene.router.refused


def test_a_call_in_the_middle_of_an_interaction_waits_whatever_its_client_sent(scene: Scene) -> None:
    scene.call("ann", "a0", "task")
    its_turn(scene)
    scene.finish(*scene.desk.dispatcher.leases)
    assert "a0" in scene.desk.dispatcher.leases
    for i in range(1, 20):
        assert scene.call("ann", f"a{i}", "task", i)
    its_turn(scene)
    scene.wait(5.0)
    assert scene.is_overloaded and not scene.router.refused


def test_behind_a_call_that_waits_for_room_nobody_is_looked_at(scene: Scene) -> None:
    """No skipping: it is the turn of a call in the middle of an interaction."""
    scene.call("ann", "a0", "task")
    its_turn(scene)
    scene.finish(*scene.desk.dispatcher.leases)
    scene.call("ann", "a1", "task", 1)
    greedy(scene, 10)
    its_turn(scene)
    scene.wait(5.0)
    assert scene.is_overloaded and not scene.router.refused


def test_all_that_waits_for_an_interaction_is_refused_with_its_first_call(scene: Scene) -> None:
    scene.call("ann", "first", "task")
    scene.call("ann", "second", "task", 1)
    greedy(scene, LIMIT)
    its_turn(scene)
    scene.wait(1.0)
    assert list(scene.router.refused) == ["first", "second"]
    assert all(isinstance(error, InteractionThrottled) for error in scene.router.refused.values())
    assert scene.desk.status()["wasted_tokens"] == 0


def test_trying_again_with_the_same_id_is_beginning_again(scene: Scene) -> None:
    scene.call("ann", "first", "task")
    rest = greedy(scene, LIMIT)
    its_turn(scene)
    scene.wait(1.0)
    assert list(scene.router.refused) == ["first"]
    scene.router.call(cancels=tuple(rest))
    scene.call("ann", "again", "task", 7)
    its_turn(scene)
    scene.wait(0.25)
    assert list(scene.router.refused) == ["first", "again"]


def test_a_grant_that_lapsed_is_no_first_call_any_more(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(lease_s=30.0)
    scene.call("ann", "begun", "")
    assert "begun" in scene.desk.dispatcher.leases
    greedy(scene, LIMIT + 1)
    for _ in range(124):
        scene.desk.clock.advance(0.25)
        scene.router.poll()
        scene.replica.report(free_slots=0)
        scene.desk.dispatcher.tick(scene.desk.now_s)
    assert scene.is_overloaded
    assert scene.desk.dispatcher.num_lapsed == 1 and "begun" in scene.desk.dispatcher.queue
    for i in range(2 * LIMIT):
        scene.call("ann", f"more{i}")
    assert "begun" in scene.desk.dispatcher.queue and "begun" not in scene.router.refused


def test_a_first_call_that_was_overtaken_by_the_second_has_begun(scene: Scene) -> None:
    scene.call("ann", "first", "task")
    scene.call("ann", "second", "task", 1, waited_s=5.0)
    its_turn(scene)
    scene.finish(*scene.desk.dispatcher.leases)
    assert "second" in scene.desk.dispatcher.leases
    greedy(scene, 2 * LIMIT)
    its_turn(scene)
    scene.wait(1.0)
    assert scene.is_overloaded and not scene.router.refused


def test_what_a_predecessor_had_accepted_is_never_cut(scene: Scene) -> None:
    submits = [submit(f"r{i}", "ann", interaction=f"task{i}", is_retry=True) for i in range(3 * LIMIT)]
    scene.router.call(*submits, is_full=True)
    greedy(scene, LIMIT)
    its_turn(scene)
    scene.wait(2.0)
    assert scene.is_overloaded and not scene.router.refused


def test_what_waited_for_longer_than_the_window_counts_no_more(scene: Scene) -> None:
    greedy(scene, 10 * LIMIT)
    scene.wait(61.0)
    its_turn(scene)
    scene.wait(2.0)
    assert scene.is_overloaded and not scene.router.refused


def test_one_call_refuses_only_so_many_and_the_next_goes_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granting, "MOST_REFUSED", 4)
    greedy(scene, LIMIT + 10)
    its_turn(scene)
    for num in (4, 8, 10, 10):
        scene.desk.dispatcher.dispatch(scene.desk.now_s)
        scene.router.poll()
        assert len(scene.router.refused) == num


def test_throttled_at_the_pick_an_id_that_is_used_up_is_cut_with_what_was_spent(scene: Scene) -> None:
    scene.run_all()
    for i in range(300):
        scene.call("ann", f"x{i}", "task", i)
        scene.run_all()
    scene.overload()
    ahead(scene)
    scene.call("ann", "x300", "task", 300)
    its_turn(scene)
    scene.wait(1.0)
    assert list(scene.router.refused) == ["x300"]
    status = scene.desk.status()
    assert (status["interactions_cut"], status["wasted_tokens"]) == (1, 300 * 15)


# -- how the refusal travels -------------------------------------------------------------------------------------------


def refuse_one(scene: Scene) -> str:
    """Refused when nobody listens."""
    first, *_ = greedy(scene, LIMIT + 1)
    its_turn(scene)
    scene.desk.dispatcher.take_routers_to_wake()
    scene.desk.dispatcher.tick(scene.desk.now_s)
    assert scene.desk.dispatcher.take_routers_to_wake() == {scene.router.name}, "its long poll must answer now"
    return first


def look(scene: Scene, ack: int) -> list[str]:
    call = RouterCall(scene.router.name, 1, scene.router.seq, scene.router.epoch, grants_ack=ack)
    return [refusal.request_id for refusal in scene.desk.dispatcher.poll(call, scene.desk.now_s).refusals]


def test_a_late_refusal_is_told_until_it_is_acknowledged(scene: Scene) -> None:
    acknowledged = scene.router.ack
    first = refuse_one(scene)
    assert look(scene, acknowledged) == look(scene, acknowledged) == [first]
    newest = scene.desk.dispatcher.state.counts.num_sent
    assert look(scene, newest) == look(scene, newest) == []


def test_the_reply_to_a_call_carries_it_as_well(scene: Scene) -> None:
    first = refuse_one(scene)
    reply = scene.router.call()
    assert [refusal.request_id for refusal in reply.refusals] == [first]


def test_grants_and_late_refusals_take_their_numbers_from_one_row(scene: Scene) -> None:
    acknowledged = scene.router.ack
    refuse_one(scene)
    (refusal,) = scene.desk.session(scene.router.name).late_refusals
    assert refusal.seq == acknowledged + 1
    scene.finish(*scene.desk.dispatcher.leases)
    (grant,) = scene.desk.session(scene.router.name).grants
    assert grant.seq == refusal.seq + 1


def test_a_router_that_submits_again_before_it_knows_does_not_bring_it_back(scene: Scene) -> None:
    first = refuse_one(scene)
    scene.router.call(submit(first, "ann", interaction=f"task-{first}", is_retry=True), is_full=True)
    assert first not in scene.desk.dispatcher.queue
    assert first in scene.router.refused


def test_a_caller_that_went_away_meanwhile_changes_nothing(scene: Scene) -> None:
    first = refuse_one(scene)
    scene.router.call(cancels=(first,))
    assert scene.desk.status()["refused"] == 1


def test_the_decision_log_tells_of_it_under_the_same_event(scene: Scene) -> None:
    lines: list[str] = []
    scene.desk.dispatcher.state.log = DecisionLog(lines.append)
    first = refuse_one(scene)
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events if event["request"] == first] == ["submit", "refuse"]
    assert events[-1]["reason"] == "interaction_throttled"


def test_the_others_get_what_they_would_have_got_without_it(scene: Scene) -> None:
    """Nobody's counter moves by a refusal, and the next pick is as if its caller had gone."""
    queue = scene.desk.dispatcher.queue
    greedy(scene, LIMIT + 2)
    its_turn(scene)
    before = {client: queue.counter(client) for client in ("ann", "flood")}
    scene.wait(1.0)
    assert len(scene.router.refused) == 2
    assert {client: queue.counter(client) for client in before} == before
