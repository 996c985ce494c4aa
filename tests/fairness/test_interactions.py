"""Interactions: which call is the first, whatever the caller says; how long one lives; what was wasted."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.fairness.interactions import Interactions

OLD_S = 10_000.0
"""Long after the authority's first call: its grace is over."""


@pytest.fixture
def interactions() -> Interactions:
    found = Interactions(idle_s=60.0, max_s=600.0, max_calls=5)
    found.is_first("nobody", "x", 0, 0.0)
    return found


def call(found: Interactions, client: str, interaction: str, now_s: float, index: int = 0, request: str = "") -> bool:
    """One accepted call; whether it was a first one. It stays open."""
    is_first = found.is_first(client, interaction, index, now_s)
    found.accepted(client, interaction, request or f"{client}-{interaction}-{now_s}", now_s, is_first=is_first)
    found.check()
    return is_first


# -- which call is the first -------------------------------------------------------------------------------------------


def test_only_the_call_that_begins_an_interaction_is_a_first_call(interactions: Interactions) -> None:
    assert [call(interactions, "ann", "task", OLD_S + i) for i in range(4)] == [True, False, False, False]


def test_a_call_without_an_interaction_is_always_a_first_call(interactions: Interactions) -> None:
    assert [call(interactions, "ann", "", OLD_S + i) for i in range(3)] == [True] * 3
    assert not interactions.is_under_way("ann") and len(interactions) == 0


@pytest.mark.parametrize("index", [1, 7, 10**6])
def test_a_forged_call_index_makes_an_unknown_id_no_less_new(interactions: Interactions, index: int) -> None:
    assert interactions.is_first("ann", "never-begun", index, OLD_S)


def test_the_index_of_a_known_interaction_is_not_looked_at(interactions: Interactions) -> None:
    call(interactions, "ann", "task", OLD_S)
    assert not interactions.is_first("ann", "task", 0, OLD_S + 1)


def test_another_clients_id_is_worth_nothing(interactions: Interactions) -> None:
    call(interactions, "ann", "task", OLD_S)
    assert call(interactions, "thief", "task", OLD_S + 1, index=3)
    interactions.cut("thief", "task")
    interactions.ended("thief", "task", "ann-task-10000.0", 10**6, OLD_S + 2)
    assert not interactions.is_first("ann", "task", 1, OLD_S + 3), "and touching it does not touch hers"
    assert interactions.is_under_way("ann")
    assert interactions.num_wasted_tokens == 0


def test_one_id_for_ever_is_worth_so_many_calls(interactions: Interactions) -> None:
    firsts = [call(interactions, "ann", "for-ever", OLD_S + i) for i in range(17)]
    assert firsts == [i % 5 == 0 for i in range(17)]


def test_one_id_for_ever_is_worth_so_many_seconds() -> None:
    found = Interactions(idle_s=60.0, max_s=600.0, max_calls=10**9)
    found.is_first("nobody", "x", 0, 0.0)
    firsts = [call(found, "ann", "for-ever", OLD_S + 50.0 * i) for i in range(30)]
    assert [i for i, is_first in enumerate(firsts) if is_first] == [0, 13, 26]


def test_after_a_restart_calls_in_the_middle_are_believed_for_the_idle_time_and_no_longer() -> None:
    found = Interactions(idle_s=60.0)
    assert found.is_first("ann", "new", 0, 500.0), "an index of 0 says so itself"
    assert not found.is_first("ann", "begun-before", 3, 560.0)
    assert found.is_first("ann", "begun-before", 3, 560.1)


@pytest.mark.parametrize("is_late", [False, True])
def test_after_a_restart_an_interaction_that_was_refused_here_is_not_believed_to_have_begun(is_late: bool) -> None:
    """Its second call was on its way when the first was refused: served, it would be served for nothing."""
    found = Interactions(idle_s=60.0)
    found.is_first("nobody", "x", 0, 0.0)
    if is_late:
        call(found, "ann", "task", 5.0, request="r")
        found.turned_away("ann", "task", "r")
    else:
        found.cut("ann", "task")
    assert found.is_first("ann", "task", 1, 6.0)
    assert not found.is_first("ann", "other", 1, 6.0), "of others the authority knows nothing"
    assert call(found, "ann", "task", 7.0) and not found.is_first("ann", "task", 1, 8.0), "in time, it may begin"


