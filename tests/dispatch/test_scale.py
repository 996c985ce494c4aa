"""How work grows with clients and replicas. Calls and comparisons are counted, nothing is timed."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.crowd import SLOTS, Crowd, Size
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.messages import StepReport
from fairserve.dispatch.prefixes import PrefixMap
from fairserve.fairness.policy import Policy
from fairserve.fairness.queue import FairQueue
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients

GRANTS = 4 * SLOTS


class Key(int):
    """A number that counts how often it is compared."""

    num_compared = 0

    def __lt__(self, other: int) -> bool:
        Key.num_compared += 1
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        Key.num_compared += 1
        return int(self) <= int(other)

    def __eq__(self, other: object) -> bool:
        Key.num_compared += 1
        return isinstance(other, int) and int(self) == int(other)

    __hash__ = int.__hash__

    def __rsub__(self, other: int) -> Key:
        return Key(other - int(self))


class KeyedVtc(Vtc):
    def order(self, client: str, waiting: WaitingClients) -> Key:
        return Key(waiting.counter(client))


class NoVtc(Policy):
    """Asked for an order, it fails the test."""

    def order(self, client: str, waiting: WaitingClients) -> float:
        raise AssertionError(f"who asks for the order of {client}?")


def calls(act: Callable[[], object]) -> Counter[str]:
    """Python functions called by ``act``, by name."""
    counted: Counter[str] = Counter()

    def count(frame: Any, event: str, _: object) -> None:
        if event == "call":
            counted[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return counted


def grant_calls(size: Size) -> float:
    """Per grant, in the second round."""
    crowd = Crowd(size)
    crowd.run(0)
    before = crowd.dispatcher.num_granted
    counted = calls(crowd.grant)
    of_the_crowd = sum(num for name, num in counted.items() if name.startswith("Crowd."))
    return (counted.total() - of_the_crowd) / (crowd.dispatcher.num_granted - before)


def comparisons_per_pick(num_clients: int) -> float:
    """Clients at counters that all differ, each pick charged at random: VTC's life."""
    queue: FairQueue[str] = FairQueue(KeyedVtc())
    for i in range(num_clients):
        queue.register(f"client-{i}")
        queue.set_counter(f"client-{i}", i * 7919 % num_clients * 10.0)
        for j in range(3 + 1_000 // num_clients):
            queue.arrive(f"client-{i}", f"{i}-{j}", f"client-{i}", j, lift=False)
    queue.peek()
    Key.num_compared = 0
    for i in range(1_000):
        queue.charge(queue.pop(), 100.0 * num_clients * (i * 31 % 97) / 97)
    return Key.num_compared / 1_000


def comparisons_per_room(num_replicas: int) -> float:
    """Replicas of all degrees of fullness, each choice followed by a reservation; reports come in between."""
    capacity = Capacity(lookahead=0, stale_s=10.0)

    def report(i: int, seq: int, free: int) -> None:
        capacity.report(StepReport(f"r{i}", 1, seq, 1, Key(free), 1_000, 10**6, 1_000), 0.0)

    for i in range(num_replicas):
        report(i, 1, i * 7919 % num_replicas * 1_000 + 10_000)
    capacity.best_for(1, 0.0)
    Key.num_compared = 0
    for i in range(1_000):
        room = capacity.best_for(1, 0.0)
        assert room is not None
        capacity.reserve(room.name, f"request-{i}", 500 + i * 31 % 97)
        report(i * 61 % num_replicas, i + 2, i * 37 % num_replicas * 1_000 + 10_000)
    capacity.check()
    return Key.num_compared / 1_000


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("policy", ["vtc", "dlpm"])
def test_a_grant_calls_as_many_functions_among_three_times_the_clients(policy: str, levels: int) -> None:
    few, many = (grant_calls(Size(num, num, 4, policy, levels)) for num in (800, 2_400))
    assert many <= 1.1 * few


def test_a_grant_calls_as_many_functions_among_ten_times_the_replicas() -> None:
    few, many = (grant_calls(Size(300, 300, num)) for num in (3, 30))
    assert many <= 1.1 * few


def test_known_clients_that_do_not_wait_cost_a_grant_nothing() -> None:
    few, many = (grant_calls(Size(num, 300, 4)) for num in (300, 3_000))
    assert many <= 1.01 * few


@pytest.mark.parametrize("measure", [comparisons_per_pick, comparisons_per_room])
def test_comparisons_grow_with_the_logarithm(measure: Callable[[int], float]) -> None:
    for num in (100, 1_000, 3_000):
        assert measure(num) <= 6 * math.log2(num) + 10


@pytest.mark.parametrize("policy", ["vtc", "vtc+moving_mean"])
def test_a_step_report_costs_the_same_whoever_else_waits_and_whatever_other_replicas_there_are(policy: str) -> None:
    def step_calls(size: Size) -> int:
        crowd = Crowd(size)
        crowd.grant()
        crowd.start()
        crowd.step()
        crowd.dispatcher.watch.gaps.clear()  # watches up to 64 clients: its work depends on who is among them
        report = crowd._compose(0, totals=crowd._serve(0, [(one.client, 0, 1) for one in crowd._running[0]]))
        return calls(lambda: crowd.dispatcher.report(report, crowd.now_s)).total()

    small = step_calls(Size(200, 200, 2, policy))
    assert step_calls(Size(1_000, 1_000, 2, policy)) <= 1.02 * small
    assert step_calls(Size(1_000, 1_000, 10, policy)) <= 1.02 * small


def test_a_charge_moves_nothing_in_the_heap_of_those_that_wait() -> None:
    queue: FairQueue[str] = FairQueue(Vtc())
    for i in range(1_000):
        queue.arrive(f"client-{i}", f"{i}", "", 0.0)
    heap = queue.groups[""]._heap
    before = list(heap)
    for i in range(1_000):
        queue.charge(f"client-{i}", 10.0 * i)
    assert heap == before
    assert queue.least_served() == "client-0"
    queue.check()


def test_when_no_replica_has_room_nobody_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(Size(200, 200, 2, "dlpm"))
    crowd.grant()

    def fail(*_: object) -> None:
        raise AssertionError("matched although nothing can be placed")

    monkeypatch.setattr(PrefixMap, "num_known", fail)
    crowd.dispatcher.dispatch(crowd.now_s)
    crowd.dispatcher.queue.policy = NoVtc()
    crowd.dispatcher.dispatch(crowd.now_s)


def test_prompts_that_could_not_be_the_longest_match_are_not_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(Size(200, 200, 2, "dlpm"))
    for _ in range(6):
        crowd.run(0)  # in the end every client's prefix is known somewhere
    matched: list[object] = []
    num_known = PrefixMap.num_known

    def counted(self: PrefixMap, prefix: tuple[int, ...], replica: str, beyond: int = 0) -> int:
        num = num_known(self, prefix, replica, beyond)
        matched.extend([prefix] * (num > 0))  # else it took one look
        return num

    monkeypatch.setattr(PrefixMap, "num_known", counted)
    before = crowd.dispatcher.num_granted
    crowd.grant()
    assert len(matched) <= 3 * (crowd.dispatcher.num_granted - before)


@pytest.mark.parametrize("policy", ["vtc", "dlpm"])
@pytest.mark.parametrize("levels", [1, 3])
def test_the_crowd_of_the_benchmark_keeps_every_invariant(policy: str, levels: int) -> None:
    crowd = Crowd(Size(300, 200, 3, policy, levels))
    for _ in range(3):
        crowd.run(GRANTS, num_steps=1)
        crowd.dispatcher.check()
    assert crowd.dispatcher.queue.backlog.num_clients == 200
