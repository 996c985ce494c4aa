"""The measures of unfairness: Jain's index, the gap monitor, the bound tracker."""

from __future__ import annotations

from itertools import combinations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.fairness.bounds import BoundTracker, GapMonitor, jain

# -- Jain --------------------------------------------------------------------------------------------------------------


def test_jains_index_is_one_for_equal_shares_and_one_over_n_for_a_monopoly() -> None:
    assert jain([3, 3, 3]) == 1
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)


def test_jains_index_of_nobody_and_of_nothing_is_one() -> None:
    assert jain([]) == 1
    assert jain([0, 0]) == 1


@given(st.lists(st.floats(0.001, 1e3), min_size=1, max_size=8), st.floats(0.01, 100))
def test_jains_index_lies_between_one_over_n_and_one_and_ignores_the_unit(values: list[float], unit: float) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9
    assert jain([unit * value for value in values]) == pytest.approx(jain(values))


# -- the gap monitor ---------------------------------------------------------------------------------------------------

CLIENTS = "abcd"
moves = st.lists(
    st.dictionaries(st.sampled_from(CLIENTS), st.tuples(st.booleans(), st.integers(-3, 20)), min_size=1), max_size=40
)


def worst_by_hand(history: list[tuple[dict[str, float], set[str]]]) -> float:
    """Over all pairs and all intervals of the history in which both wait throughout."""
    worst = 0.0
    for one, two in combinations(CLIENTS, 2):
        for begin in range(len(history)):
            for end in range(begin, len(history)):
                if not {one, two} <= history[end][1]:
                    break
                start, stop = history[begin][0], history[end][0]
                worst = max(worst, abs((stop[one] - start[one]) - (stop[two] - start[two])))
    return worst


@settings(max_examples=100, deadline=None)
@given(moves)
def test_the_worst_gap_is_that_of_all_intervals_tried_one_by_one(steps: list[dict[str, tuple[bool, int]]]) -> None:
    monitor = GapMonitor()
    service = dict.fromkeys(CLIENTS, 0.0)
    waiting: set[str] = set()
    history = []
    for step in steps:
        for client, (waits, amount) in step.items():
            service[client] += amount
            waiting.add(client) if waits else waiting.discard(client)
        monitor.observe({client: service[client] for client in step}, waiting.__contains__)
        history.append((dict(service), set(waiting)))
    assert monitor.worst == worst_by_hand(history)


def test_service_before_both_wait_and_after_one_left_does_not_count() -> None:
    monitor = GapMonitor()
    monitor.observe({"a": 1_000.0, "b": 0.0}, lambda _: True)
    monitor.observe({"a": 1_010.0}, lambda _: True)
    monitor.observe({"a": 1_010.0}, lambda client: client != "a")
    monitor.observe({"a": 5_000.0}, lambda _: True)
    monitor.observe({"b": 3.0}, lambda _: True)
    assert (monitor.worst, monitor.worst_pair) == (10.0, ("a", "b"))


def test_a_gap_that_swings_counts_from_one_side_to_the_other() -> None:
    monitor = GapMonitor()
    for a, b in [(0, 0), (8, 0), (8, 15)]:
        monitor.observe({"a": float(a), "b": float(b)}, lambda _: True)
    assert monitor.worst == 15


def test_clients_beyond_the_limit_are_not_watched_until_there_is_room_and_that_is_told() -> None:
    monitor = GapMonitor(max_clients=2)
    monitor.observe({"a": 0.0, "b": 0.0, "c": 0.0}, lambda _: True)
    assert monitor.num_unwatched == 1
    monitor.observe({"c": 100.0}, lambda _: True)
    assert (monitor.worst, monitor.num_unwatched) == (0.0, 2)
    monitor.observe({"a": 0.0, "c": 100.0}, lambda client: client != "a")
    monitor.observe({"c": 107.0}, lambda _: True)
    assert (monitor.worst, monitor.worst_pair) == (7.0, ("b", "c"))


def test_the_monitor_keeps_nothing_of_clients_that_left() -> None:
    monitor = GapMonitor()
    for i in range(100):
        monitor.observe({f"c{i}": 0.0, "stays": float(i)}, lambda _: True)
        monitor.observe({f"c{i}": 1.0}, lambda client: client == "stays")
    assert list(monitor._watched) == ["stays"]
    assert (len(monitor._lead), len(monitor._free), monitor._service.count(inf)) == (2, 1, 1)


# -- the bound tracker -------------------------------------------------------------------------------------------------


def test_the_bound_is_twice_the_greatest_grant_plus_what_was_owed() -> None:
    bounds = BoundTracker()
    bounds.saw_grant(10, 40)
    bounds.saw_grant(30, 15)
    assert (bounds.unit, bounds.staleness, bounds.bound) == (50, 0, 100)


def test_staleness_adds_the_worst_merge_of_every_replica_and_the_input_in_flight() -> None:
    bounds = BoundTracker()
    for replica, amount in [("r0", 5.0), ("r1", 7.0), ("r0", 3.0), ("r0", -4.0)]:
        bounds.saw_merge(replica, amount)
    bounds.saw_in_flight(100)
    bounds.saw_in_flight(60)
    assert bounds.staleness == 5 + 7 + 100


def test_replicas_that_come_and_go_do_not_add_up_for_ever() -> None:
    bounds = BoundTracker()
    for i in range(50):
        bounds.saw_merge(f"r{i}", 5.0)
        bounds.lost_replica(f"r{i}")
    assert bounds.staleness == 5
    assert not bounds._unmerged


def test_a_lost_replica_does_not_shrink_a_bound_that_was_needed_once() -> None:
    bounds = BoundTracker()
    bounds.saw_merge("r0", 5.0)
    bounds.saw_merge("r1", 5.0)
    bounds.lost_replica("r0")
    assert bounds.staleness == 10


def test_returned_charges_widen_the_bound_by_what_they_lowered_the_level() -> None:
    bounds = BoundTracker()
    bounds.saw_return(100, 70)
    assert bounds.staleness == 30
    bounds.saw_return(90, 60)  # rose by 20 in between: 40 below the highest
    assert bounds.staleness == 40
    bounds.saw_return(200, 190)
    assert bounds.staleness == 40


def test_a_level_that_falls_without_a_return_is_not_excused() -> None:
    bounds = BoundTracker()
    bounds.saw_return(100, 100)
    bounds.saw_return(20, 20)  # somebody came in below: a lift was missing
    assert bounds.staleness == 0
