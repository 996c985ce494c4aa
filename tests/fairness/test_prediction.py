"""Predictors: the moving mean is the paper's, and nobody's hint is believed where it must not be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.errors import ConfigError
from fairserve.fairness.prediction import PREDICTORS, Foretold, MovingMean, NoPrediction, make_predictor

lengths = st.lists(st.integers(0, 5_000), min_size=1, max_size=30)


def test_the_mean_moves_a_fifth_of_the_way_to_each_new_length() -> None:
    predictor = MovingMean()
    for num_output, expected in ((100, 100), (200, 120), (0, 96), (96, 96)):
        predictor.learn("ann", "", num_output)
        assert predictor.predict("ann", "", None) == pytest.approx(expected)


@given(seen=lengths)
def test_the_mean_stays_between_the_shortest_and_the_longest(seen: list[int]) -> None:
    predictor = MovingMean()
    for num_output in seen:
        predictor.learn("ann", "", num_output)
        assert min(seen) - 1e-9 <= predictor.predict("ann", "", None) <= max(seen) + 1e-9


def test_before_anybody_has_finished_nothing_is_foretold() -> None:
    assert MovingMean().predict("ann", "", None) == 0


def test_a_newcomer_is_charged_what_answers_come_to_on_the_whole() -> None:
    predictor = MovingMean()
    for _ in range(10):
        predictor.learn("ann", "", 300)
        predictor.learn("bob", "", 100)
    assert 150 < predictor.predict("newcomer", "", None) <= 300


def test_one_client_moves_no_other_clients_mean() -> None:
    predictor = MovingMean()
    predictor.learn("ann", "", 300)
    for _ in range(100):
        predictor.learn("liar", "", 1)
    assert predictor.predict("ann", "", None) == 300


def test_each_application_of_a_client_has_its_own_mean() -> None:
    predictor = MovingMean()
    predictor.learn("ann", "chat", 300)
    predictor.learn("ann", "code", 20)
    assert predictor.predict("ann", "chat", None) == 300
    assert predictor.predict("ann", "code", None) == 20
    assert predictor.predict("ann", "", None) not in (300, 20), "no application is one of its own"


@pytest.mark.parametrize("name", ["none", "moving_mean"])
@given(seen=lengths, hint=st.integers(0, 10**9))
def test_what_a_request_says_of_itself_is_not_believed(name: str, seen: list[int], hint: int) -> None:
    predictor = make_predictor(name)
    for num_output in seen:
        predictor.learn("ann", "", num_output)
    assert predictor.predict("ann", "", hint) == predictor.predict("ann", "", None)


def test_foretold_believes_the_hint_and_knows_nothing_without_one() -> None:
    predictor = Foretold()
    predictor.learn("ann", "", 50)
    assert predictor.predict("ann", "", 77) == 77
    assert predictor.predict("ann", "", None) == 0


def test_predictors_are_made_by_name_anew_each_time() -> None:
    for name, cls in PREDICTORS.items():
        assert type(make_predictor(name)) is cls
    assert make_predictor("moving_mean") is not make_predictor("moving_mean")
    assert make_predictor("none").predict("ann", "", 9) == NoPrediction().predict("ann", "", 9) == 0


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown prediction 'oracle': known are none, moving_mean, foretold"):
        make_predictor("oracle")
