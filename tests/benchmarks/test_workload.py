"""The plan is the same for every policy, floods ten to one, and asks for more than there is all the time."""

from __future__ import annotations

import pytest

from benchmarks.workload import GREEDY, MEAN_OUTPUT, MIX, OFF_S, ON_OFF, ON_S, STEADY, burst, flood


def test_the_same_seed_makes_the_same_plan_and_another_seed_another() -> None:
    assert flood(2.0, 60, 16, seed=3) == flood(2.0, 60, 16, seed=3)
    assert flood(2.0, 60, 16, seed=3) != flood(2.0, 60, 16, seed=4)


def test_the_greedy_client_asks_ten_times_as_often_as_a_modest_one() -> None:
    plan = flood(5.0, 6000, 0)
    num = {client: sum(planned.client == client for planned in plan) for client in (GREEDY, STEADY, ON_OFF)}
    assert num[GREEDY] / num[STEADY] == pytest.approx(10, rel=0.1)
    assert num[GREEDY] / num[ON_OFF] == pytest.approx(10 * (ON_S + OFF_S) / ON_S, rel=0.1)


def test_the_service_is_full_from_the_start_and_demand_stays_near_three_times_the_capacity() -> None:
    plan = flood(5.0, 3000, 16)
    assert sum(planned.at_s == 0.0 for planned in plan) >= 32
    for start_s in range(0, 3000, 500):
        num_arrivals = sum(start_s <= planned.at_s < start_s + 500 for planned in plan)
        assert num_arrivals / 500 == pytest.approx(15, rel=0.15)


def test_the_on_off_client_rests_in_its_off_time() -> None:
    plan = [planned for planned in flood(20.0, 120, 16) if planned.client == ON_OFF]
    assert plan
    assert all(planned.at_s % (ON_S + OFF_S) < ON_S for planned in plan)


def test_the_plan_is_in_order_and_ends_in_time() -> None:
    times = [planned.at_s for planned in flood(3.0, 77, 16)]
    assert times == sorted(times)
    assert times[-1] < 77


def test_a_burst_comes_at_once_in_the_lengths_of_the_mix() -> None:
    plan = burst("x", 300)
    assert {planned.at_s for planned in plan} == {0.0}
    assert {(len(planned.prompt.split()), planned.num_output) for planned in plan} == set(MIX)
    assert sum(planned.num_output for planned in plan) / 300 == pytest.approx(MEAN_OUTPUT, rel=0.1)
