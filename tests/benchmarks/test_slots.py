"""Above 98 % of the slots compute at saturation, and what the benchmark counts is what the replicas did."""

from __future__ import annotations

import pytest

from benchmarks.slots import NUM_OUTPUT, Share, measure


def test_with_a_lookahead_of_one_every_slot_computes_at_saturation() -> None:
    row = measure(1, 0.003, 10.0)
    assert row.computing > 0.98
    assert row.reported == pytest.approx(1 - 1 / NUM_OUTPUT, abs=0.02), "each request seems to leave one step unused"


def test_without_lookahead_the_round_trip_of_a_grant_costs_slots() -> None:
    assert measure(0, 0.003, 10.0).computing < 0.98


def test_a_share_is_the_mean_over_the_time_after_the_warm_up() -> None:
    share = Share()
    share.put(8.0, 10.0)  # in the warm-up
    share.put(4.0, 25.0)
    assert share.mean(8, 30.0) == pytest.approx((8 * 5 + 4 * 5) / 8 / 10)
