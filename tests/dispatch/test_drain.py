"""The number behind every Retry-After."""

from __future__ import annotations

import random

import pytest

from fairserve.dispatch.drain import DrainRate, DrainRates, retry_after_s


def test_a_steady_rate_is_measured_right_from_the_start() -> None:
    drain = DrainRate()
    for i in range(20):
        drain.count(i * 0.5)
    assert drain.per_s(10.0) == pytest.approx(2.0, rel=0.15)


def test_a_steady_rate_is_measured_right_in_the_long_run() -> None:
    drain = DrainRate()
    for i in range(2_000):
        drain.count(i * 0.5)
    assert drain.per_s(1_000.0) == pytest.approx(2.0, rel=0.05)


def test_before_the_first_grant_the_rate_is_zero() -> None:
    assert DrainRate().per_s(5.0) == 0


def test_a_queue_that_stands_still_drains_ever_more_slowly() -> None:
    drain = DrainRate()
    for i in range(100):
        drain.count(float(i))
    assert drain.per_s(100.0) > drain.per_s(130.0) > drain.per_s(400.0) > 0


def test_asking_for_the_rate_does_not_change_it() -> None:
    asked, left_alone = DrainRate(), DrainRate()
    for drain in (asked, left_alone):
        drain.count(0.0, num=10)
    for i in range(100):
        asked.per_s(i / 10)
    assert asked.per_s(20.0) == pytest.approx(left_alone.per_s(20.0))


def test_retry_after_is_the_time_until_those_ahead_are_granted() -> None:
    assert retry_after_s(30, 2.0) == 15


def test_retry_after_stays_within_reason() -> None:
    assert retry_after_s(1, 1_000.0) == 1
    assert retry_after_s(1_000_000, 0.001) == 600
    assert retry_after_s(1, 0.0) == 5


@pytest.mark.parametrize("pause_s", [0.3, 40.0, 2_000.0])
def test_the_rates_of_many_are_those_that_each_would_have_alone(pause_s: float) -> None:
    rng, rates, alone, now_s = random.Random(0), DrainRates(), {name: DrainRate() for name in "abc"}, 1.7e9
    for _ in range(300):
        now_s += rng.random() * pause_s
        granted = rng.choices("abc", weights=(1, 2, 6), k=rng.randrange(4))
        rates.count(granted, now_s)
        for name in granted:
            alone[name].count(now_s)
        for name, drain in alone.items():
            assert rates.per_s(name, now_s + 1.0) == pytest.approx(drain.per_s(now_s + 1.0), rel=1e-6, abs=1e-12)
    rates.forget("a")
    assert rates.per_s("a", now_s) == rates.per_s("nobody", now_s) == 0.0
