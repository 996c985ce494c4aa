"""A cut is of one moment, told in slices, and tells only what changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fairserve.dispatch import cut as cut_module
from fairserve.dispatch import ledger as ledger_module
from fairserve.dispatch.cut import Changes
from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.replica_book import KEPT_ACCOUNTS
from tests.dispatch.kit import Desk, submit
from tests.memory_store import MemoryStore, normal, run_to_end
from tests.toy_cluster import Lossy, ToyCluster, ToyRequest

CLIENTS = ("ann", "bob", "acme/x/cyd", "acme/x/dan", "acme/y/eve")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_module, "SLICE", 1)
    monkeypatch.setattr(ledger_module, "SLICE", 1)


def live(cluster: ToyCluster, rng: random.Random, *, forgets: bool) -> None:
    """A moment in which anything may happen. Totals that other clusters merge are never forgotten."""
    for _ in range(rng.randrange(3)):
        output, client = rng.randrange(1, 8), rng.choice(CLIENTS)
        request = ToyRequest(f"r{len(cluster.requests)}", client, rng.randrange(1, 30), output, output + 3)
        cluster.submit(request)
    if cluster.requests and rng.random() < 0.3:
        cluster.cancel(rng.choice(list(cluster.requests)))
    if rng.random() < 0.2 and not forgets:
        served = Totals(rng.randrange(100, 200), 0, len(cluster.requests), 500.0 + len(cluster.requests))
        cluster.dispatcher.merge_cluster("far", 1, {rng.choice(CLIENTS): served}, {}, len(cluster.requests))
    cluster.step()


def finds_torn_cut(seed: int, *, forgets: bool = False) -> bool:
    """Whether some cut of a random life, put together with those before it, is not what was at its first step."""
    rng = random.Random(seed)
    limits = DispatchLimits(lookahead=1, max_clients=1 if forgets else 100)
    kept = 0 if forgets else KEPT_ACCOUNTS
    network = Lossy(rng, 0.2)
    cluster = ToyCluster(num_replicas=3, num_routers=1, limits=limits, network=network, step_s=0.3, kept_accounts=kept)
    cluster.dispatcher.ledger._max_books = 2  # books go all the time
    store = MemoryStore()
    for _ in range(12):
        for _ in range(rng.randrange(4)):
            live(cluster, rng, forgets=forgets)
        steps = cluster.dispatcher.cutter.steps(is_whole=rng.random() < 0.2)
        expected = normal(cluster.dispatcher.dump())
        try:
            while True:
                next(steps)
                live(cluster, rng, forgets=forgets)
        except StopIteration as end:
            store.save(end.value)
        if normal(store.snapshot()) != expected:
            return True
        cluster.check()
    return False


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_a_cut_is_of_one_moment_whatever_happens_while_it_is_read(seed: int, forgets: bool) -> None:
    assert not finds_torn_cut(seed, forgets=forgets)


def keep_dead_rows(self: Changes[Any, Any], key: Any) -> None:
    """As if rows that are no more were not told."""
    if (row := self._read(key)) is not None:
        self._rows[key] = row


def test_a_store_remembers_whom_the_authority_forgot_where_it_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changes, "_take", keep_dead_rows)
    assert any(finds_torn_cut(seed, forgets=True) for seed in range(15))


def read_late(self: Changes[Any, Any], keys: Iterable[Any]) -> None:
    """As if nothing were read before it changes."""


def test_a_cut_is_torn_without_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Changes, "before_unkept", read_late)
    assert any(finds_torn_cut(seed) for seed in range(15))


def forget_touch(self: Any, client: str) -> None:
    """Changes of weight and of who waits are not told."""


def test_a_cut_is_wrong_where_a_change_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairserve.fairness.queue.FairQueue.touch", forget_touch)
    assert any(finds_torn_cut(seed) for seed in range(15))


def test_a_torn_cut_would_charge_tokens_twice(desk: Desk) -> None:
    """Counters of a later moment than the books: the replica's next full report is charged again."""
    router, replica = desk.router(), desk.replica()
    router.call(submit("a0"))
    replica.report(received=("a0",), started=("a0",), served={"ann": (10, 5)})
    early = desk.dispatcher.dump()
    replica.report(served={"ann": (0, 50)})
    late = desk.dispatcher.dump()
    for snapshot, charged in (({**late, "ledger": early["ledger"]}, 220), ({**early, "ledger": late["ledger"]}, 20)):
        desk.restart(snapshot={**snapshot, "counters": {"zero": [0.0, 1.0], **snapshot["counters"]}})
        replica.report(is_full=True, held=("a0",))
        assert desk.counter("ann") == charged, "120 tokens' worth were served"
    desk.restart(snapshot={**early, "counters": {"zero": [0.0, 1.0], **early["counters"]}})
    replica.report(is_full=True, held=("a0",))
    assert desk.counter("ann") == 120


