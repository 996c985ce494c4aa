"""Rates, waits and shares of the last seconds, against sums by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.dispatch.recent import RATE_S, SHARE_S, Recent, WindowSums


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abc"), st.integers(-5, 20)), max_size=80))
def test_a_window_holds_the_sum_of_its_seconds_and_no_key_that_is_in_none(moves: list[tuple[int, str, int]]) -> None:
    window, second = WindowSums(5), 0
    history: list[tuple[int, str, int]] = []
    for skip, key, amount in moves:
        window.current[key] = window.current.get(key, 0) + amount
        history.append((second, key, amount))
        window.close(second)
        inside = [(k, a) for s, k, a in history if s > second - 5]
        assert {k: window.sum_of(k) for k in window} == {k: sum(a for o, a in inside if o == k) for k, _ in inside}
        second += 1 + skip


def test_what_rounding_leaves_does_not_stay() -> None:
    window = WindowSums(2)
    for second in range(100):
        window.current["a"] = 0.1 * (second + 1)
        window.close(second)
    window.close(101)
    assert window.sum_of("a") == 0 and list(window) == []


def lively(recent: Recent, seconds: int, *, per_s: dict[str, float]) -> float:
    """Ten reports a second; returns the time at the end."""
    now_s = 1_000.0
    recent.tick(now_s)
    for tick in range(10 * seconds):
        for client, amount in per_s.items():
            recent.served("r0", [(client, amount / 10, amount / 10)], 5)
        now_s = 1_000.0 + (tick + 1) / 10
        recent.tick(now_s)
    return now_s


@pytest.mark.parametrize("seconds", [2, RATE_S, 3 * RATE_S])
def test_rates_are_right_from_the_second_second_on_and_later(seconds: int) -> None:
    recent = Recent()
    now_s = lively(recent, seconds, per_s={"ann": 100.0, "bob": 40.0})
    assert recent.service_per_s("ann", now_s) == pytest.approx(100)
    assert recent.all_service_per_s(now_s) == pytest.approx(140)
    assert recent.tokens_per_s("r0", now_s) == recent.all_tokens_per_s(now_s) == pytest.approx(2 * 10 * 5)


def test_a_client_that_is_served_no_more_has_no_rate_and_was_last_seen_then() -> None:
    recent = Recent()
    now_s = lively(recent, 5, per_s={"ann": 100.0})
    for second in range(1, 15):
        recent.tick(now_s + second)
    assert recent.service_per_s("ann", now_s + 15) == 0
    assert recent.seen_s("ann") == pytest.approx(now_s, abs=1.1)
    assert recent.seen_s("bob") is None


def test_the_mean_wait_forgets_with_its_time_constant_and_in_the_end_all() -> None:
    recent = Recent()
    for i in range(100):
        recent.granted([("ann", 10.0)], float(i))
    assert recent.mean_wait_s("ann", 99.0) == pytest.approx(10)
    for i in range(100):
        recent.granted([("ann", 0.0)], 100.0 + i)
    assert recent.mean_wait_s("ann", 199.0) == pytest.approx(10 * 2.718281828 ** (-100 / 30), rel=0.1)
    assert recent.mean_wait_s("ann", 2_000.0) == recent.mean_wait_s("bob", 0.0) == 0
    recent.tick(0.0)
    recent.tick(5_000.0)
    assert not recent._waits


def test_the_mean_wait_is_right_however_long_the_service_runs() -> None:
    recent, now_s = Recent(), 1.7e9
    for _ in range(50):
        now_s += 1_000.0
        recent.granted([("ann", 8.0)], now_s)
        recent.granted([("ann", 4.0)], now_s + 30.0)
        assert recent.mean_wait_s("ann", now_s + 40.0) == pytest.approx((8.0 / math.e + 4.0) / (1 / math.e + 1.0))


def test_only_clients_that_waited_throughout_the_last_minute_are_compared() -> None:
    recent = Recent()
    waiting = {"ann", "bob"}
    for client in waiting:
        recent.moved(client, waiting.__contains__, 990.0)
    now_s = lively(recent, SHARE_S + 5, per_s={"ann": 30.0, "bob": 10.0, "eve": 1e6})
    even = (30 + 10) ** 2 / (2 * (30**2 + 10**2))
    assert recent.jain(waiting.__contains__) == pytest.approx(even)
    waiting.add("eve")
    recent.moved("eve", waiting.__contains__, now_s)
    assert recent.jain(waiting.__contains__) == pytest.approx(even), "she has waited for no minute yet"
    waiting.remove("ann")
    recent.moved("ann", waiting.__contains__, now_s)
    waiting.add("ann")
    recent.moved("ann", waiting.__contains__, now_s)
    assert recent.jain(waiting.__contains__) == 1.0, "bob alone did"
    recent.begins()
    assert not recent._waiting_since


def test_members_of_one_organisation_count_as_one() -> None:
    recent = Recent()
    recent.moved("acme/ann", lambda node: True, 990.0)
    recent.moved("acme/bob", lambda node: True, 990.0)
    recent.moved("solo", lambda node: True, 990.0)
    lively(recent, SHARE_S + 5, per_s={"acme/ann": 10.0, "acme/bob": 10.0, "solo": 20.0})
    assert recent.jain(lambda node: True) == pytest.approx(1.0)


def test_active_clients_come_latest_first_and_none_older_than_asked() -> None:
    recent = Recent()
    rng = random.Random(1)
    last = {}
    for now in range(200):
        client = f"c{rng.randrange(30)}"
        recent.seen(client, float(now))
        last[client] = float(now)
    assert list(recent.active_since(150.0)) == sorted((c for c in last if last[c] >= 150), key=lambda c: -last[c])