def test_what_was_refused_is_remembered_only_as_long_as_callers_are_believed() -> None:
    found = Interactions(idle_s=60.0)
    found.is_first("nobody", "x", 0, 0.0)
    found.cut("ann", "task")
    found.expire(60.1)
    assert not found._never_begun


def test_after_a_restart_what_comes_back_is_known_to_have_begun() -> None:
    """A call that waited with the predecessor for longer than the grace: its next call is in the middle still."""
    found = Interactions(idle_s=60.0)
    found.is_first("nobody", "x", 0, 0.0)
    found.waits_again("ann", "begun-before", "r1", 1.0)
    assert found.is_under_way("ann")
    found.expire(500.0)
    assert not found.is_first("ann", "begun-before", 4, 501.0)
    found.check()


# -- how long it lives -------------------------------------------------------------------------------------------------


def test_an_idle_interaction_is_under_way_no_more_and_goes_on_when_its_caller_comes_back(
    interactions: Interactions,
) -> None:
    """Somebody reads the answer for longer than a minute: the next call is no first call, or it would be throttled."""
    call(interactions, "ann", "task", OLD_S, request="r")
    interactions.ended("ann", "task", "r", 10, OLD_S + 5)
    assert interactions.expire(OLD_S + 65) == []
    assert interactions.expire(OLD_S + 65.1) == ["ann"]
    assert not interactions.is_under_way("ann")
    assert not call(interactions, "ann", "task", OLD_S + 500, 1)
    assert interactions.is_under_way("ann")
    assert interactions.num_wasted_tokens == 0, "what nobody continues was not cut"


def test_an_interaction_is_forgotten_when_nothing_was_heard_of_it_for_its_longest_time(
    interactions: Interactions,
) -> None:
    call(interactions, "ann", "task", OLD_S, request="r")
    interactions.ended("ann", "task", "r", 10, OLD_S + 5)
    interactions.expire(OLD_S + 605)
    assert ("ann", "task") in interactions._known
    interactions.expire(OLD_S + 605.1)
    assert not interactions._known


def test_a_call_that_waits_or_runs_keeps_it_alive(interactions: Interactions) -> None:
    call(interactions, "ann", "task", OLD_S, request="slow")
    for i in range(1, 10):
        assert interactions.expire(OLD_S + 50.0 * i) == []
    interactions.ended("ann", "task", "slow", 10, OLD_S + 500)
    assert not interactions.is_first("ann", "task", 1, OLD_S + 550)
    assert interactions.expire(OLD_S + 561) == ["ann"]


def test_a_call_that_went_back_to_the_queue_keeps_it_alive(interactions: Interactions) -> None:
    """A grant that lapsed, or a replica that died: the call left, and waits again."""
    call(interactions, "ann", "task", OLD_S, request="r")
    interactions.ended("ann", "task", "r", 0, OLD_S + 5)
    interactions.waits_again("ann", "task", "r", OLD_S + 5)
    assert interactions.expire(OLD_S + 500) == []
    assert not interactions.is_first("ann", "task", 1, OLD_S + 500)


def test_a_client_is_under_way_while_any_of_its_interactions_is(interactions: Interactions) -> None:
    call(interactions, "ann", "one", OLD_S, request="a")
    call(interactions, "ann", "two", OLD_S + 30, request="b")
    interactions.ended("ann", "one", "a", 1, OLD_S + 30)
    interactions.ended("ann", "two", "b", 1, OLD_S + 31)
    assert interactions.expire(OLD_S + 90.5) == []
    assert interactions.is_under_way("ann")
    assert interactions.expire(OLD_S + 91.5) == ["ann"]


# -- what was wasted ---------------------------------------------------------------------------------------------------


def test_what_was_spent_on_an_interaction_is_wasted_when_it_is_cut(interactions: Interactions) -> None:
    for i, num_tokens in enumerate((100, 20, 3)):
        call(interactions, "ann", "task", OLD_S + i, request=f"r{i}")
        interactions.ended("ann", "task", f"r{i}", num_tokens, OLD_S + i)
    interactions.cut("ann", "task")
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (1, 123)
    assert not interactions.is_under_way("ann")
    interactions.check()


