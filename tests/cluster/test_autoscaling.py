"""The policy that Serve's controller asks: it never waits, and what it does not know it leaves as it is."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fairserve.app import BACKLOG_POLICY, how_many
from fairserve.clock import VirtualClock
from fairserve.cluster import autoscaling
from fairserve.cluster.autoscaling import OLD_S, UNSEEN_S, BacklogPolicy
from fairserve.config import FairServeArgs
from fairserve.dispatch.demand import Demand

BUSY = Demand(1, 4, 1_000, num_running=4, used_tokens=500, num_waiting=8, waiting_tokens=400)


class Scene:
    """A policy whose thread never starts: the test asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(autoscaling.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
        self.clock = VirtualClock()
        self.answer: Demand | Exception = BUSY
        self.policy = BacklogPolicy({}, 1.0, 0.5, ask=self.ask, now_s=self.clock.now_s)

    def ask(self) -> Demand:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def wanted(self, num_requests: float = 0.0, num_replicas: int = 3) -> float:
        ctx: Any = SimpleNamespace(
            target_num_replicas=3, total_num_requests=num_requests, current_num_replicas=num_replicas
        )
        return self.policy(ctx)[0]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_before_the_first_answer_the_cluster_stays_as_it_is(scene: Scene) -> None:
    assert scene.wanted() == 3


def test_the_newest_answer_decides(scene: Scene) -> None:
    scene.policy.refresh()
    assert scene.wanted() == 1 + 0.5 * 2
    scene.answer = replace(BUSY, num_waiting=0, waiting_tokens=0)
    scene.policy.refresh()
    assert scene.wanted() == 1


def test_an_actor_that_does_not_answer_changes_nothing_at_first_and_freezes_the_cluster_later(scene: Scene) -> None:
    scene.policy.refresh()
    scene.answer = TimeoutError()
    scene.policy.refresh()
    assert scene.wanted() == 2
    scene.clock.advance(OLD_S + 1)
    assert scene.wanted() == 3


def test_a_request_that_the_actor_has_not_seen_yet_keeps_one_replica(scene: Scene) -> None:
    scene.answer = replace(BUSY, num_running=0, used_tokens=0, num_waiting=0, waiting_tokens=0)
    scene.policy.refresh()
    assert (scene.wanted(), scene.wanted(num_requests=1)) == (0, 1)


def test_a_request_that_the_actor_does_not_see_although_there_are_replicas_keeps_none_for_ever(scene: Scene) -> None:
    scene.answer = replace(BUSY, num_running=0, used_tokens=0, num_waiting=0, waiting_tokens=0)
    seen = []
    for _ in range(4):
        scene.policy.refresh()
        seen.append(scene.wanted(num_requests=1, num_replicas=1))
        scene.clock.advance(UNSEEN_S / 2)
    assert seen == [1, 1, 0, 0]


def test_a_request_waits_for_the_first_replica_however_long_that_takes_to_start(scene: Scene) -> None:
    scene.answer = replace(BUSY, num_replicas=0, num_running=0, used_tokens=0, num_waiting=0, waiting_tokens=0)
    for _ in range(10):
        scene.policy.refresh()
        assert scene.wanted(num_requests=1, num_replicas=0) == 1
        scene.clock.advance(UNSEEN_S)


def test_the_asking_ends_with_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve makes a new policy at every change; the old one's thread must not go on for ever."""
    num_asked = 0

    def ask() -> Demand:
        nonlocal num_asked
        num_asked += 1
        return BUSY

    policies = [BacklogPolicy({}, 1.0, 0.5, ask=ask)]

    def sleep(_: float) -> None:
        policies.clear()
        gc.collect()

    monkeypatch.setattr(autoscaling.time, "sleep", sleep)
    autoscaling._keep_asking(autoscaling.weakref.ref(policies[0]))
    assert num_asked == 1


def test_the_deployment_gets_the_policy_with_the_settings_delays_and_bounds() -> None:
    settings = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 1, "downscale_delay_s": 7, "target_use": 0.5}
    config = how_many(FairServeArgs.model_validate({"num_replicas": 9, "autoscaling": settings}))["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 3, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 7)
    assert config.policy.policy_function == BACKLOG_POLICY
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy._target_use == 0.5


def test_without_autoscaling_the_number_is_fixed() -> None:
    assert how_many(FairServeArgs(num_replicas=4)) == {"num_replicas": 4}


def test_more_at_least_than_at_most_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_replicas \(5\) must not be above max_replicas \(3\)"):
        FairServeArgs.model_validate({"autoscaling": {"min_replicas": 5, "max_replicas": 3}})
