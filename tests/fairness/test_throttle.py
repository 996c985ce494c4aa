"""OIT: what counts as overload, for how long, and whom it touches."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.errors import InteractionThrottled, Refused
from fairserve.fairness.throttle import WINDOW_S, Overload, Rates, Throttle, ThrottleSettings

SETTINGS = ThrottleSettings(client_limit=3, enter_wait_s=2.0, leave_wait_s=0.5, kv_pressure=0.9, hold_s=1.0)


def overloaded(settings: ThrottleSettings) -> Throttle:
    throttle = Throttle(settings)
    throttle.overload.is_on = True
    return throttle


def observe(overload: Overload, start_s: float, seconds: float, wait_s: float, pressure: float) -> float:
    """Ten observations a second. Returns the time after the last."""
    for i in range(round(seconds * 10)):
        overload.observe(wait_s, pressure, start_s + i / 10)
    return start_s + seconds


# -- overload ----------------------------------------------------------------------------------------------------------


def test_long_waits_on_full_replicas_are_overload_after_the_hold() -> None:
    overload = Overload(SETTINGS)
    now_s = observe(overload, 0.0, 1.0, 3.0, 1.0)
    assert not overload.is_on
    overload.observe(3.0, 1.0, now_s)
    assert overload.is_on and overload.num_begun == 1


@pytest.mark.parametrize(("wait_s", "pressure"), [(100.0, 0.89), (2.0, 1.0), (0.0, 1.0), (1.9, 0.95)])
def test_long_waits_or_full_replicas_alone_are_not(wait_s: float, pressure: float) -> None:
    overload = Overload(SETTINGS)
    observe(overload, 0.0, 60.0, wait_s, pressure)
    assert not overload.is_on


def test_one_good_moment_begins_the_hold_anew() -> None:
    overload = Overload(SETTINGS)
    for i in range(20):
        now_s = observe(overload, i * 1.0, 0.9, 3.0, 1.0)
        overload.observe(1.0, 1.0, now_s)
    assert not overload.is_on


def test_between_the_marks_overload_stays_what_it_is() -> None:
    overload = Overload(SETTINGS)
    now_s = observe(overload, 0.0, 60.0, 1.0, 1.0)
    assert not overload.is_on
    now_s = observe(overload, now_s, 2.0, 5.0, 1.0)
    assert overload.is_on
    observe(overload, now_s, 60.0, 1.0, 0.6)
    assert overload.is_on, "below the entry marks, above the exit marks"


@pytest.mark.parametrize(("wait_s", "pressure"), [(0.4, 1.0), (10.0, 0.44)])
def test_it_ends_well_below_the_marks_and_after_the_hold(wait_s: float, pressure: float) -> None:
    overload = Overload(SETTINGS)
    now_s = observe(overload, 0.0, 2.0, 5.0, 1.0)
    now_s = observe(overload, now_s, 1.0, wait_s, pressure)
    assert overload.is_on
    overload.observe(wait_s, pressure, now_s)
    assert not overload.is_on


def test_waits_of_granted_requests_count_as_well_and_fade_when_nobody_waits() -> None:
    """The head of the queue is the least served client's; that it waits briefly does not mean that all do."""
    overload = Overload(SETTINGS)
    for i in range(40):
        overload.waited(8.0, i / 10)
        overload.observe(0.1, 1.0, i / 10)
    assert overload.is_on
    now_s = observe(overload, 4.0, 60.0, 0.0, 1.0)
    assert not overload.is_on
    assert observe(overload, now_s, 60.0, 0.0, 1.0) and overload.num_begun == 1


def test_one_long_wait_among_many_short_ones_is_no_overload() -> None:
    overload = Overload(SETTINGS)
    for i in range(600):
        overload.waited(15.0 if i == 300 else 0.1, i / 10)
        overload.observe(0.1, 1.0, i / 10)
    assert not overload.is_on and overload.num_begun <= 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), hold_s=st.sampled_from([0.5, 1.0, 3.0]))
def test_it_never_changes_twice_within_the_hold(seed: int, hold_s: float) -> None:
    rng = random.Random(seed)
    overload = Overload(ThrottleSettings(hold_s=hold_s))
    changed_s = -hold_s
    for i in range(400):
        now_s, before = i / 10, overload.is_on
        if rng.random() < 0.2:
            overload.waited(rng.choice([0.0, 0.4, 3.0, 30.0]), now_s)
        overload.observe(rng.choice([0.0, 0.4, 1.0, 3.0]), rng.choice([0.3, 0.6, 1.0]), now_s)
        if overload.is_on != before:
            assert now_s - changed_s >= hold_s - 1e-9
            changed_s = now_s


# -- rates -------------------------------------------------------------------------------------------------------------

times = st.lists(st.floats(0, 200, allow_nan=False), max_size=60).map(sorted)


