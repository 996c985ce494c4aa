"""Who would give way is found without looking at everybody, and is whom a look at everybody finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from fairserve.dispatch.leases import Lease, Waiting
from fairserve.dispatch.most_served import MostServed
from tests.dispatch.kit import Desk, submit

MakeDesk = Callable[..., Desk]
NAMES = {"flat": [f"c{i}" for i in range(12)], "tree": [f"{g}/c{i}" for g in ("acme", "corp") for i in range(6)]}


def lease_of(desk: Desk, client: str, request_id: str) -> Lease:
    rates = desk.dispatcher.queue.rates(client)
    return Lease(Waiting(submit(request_id, client), "east", 0.0), "r0", 1, 0.0, 0.0, rates, 0.0, 1e9, 1)


@pytest.mark.parametrize("names", ["flat", "tree"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_one_that_a_look_at_all_finds(make_desk: MakeDesk, names: str, seed: int) -> None:
    desk, rng, held = make_desk(), random.Random(seed), dict[str, list[str]]()
    queue, leases, watch = desk.dispatcher.queue, desk.dispatcher.leases, desk.dispatcher.watch
    for client in NAMES[names]:
        queue.register(client)
    most_served = MostServed(queue, leases, watch)
    for step in range(300):
        client = rng.choice(NAMES[names])
        what = rng.randrange(5)
        if what == 0:
            held.setdefault(client, []).append(f"{step}")
            leases.add(f"{step}", lease_of(desk, client, f"{step}"))
            queue.charge(client, 0.5)
        elif what == 1 and held.get(client):
            leases.pop(held[client].pop())
        elif what == 2:
            queue.charge(client, float(rng.randrange(-20, 60)))
        elif what == 3:
            charge = (float(rng.randrange(50)),) * len(queue.rates(client))
            queue.charge(client, charge[0])
            watch.granted(client, charge, (0.0,) * len(charge))
        else:
            queue.set_counter(client, queue.counter(client) + rng.randrange(30))
        first = most_served.first()
        assert (
            first is None
            if not leases
            else most_served._standing(first or "") == max(map(most_served._standing, leases.clients()))
        )
    assert len(most_served._heap) <= 4 * 12 + 64 + 12
    leases.__init__()  # type: ignore[misc]
    watch.unserved.clear()


def test_without_the_setting_nothing_is_written_down(desk: Desk) -> None:
    desk.router().call(submit("a"))
    assert desk.dispatcher.queue._moved is None


def test_what_was_charged_and_is_not_served_makes_nobody_ahead(make_desk: MakeDesk) -> None:
    desk = make_desk(preempt_gap=100.0)
    queue, watch = desk.dispatcher.queue, desk.dispatcher.watch
    most_served = MostServed(queue, desk.dispatcher.leases, watch)
    queue.register("ann")
    queue.register("bob")
    queue.charge("ann", 500.0)
    watch.granted("ann", (450.0,), (0.0,))
    assert most_served.lead("ann", "bob") == 50.0
    assert most_served.lead("bob", "ann") == -500.0, "what it was charged already closes the gap"
    watch.unserved.clear()


def test_the_next_pick_does_not_look_at_everybody_that_runs(
    make_desk: MakeDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = make_desk(preempt_gap=100.0)
    router, replica = desk.router(), desk.replica("r0", slots=200, kv=100_000)
    ids = tuple(f"r{i}" for i in range(200))
    router.call(*(submit(r, f"c{r}") for r in ids), submit("waits", "late"))
    replica.report(received=ids, started=ids, served={f"c{r}": (10, 0) for r in ids}, free_slots=0, free_kv=0)
    looked_at: list[str] = []
    served = MostServed._served
    monkeypatch.setattr(MostServed, "_served", lambda self, node: (looked_at.append(node), served(self, node))[1])
    replica.report(served={"cr7": (0, 1)}, free_slots=0, free_kv=0)
    assert 1 <= len(looked_at) <= 8
