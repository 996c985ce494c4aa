"""What every replica can still take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.messages import StepReport


@pytest.fixture
def capacity() -> Iterator[Capacity]:
    capacity = Capacity(lookahead=0, stale_s=5.0)
    yield capacity
    capacity.check()


def hear(
    capacity: Capacity, name: str, kv: int, slots: int, now_s: float = 0.0, whole: int = 1_000, incarnation: int = 1
) -> None:
    capacity.report(StepReport(name, incarnation, 1, 1, kv, slots, whole, 4), now_s)


def best(capacity: Capacity, need: int, now_s: float = 0.0) -> str | None:
    room = capacity.best_for(need, now_s)
    return None if room is None else room.name


def test_a_free_running_slot_comes_before_a_place_in_a_local_queue() -> None:
    capacity = Capacity(lookahead=1, stale_s=5.0)
    hear(capacity, "full", kv=900, slots=0)
    hear(capacity, "free", kv=100, slots=1)
    assert best(capacity, 50) == "free"


def test_among_free_replicas_the_one_with_most_kv_is_chosen_then_most_slots_then_the_first_name(
    capacity: Capacity,
) -> None:
    hear(capacity, "c", kv=500, slots=1)
    hear(capacity, "b", kv=500, slots=2)
    hear(capacity, "a", kv=400, slots=4)
    assert best(capacity, 50) == "b"
    hear(capacity, "c", kv=500, slots=2)
    assert best(capacity, 50) == "b"


def test_a_grant_in_flight_takes_room_until_it_is_released(capacity: Capacity) -> None:
    hear(capacity, "r0", kv=100, slots=2)
    capacity.reserve("r0", "a", 60)
    assert (best(capacity, 41), best(capacity, 40)) == (None, "r0")
    capacity.reserve("r0", "b", 40)
    assert best(capacity, 0) is None, "no slot is left"
    capacity.release("r0", "a")
    capacity.release("r0", "a")
    assert best(capacity, 60) == "r0"


def test_a_report_does_not_forget_what_is_in_flight(capacity: Capacity) -> None:
    hear(capacity, "r0", kv=100, slots=2)
    capacity.reserve("r0", "a", 60)
    hear(capacity, "r0", kv=100, slots=2)
    assert best(capacity, 60) is None


def test_a_new_incarnation_begins_with_nothing_reserved(capacity: Capacity) -> None:
    hear(capacity, "r0", kv=100, slots=2)
    capacity.reserve("r0", "a", 60)
    hear(capacity, "r0", kv=100, slots=2, incarnation=2)
    assert best(capacity, 100) == "r0"


@pytest.mark.parametrize(("lookahead", "num_taken"), [(0, 2), (1, 3), (2, 4)])
def test_the_lookahead_is_what_may_wait_beyond_the_running_slots(lookahead: int, num_taken: int) -> None:
    capacity = Capacity(lookahead, stale_s=5.0)
    hear(capacity, "r0", kv=1_000, slots=2)
    taken = 0
    while best(capacity, 1) is not None:
        capacity.reserve("r0", f"q{taken}", 1)
        taken += 1
    assert taken == num_taken


def test_a_silent_replica_gets_nothing_until_it_speaks_again(capacity: Capacity) -> None:
    hear(capacity, "r0", kv=100, slots=1, now_s=0.0)
    assert best(capacity, 1, now_s=5.0) == "r0"
    assert best(capacity, 1, now_s=5.1) is None
    hear(capacity, "r0", kv=100, slots=1, now_s=6.0)
    assert best(capacity, 1, now_s=6.0) == "r0"


def test_a_suspended_replica_gets_nothing_for_a_while(capacity: Capacity) -> None:
    hear(capacity, "r0", kv=100, slots=1)
    capacity.suspend("r0", until_s=1.0)
    capacity.suspend("unknown", until_s=1.0)
    assert best(capacity, 1, now_s=0.5) is None
    hear(capacity, "r0", kv=100, slots=1, now_s=0.6)
    assert best(capacity, 1, now_s=0.7) is None, "a report does not end the pause"
    assert best(capacity, 1, now_s=1.0) == "r0"


def test_a_request_larger_than_any_replica_goes_to_the_largest_once_it_is_empty(capacity: Capacity) -> None:
    hear(capacity, "small", kv=100, slots=1, whole=100)
    hear(capacity, "large", kv=399, slots=1, whole=400)
    assert best(capacity, 5_000) is None
    hear(capacity, "large", kv=400, slots=1, whole=400)
    assert best(capacity, 5_000) == "large"
    capacity.reserve("large", "a", 5_000)
    assert best(capacity, 400) is None


def test_a_request_that_only_a_large_replica_can_hold_never_goes_to_a_small_one(capacity: Capacity) -> None:
    hear(capacity, "small", kv=100, slots=4, whole=100)
    hear(capacity, "large", kv=200, slots=1, whole=400)
    assert best(capacity, 300) is None
    assert best(capacity, 150) == "large"


def test_a_dead_large_replica_does_not_block_the_others(capacity: Capacity) -> None:
    hear(capacity, "large", kv=400, slots=1, whole=400, now_s=0.0)
    hear(capacity, "small", kv=100, slots=4, whole=100, now_s=9.0)
    assert best(capacity, 300, now_s=9.0) == "small"


def test_asking_changes_nothing_and_a_forgotten_replica_is_gone(capacity: Capacity) -> None:
    assert (len(capacity), capacity.largest_kv_tokens, best(capacity, 1)) == (0, None, None)
    hear(capacity, "r0", kv=100, slots=1, whole=700)
    assert [best(capacity, 100) for _ in range(3)] == ["r0"] * 3
    assert capacity.largest_kv_tokens == 700
    capacity.forget("r0")
    capacity.forget("r0")
    assert (len(capacity), capacity.get("r0")) == (0, None)


def test_a_new_life_with_the_same_numbers_stands_where_its_former_one_stood(capacity: Capacity) -> None:
    for name in ("a", "b", "c"):
        hear(capacity, name, kv=500, slots=2)
    for incarnation in (2, 3):
        hear(capacity, "a", kv=500, slots=2, incarnation=incarnation)
        room = capacity.best_for(1, 0.0)
        assert room is not None and (room.name, room.incarnation) == ("a", incarnation)
    capacity.reserve("a", "x", 100)
    assert best(capacity, 1) == "b"