@given(times=times, later_s=st.floats(0, 100), limit=st.integers(1, 5))
def test_the_window_holds_exactly_the_last_sixty_seconds(times: list[float], later_s: float, limit: int) -> None:
    rates = Rates()
    for at_s in times:
        rates.count(("ann",), at_s)
    now_s = (times[-1] if times else 0.0) + later_s
    num = sum(at_s > now_s - WINDOW_S for at_s in times)
    assert rates.num_recent(("ann",), now_s) == num
    assert rates.num_recent(("bob",), now_s) == 0
    wait_s = rates.wait_s(("ann",), limit, now_s)
    if num < limit:
        assert wait_s == 0
    else:
        assert rates.num_recent(("ann",), now_s + wait_s + 1e-6) < limit, "after the wait there is room for one"


def test_keys_that_nobody_uses_any_more_are_not_kept() -> None:
    rates = Rates()
    rates.count(("ann",), 0.0)
    assert rates.num_recent(("ann",), 61.0) == 0
    assert not rates._times


# -- who is refused ----------------------------------------------------------------------------------------------------


def refusal(throttle: Throttle, client: str = "ann", app: str = "", weight: float = 1.0, now_s: float = 0.0) -> Refused:
    error = throttle.refuse(client, app, weight, now_s)
    assert error is not None
    return error


def test_outside_overload_everybody_may_enter_whatever_the_rate() -> None:
    throttle = Throttle(SETTINGS)
    for i in range(100):
        throttle.accepted("ann", "chat", i / 100)
    assert throttle.refuse("ann", "chat", 1.0, 1.0) is None


def test_under_overload_only_who_is_past_its_rate_is_refused() -> None:
    throttle = overloaded(SETTINGS)
    for i in range(3):
        assert throttle.refuse("ann", "", 1.0, i) is None
        throttle.accepted("ann", "", i)
    assert isinstance(refusal(throttle, now_s=3.0), InteractionThrottled)
    assert throttle.refuse("bob", "", 1.0, 3.0) is None


def test_a_refusal_says_who_how_many_and_when_to_come_back() -> None:
    throttle = overloaded(SETTINGS)
    for at_s in (10.0, 20.0, 30.0):
        throttle.accepted("ann", "", at_s)
    error = refusal(throttle, now_s=40.0)
    assert error.reason == "interaction_throttled"
    assert error.fields == {"client": "ann", "application": "", "num_recent": 3, "limit": 3, "retry_after_s": 30.0}
    assert "client 'ann'" in str(error) and "retry in 30 s" in str(error)
    assert refusal(throttle, now_s=69.9).retry_after_s == 1.0, "at least a second"
    assert throttle.refuse("ann", "", 1.0, 40.0 + error.retry_after_s) is None


def test_asking_is_not_counted() -> None:
    throttle = overloaded(SETTINGS)
    for _ in range(50):
        assert throttle.refuse("ann", "chat", 1.0, 0.0) is None
    assert throttle.num_throttled == 0


@pytest.mark.parametrize(("weight", "limit"), [(1.0, 3), (2.0, 6), (0.5, 1), (0.01, 1), (1.5, 4)])
def test_the_limit_grows_with_the_weight_and_is_never_below_one(weight: float, limit: int) -> None:
    throttle = overloaded(SETTINGS)
    for _ in range(limit):
        assert throttle.refuse("ann", "", weight, 0.0) is None
        throttle.accepted("ann", "", 0.0)
    assert refusal(throttle, weight=weight).fields["limit"] == limit


def test_each_application_has_its_own_limit_within_its_client() -> None:
    throttle = overloaded(ThrottleSettings(application_limit=2))
    for _ in range(2):
        throttle.accepted("ann", "chat", 0.0)
    error = refusal(throttle, app="chat")
    assert error.fields["application"] == "chat" and "application 'chat' of client 'ann'" in str(error)
    assert throttle.refuse("ann", "code", 1.0, 0.0) is None
    assert throttle.refuse("bob", "chat", 1.0, 0.0) is None, "another client's chat is another application"
    assert throttle.refuse("ann", "", 1.0, 0.0) is None, "what has no application has no such limit"


def test_spreading_over_applications_evades_no_client_limit() -> None:
    throttle = overloaded(ThrottleSettings(client_limit=5, application_limit=2))
    for i in range(5):
        assert throttle.refuse("ann", f"app{i}", 1.0, 0.0) is None
        throttle.accepted("ann", f"app{i}", 0.0)
    assert refusal(throttle, app="fresh").fields["application"] == "", "the client's own limit"


def test_no_limits_mean_no_throttle() -> None:
    throttle = overloaded(ThrottleSettings())
    assert not throttle.is_on
    for i in range(200):
        throttle.accepted("ann", "chat", i / 100)
    assert throttle.refuse("ann", "chat", 1.0, 2.0) is None
    assert Throttle(ThrottleSettings(client_limit=1)).is_on
    assert Throttle(ThrottleSettings(application_limit=1)).is_on
