"""The fairness bounds, on random runs in which some clients sleep and come back, measured on *delivered* service.

A few runs per bound; ``python -m tests.properties.run_bounds`` makes ten thousand. ``test_mutations`` shows that they
can fail.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit
from tests.properties.bound_runs import CLIENTS, FAMILIES, W_Q, Check, habits, violations
from tests.properties.crowd import Crowd, Habit, Watch
from tests.properties.run_bounds import main
from tests.toy_cluster import ToyCluster

KV = 60


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bound_holds_in_short_random_runs(family: str) -> None:
    assert violations(family, range(1_000_000, 1_000_040)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bound_holds_in_long_random_runs(family: str) -> None:
    assert violations(family, range(2_000_000, 2_000_003), steps=800) == []


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), with_snapshot=st.booleans(), num_replicas=st.integers(1, 2))
def test_killing_the_authority_widens_the_gap_by_a_bounded_amount(
    seed: int, with_snapshot: bool, num_replicas: int
) -> None:
    """Before and after, the paper's bound holds; across the crash it holds once more. A newcomer of just before the
    crash has far less in the replicas' totals than the others: it must not get all of that now."""
    rng = random.Random(seed)
    cluster = ToyCluster(num_replicas=num_replicas, num_routers=2, kv_tokens=KV)
    weights = dict.fromkeys(CLIENTS, 1.0)
    watch = Watch(cluster, {**weights, "late": 1.0})
    crowd = Crowd(cluster, habits(rng, weights, KV), rng)
    crowd.run(300)
    crowd.habits.append(Habit("late"))
    crowd.run(30)
    cluster.crash_authority(snapshot=with_snapshot)
    watch.attach()
    crowd.run(300)
    assert watch.worst_pair <= 2 * 2 * W_Q * KV * num_replicas


def test_the_command_prints_every_bound_and_keeps_the_figures(tmp_path: Path, capsys: Any) -> None:
    assert main(["--runs", "2", "--jobs", "1", "--bound", "weighted", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("bounds-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["bound"] in printed
        assert (row["runs"], row["violations"]) == (2, 0)
        assert 0 < row["worst_ratio"] <= 1


def test_the_command_exits_with_1_and_names_the_seed_when_a_bound_breaks(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(FAMILIES, "paper", lambda seed, steps=0: [Check("a bound", float(seed), 2.0)])
    assert main(["--runs", "4", "--jobs", "1", "--bound", "paper"]) == 1
    assert "seed 3" in capsys.readouterr().err


def test_charges_that_return_one_after_the_other_are_part_of_the_bound() -> None:
    """Each client in turn is lifted to the level, and then its own input in flight returns and lowers the level for the
    next. The level falls by one charge per client, so the last to come has that much to catch up."""
    desk = Desk()
    router, slow = desk.router(), desk.replica("slow", slots=8)
    chain = [f"x{i}" for i in range(6)]
    router.call(*(submit(f"{client}-early", client, num_input=100, max_output=1) for client in chain))
    slow.report(received=tuple(f"{client}-early" for client in chain), free_slots=0)  # they never start there
    fast = desk.replica("fast", slots=1)
    serve_one_by_one(router, fast, 12, only=("base",))
    router.call(submit("base-last", "base", num_input=100, max_output=1), submit("x0-late", "x0"))
    for client, following in pairwise([*chain, "late"]):
        before = desk.counter(client)
        router.call(cancels=(f"{client}-early",))
        assert desk.counter(client) == before - 100
        router.call(submit(f"{following}-late", following))
        router.call(cancels=(f"{client}-late",))
    serve_one_by_one(router, fast, 12, only=("base", "late"))
    desk.check()
    bounds, worst = desk.dispatcher.bounds, desk.dispatcher.gaps.worst
    assert worst > 2 * (bounds.unit + bounds.staleness - bounds.returned), "what returned is needed"
    assert worst <= bounds.bound


def serve_one_by_one(router: RouterVoice, replica: ReplicaVoice, num: int, only: tuple[str, ...]) -> None:
    """``only`` these clients always wait; ``replica``, with its one slot, runs what it is granted, at once."""
    desk = router.desk
    for i in range(num):
        router.call(*(submit(f"{client}-{replica.seq}-{i}", client, num_input=100, max_output=1) for client in only))
        mine = {r: lease for r, lease in desk.dispatcher.leases.items() if lease.replica == replica.name}
        clients = [lease.waiting.submit.client for lease in mine.values()]
        ids = tuple(mine)
        replica.report(received=ids, started=ids, finished=ids, served=dict.fromkeys(clients, (100, 1)))
    granted = tuple(r for r, lease in desk.dispatcher.leases.items() if lease.replica == replica.name)
    replica.report(received=granted, free_slots=0)
