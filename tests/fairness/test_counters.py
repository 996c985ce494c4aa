"""CounterTable: plain arithmetic on counters and weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.fairness.counters import CounterTable

amounts = st.floats(0, 1e6)


@pytest.fixture
def table() -> Iterator[CounterTable]:
    table = CounterTable()
    table.register("ann")
    table.register("bob", weight=4.0)
    yield table
    table.check()


def test_what_is_added_moves_the_counter_of_that_client_and_a_negative_amount_takes_it_back(
    table: CounterTable,
) -> None:
    table.add("ann", 100)
    table.add("bob", 25)
    assert (table.counter("ann"), table.counter("bob")) == (100, 25)
    table.add("bob", -25)
    assert (table.counter("ann"), table.counter("bob")) == (100, 0)


def test_a_new_weight_leaves_earlier_charges_as_they_were(table: CounterTable) -> None:
    table.add("bob", 25)
    table.register("bob", weight=2.0)
    assert (table.counter("bob"), table.weight("bob")) == (25, 2.0)


@given(own=amounts, to=amounts)
def test_a_lift_never_lowers_and_tells_by_how_much_it_rose(own: float, to: float) -> None:
    table = CounterTable()
    table.register("ann")
    table.set("ann", own)
    rise = table.lift("ann", to)
    assert table.counter("ann") == max(own, to)
    assert rise == max(0.0, to - own)


def test_rebasing_keeps_every_difference_and_brings_the_least_to_zero(table: CounterTable) -> None:
    table.set("ann", 1e9 + 7)
    table.set("bob", 1e9 + 10)
    assert table.rebase() == 1e9 + 7
    assert (table.counter("ann"), table.counter("bob")) == (0, 3)
    assert table.rebase() == 0


def test_rebasing_an_empty_table_takes_nothing() -> None:
    assert CounterTable().rebase() == 0


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_must_be_positive_and_finite(table: CounterTable, weight: float) -> None:
    with pytest.raises(ValueError, match="weight of client 'eve'"):
        table.register("eve", weight)
    assert "eve" not in table


@pytest.mark.parametrize("counter", [math.inf, -math.inf, math.nan])
def test_a_counter_taken_over_from_elsewhere_must_be_finite(table: CounterTable, counter: float) -> None:
    with pytest.raises(ValueError, match="counter of client 'ann'"):
        table.set("ann", counter)


def test_an_unknown_client_stands_at_zero_with_weight_one() -> None:
    table = CounterTable()
    assert (table.counter("eve"), table.weight("eve"), len(table), "eve" in table) == (0, 1, 0, False)


def test_a_counter_may_be_taken_over_for_a_client_not_seen_before() -> None:
    table = CounterTable()
    table.set("eve", 5.0)
    assert list(table) == ["eve"]
    assert table.weight("eve") == 1.0
    table.check()
