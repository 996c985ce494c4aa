"""How much work there is, in batchfuls, and how many replicas it wants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fairserve.dispatch.demand import Demand, demand, wanted_replicas
from tests.dispatch.kit import Desk, submit

IDLE = Demand(2, 8, 2_000, num_running=0, used_tokens=0, num_waiting=0, waiting_tokens=0)


def wanted(seen: Demand, target_use: float = 1.0, per_batch: float = 1.0) -> float:
    return wanted_replicas(seen, target_use=target_use, replicas_per_waiting_batch=per_batch)


def test_a_batchful_is_all_slots_of_a_replica_or_all_its_kv_cache() -> None:
    assert replace(IDLE, num_running=4, used_tokens=10).running_batches() == 1
    assert replace(IDLE, num_running=1, used_tokens=1_000).running_batches() == 1
    assert replace(IDLE, num_waiting=12, waiting_tokens=12).waiting_batches() == 3


def test_nothing_to_do_wants_no_replica() -> None:
    assert wanted(IDLE) == 0


def test_running_work_wants_the_replicas_that_it_fills_to_the_target() -> None:
    assert wanted(replace(IDLE, num_running=4), target_use=0.5) == 2


def test_waiting_work_wants_more_the_more_tokens_wait() -> None:
    few = replace(IDLE, num_running=8, num_waiting=4, waiting_tokens=100)
    assert wanted(few, per_batch=0.5) == 2.5
    assert wanted(replace(few, waiting_tokens=6_000), per_batch=0.5) == 2 + 0.5 * 6


def test_without_a_replica_anything_that_waits_wants_one() -> None:
    none = replace(IDLE, num_replicas=0, max_slots=0, kv_capacity_tokens=0)
    assert wanted(none) == 0
    assert wanted(replace(none, num_waiting=7, waiting_tokens=900)) == 1


def test_the_dispatcher_counts_what_runs_and_what_waits(desk: Desk) -> None:
    router = desk.router()
    desk.replica("r0", slots=2, kv=100)
    router.call(*(submit(f"q{i}", num_input=10, max_output=20) for i in range(5)))
    seen = demand(desk.dispatcher, desk.now_s)
    assert (seen.num_replicas, seen.max_slots, seen.kv_capacity_tokens) == (1, 2, 100)
    assert (seen.num_running, seen.used_tokens) == (2, 60)
    assert (seen.num_waiting, seen.waiting_tokens) == (3, 90)


@pytest.mark.parametrize("reserve", [None, 5])
def test_waiting_tokens_are_those_that_a_grant_would_reserve(reserve: int | None) -> None:
    desk = Desk(reserve_output_tokens=reserve)
    desk.router().call(submit("q", num_input=10, max_output=20))
    assert demand(desk.dispatcher, desk.now_s).waiting_tokens == 10 + (reserve or 20)


def test_a_silent_replica_is_not_counted(desk: Desk) -> None:
    desk.replica("r0", slots=2, kv=100)
    desk.clock.advance(desk.limits.replica_stale_s + 1)
    assert demand(desk.dispatcher, desk.now_s).num_replicas == 0