def test_what_its_open_calls_still_come_to_is_wasted_too_and_once(interactions: Interactions) -> None:
    call(interactions, "ann", "task", OLD_S, request="done")
    call(interactions, "ann", "task", OLD_S, request="runs")
    interactions.ended("ann", "task", "done", 100, OLD_S + 1)
    interactions.cut("ann", "task")
    interactions.cut("ann", "task")
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (1, 100)
    for _ in range(2):
        interactions.ended("ann", "task", "runs", 40, OLD_S + 3)
    assert interactions.num_wasted_tokens == 140
    assert interactions.expire(OLD_S + 100) == []
    assert (interactions.num_cut, interactions.num_wasted_tokens, len(interactions)) == (1, 140, 0)


def test_a_caller_that_tries_again_in_time_goes_on_and_nothing_was_wasted(interactions: Interactions) -> None:
    """Whoever was refused for another reason (a full queue) and waits for Retry-After is still in the middle."""
    call(interactions, "ann", "task", OLD_S, request="a")
    interactions.ended("ann", "task", "a", 100, OLD_S + 1)
    interactions.cut("ann", "task")
    assert not interactions.is_under_way("ann")
    assert not call(interactions, "ann", "task", OLD_S + 50, index=1, request="b")
    assert interactions.is_under_way("ann")
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (0, 0)
    interactions.ended("ann", "task", "b", 10, OLD_S + 51)
    interactions.cut("ann", "task")
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (1, 110)


def test_a_caller_that_tries_again_too_late_begins_anew(interactions: Interactions) -> None:
    call(interactions, "ann", "task", OLD_S, request="a")
    interactions.ended("ann", "task", "a", 100, OLD_S + 1)
    interactions.cut("ann", "task")
    interactions.expire(OLD_S + 602)
    assert call(interactions, "ann", "task", OLD_S + 602, index=1)
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (1, 100)


# -- refused when it was picked ----------------------------------------------------------------------------------------


def test_an_interaction_has_begun_once_any_of_its_calls_was_granted(interactions: Interactions) -> None:
    for request in ("a", "b"):
        call(interactions, "ann", "task", OLD_S, request=request)
    assert not interactions.has_begun("ann", "task", "a")
    interactions.granted("ann", "task", "b")
    assert interactions.has_begun("ann", "task", "a")
    assert not interactions.has_begun("bob", "task", "a"), "nobody else's has"
    assert not interactions.has_begun("ann", "", "a"), "and what stands alone never has"


def test_turned_away_before_it_began_it_is_unknown_again_and_takes_its_waiting_calls_along(
    interactions: Interactions,
) -> None:
    for request in ("a", "b"):
        call(interactions, "ann", "task", OLD_S, request=request)
    call(interactions, "ann", "other", OLD_S, request="c")
    assert interactions.turned_away("ann", "task", "a") == ["a", "b"]
    interactions.check()
    assert (interactions.num_cut, interactions.num_wasted_tokens, len(interactions)) == (0, 0, 1)
    assert interactions.is_first("ann", "task", 1, OLD_S + 1), "trying again is beginning again"
    assert interactions.turned_away("ann", "other", "c") == ["c"] and not interactions.is_under_way("ann")
    assert interactions.turned_away("ann", "", "d") == ["d"]


def test_turned_away_when_its_worth_was_used_up_it_is_cut_with_all_that_was_spent_on_it(
    interactions: Interactions,
) -> None:
    for i in range(5):
        call(interactions, "ann", "task", OLD_S + i, request=f"r{i}")
        interactions.granted("ann", "task", f"r{i}")
        interactions.ended("ann", "task", f"r{i}", 10, OLD_S + i)
    assert call(interactions, "ann", "task", OLD_S + 6, request="r5"), "a first call again"
    assert not interactions.has_begun("ann", "task", "r5")
    assert interactions.turned_away("ann", "task", "r5") == ["r5"]
    interactions.check()
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (1, 50)
    assert interactions.is_first("ann", "task", 6, OLD_S + 7), "and what was refused bought no further worth"


def test_what_comes_again_from_a_predecessor_has_begun(interactions: Interactions) -> None:
    interactions.waits_again("ann", "task", "r", OLD_S)
    assert interactions.has_begun("ann", "task", "r")


def test_refusing_a_first_call_wastes_nothing(interactions: Interactions) -> None:
    interactions.cut("ann", "task")
    interactions.cut("ann", "")
    assert (interactions.num_cut, interactions.num_wasted_tokens) == (0, 0)


