"""Cost functions against the numbers they are defined by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.fairness.cost import CostFunction, KvTokenTime, ProfiledQuadratic, WeightedTokens

COSTS = [WeightedTokens(), WeightedTokens(3.0, 0.5, 0.25), ProfiledQuadratic(), KvTokenTime()]
tokens = st.integers(0, 2_000)


def test_weighted_tokens_count_an_output_token_twice_by_default() -> None:
    assert WeightedTokens().service(100, 10) == 120


def test_a_cached_input_token_is_free_by_default_and_counts_its_fraction_when_told_to() -> None:
    assert WeightedTokens().service(100, 10, num_cached=60) == 60
    assert WeightedTokens(cached_fraction=0.5).service(100, 10, num_cached=60) == 90
    assert WeightedTokens(cached_fraction=1.0).service(100, 10, num_cached=60) == 120


def test_the_profiled_quadratic_is_the_fit_of_the_paper() -> None:
    fit = 0.21001891 * 256 + 0.10075395 * 128 + 0.0039868 * 256 * 128 + 0.00324733 * 128**2 + 1.14601454
    assert ProfiledQuadratic().service(256, 128) == pytest.approx(fit)


def test_kv_token_time_is_the_memory_held_over_the_steps_of_the_answer() -> None:
    assert KvTokenTime().service(10, 4) == 10 + 10 * 4 + 4 * 4 / 2


@pytest.mark.parametrize("cost", COSTS)
def test_nothing_costs_nothing(cost: CostFunction) -> None:
    assert cost.service(0, 0) == 0


@pytest.mark.parametrize("cost", COSTS)
@given(num_input=tokens, num_output=tokens)
def test_one_more_token_never_costs_less(cost: CostFunction, num_input: int, num_output: int) -> None:
    here = cost.service(num_input, num_output)
    assert cost.service(num_input + 1, num_output) >= here
    assert cost.service(num_input, num_output + 1) >= here
    assert cost.service(num_input + 1, num_output, num_cached=1) >= here - 1e-9


@pytest.mark.parametrize("cost", COSTS)
@given(num_input=tokens, num_output=st.integers(1, 200), num_cached=tokens)
def test_charges_token_by_token_add_up_to_the_whole(
    cost: CostFunction, num_input: int, num_output: int, num_cached: int
) -> None:
    cached = min(num_cached, num_input)
    steps = [
        cost.service(num_input, i, cached) - cost.service(num_input, i - 1, cached) for i in range(1, num_output + 1)
    ]
    total = cost.service(num_input, 0, cached) + sum(steps)
    assert total == pytest.approx(cost.service(num_input, num_output, cached))
