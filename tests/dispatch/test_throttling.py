"""OIT at the door (``at: arrival``): measured overload, whole interactions, what forged labels buy."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fairserve.errors import ClientQueueFull, InteractionThrottled
from fairserve.fairness.throttle import ThrottleSettings
from tests.dispatch.kit import Desk, submit
from tests.dispatch.scene import LIMIT, Scene


@pytest.fixture
def make_scene(make_desk: Callable[..., Desk]) -> Callable[..., Scene]:
    def build(policy: str = "vtc", throttle: ThrottleSettings | None = None, **limits: object) -> Scene:
        limits = {"lease_s": 1e6, "max_waiting_per_client": 100} | limits
        return Scene(make_desk(policy, **limits), throttle or ThrottleSettings(at="arrival", client_limit=LIMIT))

    return build


@pytest.fixture
def scene(make_scene: Callable[..., Scene]) -> Scene:
    return make_scene()


def test_overload_is_measured_from_waits_and_full_replicas(scene: Scene) -> None:
    assert not scene.is_overloaded
    scene.overload()
    assert scene.desk.status()["overloaded"]
    scene.run_all()
    scene.wait(30.0)
    assert not scene.is_overloaded
    assert not scene.desk.status()["overloaded"]


def test_without_overload_no_rate_is_too_high(scene: Scene) -> None:
    assert all(scene.call("ann", f"a{i}") for i in range(20 * LIMIT))


def test_under_overload_a_client_within_its_rate_begins_what_it_likes(scene: Scene) -> None:
    scene.overload()
    assert all(scene.call("ann", f"a{i}", f"task{i}") for i in range(LIMIT))
    assert not scene.call("ann", "one-more", "task-more")
    assert scene.call("bob", "b"), "and nobody uses up another's"


def test_a_refusal_is_a_429_with_its_numbers(scene: Scene) -> None:
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"a{i}")
    scene.wait(2.0)
    assert not scene.call("ann", "late", "task")
    error = scene.router.refused["late"]
    assert isinstance(error, InteractionThrottled)
    assert error.reason == "interaction_throttled"
    assert error.fields == {
        "client": "ann",
        "application": "",
        "num_recent": LIMIT,
        "limit": LIMIT,
        "retry_after_s": pytest.approx(58.0),
    }
    status = scene.desk.status()
    assert (status["throttled"], status["refused"], status["wasted_tokens"]) == (1, 1, 0)
    assert "late" not in scene.desk.dispatcher.queue


def test_what_retry_after_says_is_true(scene: Scene) -> None:
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"a{i}")
    assert not scene.call("ann", "early")
    seconds = scene.router.refused["early"].retry_after_s  # type: ignore[attr-defined]
    scene.wait(seconds - 1)
    assert scene.is_overloaded and not scene.call("ann", "a-little-early")
    scene.wait(1.25)
    assert scene.is_overloaded and scene.call("ann", "in-time")


def test_an_interaction_that_has_begun_is_never_throttled(scene: Scene) -> None:
    """It goes on for as many calls as it likes, each counted, while its client may begin nothing new."""
    assert scene.call("ann", "a0", "task")
    scene.overload()
    for i in range(1, 60):
        assert scene.call("ann", f"a{i}", "task", i)
        if i % 10 == 0:
            assert not scene.call("ann", f"new{i}", f"new{i}")
            scene.wait(1.0)
    assert scene.is_overloaded
    status = scene.desk.status()
    assert (status["interactions_cut"], status["wasted_tokens"]) == (0, 0)


def test_a_call_that_takes_minutes_keeps_its_interaction(scene: Scene) -> None:
    assert scene.call("ann", "slow", "task")
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"b{i}", "other", i)
    scene.wait(200.0)
    for i in range(LIMIT):  # it is past its rate again
        scene.call("ann", f"c{i}", "other", i)
    assert scene.is_overloaded and not scene.call("ann", "new", "new")
    assert scene.call("ann", "next", "task", 1)


def test_a_call_whose_grant_lapsed_keeps_its_interaction(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(lease_s=30.0)
    assert scene.call("ann", "lapses", "task")
    scene.wait(31.0)
    assert scene.desk.dispatcher.num_lapsed == 1 and "lapses" in scene.desk.dispatcher.leases
    scene.replica.report(received=("lapses",), started=("lapses",), served={"ann": (10, 0)}, free_slots=0)
    scene.overload()
    scene.wait(100.0)
    assert scene.desk.dispatcher.num_lapsed == 1
    for i in range(LIMIT):
        scene.call("ann", f"b{i}")
    assert scene.is_overloaded and not scene.call("ann", "new", "new")
    assert scene.call("ann", "next", "task", 1)


def test_a_call_that_comes_again_after_a_restart_keeps_its_interaction(scene: Scene) -> None:
    scene.call("ann", "slow", "task")
    scene.overload()
    scene.new_authority()
    scene.router.call(submit("slow", "ann", interaction="task", is_retry=True), is_full=True)
    scene.wait(1.0)
    scene.call("nobody", "x")
    scene.wait(200.0)  # long past the new authority's grace
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"b{i}")
    assert not scene.call("ann", "new", "new", 1)
    assert scene.call("ann", "next", "task", 1)


@pytest.mark.parametrize(
    ("interaction", "index"), [("made-up", 5), ("made-up", 10**6), ("", 0), ("", 7), ("flood", 9), ("task-of-bob", 3)]
)
def test_no_label_makes_a_first_call_look_like_a_later_one(scene: Scene, interaction: str, index: int) -> None:
    scene.call("bob", "b", "task-of-bob")
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"a{i}")
    assert not scene.call("ann", "forged", interaction, index)


def test_one_id_for_everything_is_throttled_once_it_has_had_its_calls(scene: Scene) -> None:
    scene.overload()
    accepted = [scene.call("ann", f"a{i}", "for-ever", i, max_waiting=1_000) for i in range(400)]
    assert accepted[:300] == [True] * 300, "an interaction's worth"
    assert not any(accepted[300:])


def test_applications_have_limits_of_their_own_but_share_their_clients(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(throttle=ThrottleSettings(at="arrival", client_limit=5, application_limit=2))
    scene.overload()
    assert [scene.call("ann", f"c{i}", application="chat") for i in range(3)] == [True, True, False]
    assert scene.router.refused["c2"].fields["application"] == "chat"  # type: ignore[attr-defined]
    assert [scene.call("ann", f"d{i}", application="code") for i in range(3)] == [True, True, False]
    assert [scene.call("ann", f"e{i}", application="mail") for i in range(2)] == [True, False]
    assert scene.router.refused["e1"].fields["application"] == ""  # type: ignore[attr-defined]
    assert scene.call("bob", "b", application="chat")


def test_weights_raise_the_limit(scene: Scene) -> None:
    scene.overload()
    accepted = [scene.call("ann", f"a{i}", weight=2.0) for i in range(2 * LIMIT + 1)]
    assert accepted == [True] * (2 * LIMIT) + [False]


def test_refused_calls_do_not_count_towards_the_rate(scene: Scene) -> None:
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"a{i}")
    for i in range(100):
        scene.wait(0.5)
        scene.call("ann", f"knock{i}")
    scene.wait(11.0)
    assert scene.is_overloaded and scene.call("ann", "after-a-minute")


# -- what is wasted ----------------------------------------------------------------------------------------------------


def test_a_full_queue_in_the_middle_of_an_interaction_wastes_what_was_spent_on_it(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene(throttle=ThrottleSettings())
    for i, num_output in enumerate((7, 5)):
        scene.call("ann", f"a{i}", "task", i)
        scene.finish(f"a{i}", num_output=num_output)
    scene.call("ann", "runs", "task", 2)
    assert not scene.call("ann", "refused", "task", 3, max_waiting=0)
    assert isinstance(scene.router.refused["refused"], ClientQueueFull)
    status = scene.desk.status()
    assert (status["interactions_cut"], status["wasted_tokens"]) == (1, 10 + 7 + 10 + 5)
    scene.finish("runs", num_output=4)
    assert scene.desk.status()["wasted_tokens"] == 32 + 14, "what was running when it was cut is wasted as well"


def test_a_call_that_a_full_queue_refused_is_tried_again_as_what_it_is(make_scene: Callable[..., Scene]) -> None:
    """429 and Retry-After, as every client library obeys them: the throttle must not take the second try for a
    beginning, and cut what has begun after all."""
    scene = make_scene()
    scene.call("ann", "a0", "task")
    scene.overload()
    for i in range(LIMIT):
        scene.call("ann", f"b{i}", "task", i)
    assert not scene.call("ann", "late", "task", 9, max_waiting=1)
    assert isinstance(scene.router.refused["late"], ClientQueueFull)
    assert scene.desk.status()["interactions_cut"] == 1
    scene.wait(5.0)
    assert scene.is_overloaded and not scene.call("ann", "new", "new")
    assert scene.call("ann", "late-again", "task", 9)
    assert scene.desk.status()["interactions_cut"] == 0 == scene.desk.status()["wasted_tokens"]


def test_the_rate_limit_wastes_where_the_throttle_does_not(make_scene: Callable[..., Scene]) -> None:
    """FairServe's comparison in small: ten interactions of six calls, each call after the one before has ended."""
    wasted, cut, begun = {}, {}, {}
    for policy, throttle in (("rpm", ThrottleSettings()), ("wsc", ThrottleSettings(at="arrival", client_limit=32))):
        scene = make_scene(policy, throttle=throttle)
        if policy == "rpm":
            scene.desk.dispatcher.queue.policy.limit = 32  # type: ignore[attr-defined]
        else:
            scene.desk.dispatcher.throttle.overload.is_on = True
        begun[policy] = 0
        for task in range(10):
            for i in range(6):
                if not scene.call("ann", f"{task}-{i}", f"task{task}", i):
                    break
                begun[policy] += i == 0
                scene.run_all()
        cut[policy] = scene.desk.status()["interactions_cut"]
        wasted[policy] = scene.desk.status()["wasted_tokens"]
    assert (cut["rpm"], wasted["rpm"]) == (1, 2 * 15), "the sixth is cut after two calls"
    assert (cut["wsc"], wasted["wsc"]) == (0, 0)
    assert begun == {"rpm": 6, "wsc": 6}


def test_an_expired_worth_of_calls_that_is_refused_is_counted_as_cut(scene: Scene) -> None:
    """The caller's task ends there, whatever we call the call."""
    for i in range(300):
        scene.call("ann", f"a{i}", "task", i, max_waiting=1_000)
        scene.run_all()
    scene.overload()
    assert not scene.call("ann", "a300", "task", 300)
    status = scene.desk.status()
    assert (status["interactions_cut"], status["wasted_tokens"]) == (1, 300 * 15)