@dataclass
class Model:
    """The same by brute force: every interaction there ever was, with every call; the sums are made anew each time."""

    idle_s: float
    max_s: float
    max_calls: int
    all: list[dict[str, Any]] = field(default_factory=list)
    born_s: float | None = None
    refused: set[tuple[str, str]] = field(default_factory=set)
    """Before they began."""

    def live(self, key: tuple[str, str]) -> dict[str, Any] | None:
        return next((one for one in self.all if one["key"] == key and not one["is_over"]), None)

    def is_first(self, key: tuple[str, str], index: int, now_s: float) -> bool:
        self.born_s = now_s if self.born_s is None else self.born_s
        one = self.live(key)
        if one is None:
            return index == 0 or now_s - self.born_s > self.idle_s or key in self.refused
        return one["num_calls"] >= self.max_calls or now_s - one["begun_s"] > self.max_s

    def accepted(self, key: tuple[str, str], request_id: str, now_s: float, is_first: bool) -> None:
        one = self.live(key)
        self.refused.discard(key)
        if one is None:
            one = {
                "key": key,
                "is_over": False,
                "is_idle": False,
                "is_cut": False,
                "tokens": 0,
                "before": 0,
                "open": set(),
                "num_calls": 0,
            }
            one["begun_s"] = now_s
            self.all.append(one)
        elif is_first:
            one |= {
                "before": one["before"] + one["tokens"] * one["is_cut"],
                "begun_s": now_s,
                "num_calls": 0,
                "tokens": one["tokens"] * (not one["is_cut"]),
            }
        one["cuts"] = one.get("cuts", 0) + (is_first and one["is_cut"])
        one["is_cut"] = False
        one["is_idle"] = False
        one["num_calls"] += 1
        one["open"].add(request_id)
        one["seen_s"] = now_s

    def expire(self, now_s: float) -> None:
        for one in self.all:
            if not one["is_over"] and now_s - one["seen_s"] > self.idle_s:
                if one["open"]:
                    one["seen_s"] = now_s
                else:
                    one["is_idle"] = True
            if now_s - one["seen_s"] > self.max_s:
                one["is_over"] = True

    @property
    def wasted(self) -> tuple[int, int]:
        """Interactions cut, and tokens."""
        cut = sum(one["is_cut"] + one.get("cuts", 0) for one in self.all)
        return cut, sum(one["before"] + one["tokens"] * one["is_cut"] for one in self.all)

    @property
    def under_way(self) -> set[str]:
        return {one["key"][0] for one in self.all if not one["is_idle"] and not one["is_cut"]}


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_history_is_told_as_brute_force_tells_it(seed: int) -> None:
    rng = random.Random(seed)
    found, model = Interactions(20.0, 100.0, 4), Model(20.0, 100.0, 4)
    now_s = 0.0
    for i in range(200):
        now_s += rng.choice([0.0, 1.0, 15.0])
        key = (rng.choice("ab"), rng.choice("xyz"))
        one = model.live(key)
        match rng.randrange(5):
            case 0 | 1:
                index = rng.randrange(3)
                is_first = model.is_first(key, index, now_s)
                assert found.is_first(*key, index, now_s) is is_first
                if rng.random() < 0.3:
                    found.cut(*key)
                    if one is not None:
                        one["is_cut"] = True
                    else:
                        model.refused.add(key)
                else:
                    found.accepted(*key, f"r{i}", now_s, is_first=is_first)
                    model.accepted(key, f"r{i}", now_s, is_first)
            case 2 | 3 if one is not None and one["open"]:
                request_id, num_tokens = rng.choice(sorted(one["open"])), rng.randrange(100)
                if rng.random() < 0.2:
                    found.waits_again(*key, request_id, now_s)
                else:
                    found.ended(*key, request_id, num_tokens, now_s)
                    one["open"].discard(request_id)
                    one["tokens"] += num_tokens
                one["seen_s"], one["is_idle"] = now_s, False
            case 4:
                before = model.under_way
                model.expire(now_s)
                assert set(found.expire(now_s)) == before - model.under_way
        found.check()
        assert (found.num_cut, found.num_wasted_tokens) == model.wasted
        assert len(found) == sum(not one["is_idle"] for one in model.all)
        assert {client for client in "ab" if found.is_under_way(client)} == model.under_way
