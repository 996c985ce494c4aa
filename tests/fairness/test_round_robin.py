"""Round robin: one request of each client in turn, blind to cost; the foil of every policy that counts."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fairserve.fairness.baselines import RoundRobin
from fairserve.fairness.queue import FairQueue


def test_clients_take_turns_whatever_their_requests_cost() -> None:
    queue: FairQueue[str] = FairQueue(RoundRobin())
    for i in range(4):
        for client in ("ann", "bob", "cyd"):
            queue.arrive(client, f"{client}{i}", f"{client}{i}", i)
    order = []
    for _ in range(12):
        order.append(queue.pop())
        queue.charge(order[-1][:3], 1_000.0 if order[-1].startswith("ann") else 1.0)
    assert order == [f"{client}{i}" for i in range(4) for client in ("ann", "bob", "cyd")]


def test_who_was_away_goes_next_once() -> None:
    queue: FairQueue[str] = FairQueue(RoundRobin())
    for i in range(6):
        queue.arrive("ann", f"a{i}", f"a{i}", i)
        queue.arrive("bob", f"b{i}", f"b{i}", i)
    assert [queue.pop() for _ in range(5)] == ["a0", "b0", "a1", "b1", "a2"]
    for i in range(3):
        queue.arrive("new", f"n{i}", f"n{i}", 9.0)
    assert [queue.pop() for _ in range(5)] == ["n0", "b2", "a3", "n1", "b3"]


def test_groups_take_turns_and_so_do_their_members() -> None:
    queue: FairQueue[str] = FairQueue(RoundRobin())
    for i in range(4):
        for client in ("acme/ann", "acme/bob", "solo"):
            queue.arrive(client, f"{client}{i}", f"{client}{i}", i)
    assert [queue.pop() for _ in range(7)] == [
        "acme/ann0",
        "solo0",
        "acme/bob0",
        "solo1",
        "acme/ann1",
        "solo2",
        "acme/bob1",
    ]


@given(seed=st.integers(0, 10**6))
def test_nobody_who_waits_is_passed_over_twice(seed: int) -> None:
    rng = random.Random(seed)
    queue: FairQueue[str] = FairQueue(RoundRobin())
    passed: dict[str, list[str]] = {}
    for i in range(120):
        client = rng.choice("abcde")
        if rng.random() < 0.5:
            queue.arrive(client, f"{client}{i}", f"{client}{i}", rng.randrange(9))
            passed.setdefault(client, [])
        elif len(queue):
            picked = queue.pop()[0]
            del passed[picked]
            for waiting, others in passed.items():
                others.append(picked)
                assert others.count(picked) <= 1, waiting
            if queue.is_waiting(picked):
                passed[picked] = []
        queue.check()