def test_a_cut_tells_only_what_changed_since_the_one_before(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    for client in ("ann", "bob", "cyd"):
        router.call(submit(client, client))
        replica.report(received=(client,), started=(client,), served={client: (10, 5)})
    first = run_to_end(desk.dispatcher.cutter.steps(is_whole=False))
    assert first.is_whole and set(first.served) == {"ann", "bob", "cyd"}
    replica.report(served={"bob": (0, 1)})
    second = run_to_end(desk.dispatcher.cutter.steps(is_whole=False))
    assert not second.is_whole
    assert (set(second.nodes), set(second.served)) == ({"bob", ""}, {"bob"})
    assert second.books == {("r0", 1): (replica.seq, {"bob": Totals(10, 0, 6, 22.0)})}
    third = run_to_end(desk.dispatcher.cutter.steps(is_whole=False))
    assert (set(third.nodes), third.served, third.books) == ({""}, {}, {})


def test_a_step_reads_no_more_than_a_slice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_module, "SLICE", 50)
    monkeypatch.setattr(ledger_module, "SLICE", 50)
    replica = desk.replica()
    replica.report(served={f"c{i}": (1, 1) for i in range(1_000)})
    num_read = 0
    node: Callable[[Any, str], Any] = cut_module.Cutter._node

    def counted(self: Any, name: str) -> Any:
        nonlocal num_read
        num_read += 1
        return node(self, name)

    monkeypatch.setattr(cut_module.Cutter, "_node", counted)
    most, before = 0, 0
    for _ in desk.dispatcher.cutter.steps(is_whole=True):
        most, before = max(most, num_read - before), num_read
    assert num_read == 1_001 and most <= 51


def test_what_another_cluster_served_is_charged_and_is_not_told_as_ours(desk: Desk) -> None:
    replica = desk.replica()
    replica.report(served={"ann": (10, 5)})
    for _ in range(2):
        desk.dispatcher.merge_cluster("far", 7, {"ann": Totals(100, 0, 0, 100.0)}, {}, 3)
    desk.dispatcher.merge_cluster("far", 7, {"bob": Totals(4, 0, 0, 4.0)}, {"bob": 2.0}, 4)
    assert (desk.counter("ann"), desk.counter("bob")) == (120, 2)
    assert desk.dispatcher.ledger.totals("ann").num_input == 110
    cut = run_to_end(desk.dispatcher.cutter.steps(is_whole=True))
    assert cut.served == {"ann": (10, 0, 5, 20.0, 1.0), "bob": (0, 0, 0, 0.0, 2.0)}
    assert desk.dispatcher.ledger.known_clusters() == {("far", 7): 4}


def test_what_was_served_before_counting_began_is_not_told_as_ours(desk: Desk) -> None:
    """Another cluster was charged it already, by what the earlier life had told."""
    replica = desk.replica()
    replica.report(served={"ann": (10, 5)})
    desk.restart(snapshot=None)
    assert replica.report().need_full
    replica.report(is_full=True)
    replica.report(served={"ann": (0, 1)})
    cut = run_to_end(desk.dispatcher.cutter.steps(is_whole=True))
    assert cut.served == {"ann": (0, 0, 1, 2.0, 1.0)}
    assert desk.dispatcher.ledger.totals("ann") == Totals(10, 0, 6, 22.0)
