"""Work and memory do not grow with what should not matter. Operations are counted, nothing is timed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients
from tests.dispatch.kit import Desk, submit

MakeDesk = Callable[..., Desk]


class CountingVtc(Vtc):
    """VTC that counts how often it is asked."""

    def __init__(self) -> None:
        self.num_order = self.num_lift = 0

    def order(self, client: str, waiting: WaitingClients) -> float:
        self.num_order += 1
        return super().order(client, waiting)

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        self.num_lift += 1
        return super().lift(client, waiting)


def crowd(make_desk: MakeDesk, num_clients: int) -> tuple[Desk, CountingVtc]:
    """So many clients wait with two requests each, at counters that all differ."""
    desk = make_desk(max_waiting=10**6)
    policy = CountingVtc()
    desk.dispatcher.queue.policy = policy
    router = desk.router()
    for i in range(num_clients):
        router.call(submit(f"{i}-0", f"client-{i}", num_input=1), submit(f"{i}-1", f"client-{i}", num_input=1))
        desk.dispatcher.queue.set_counter(f"client-{i}", float(i * 37 % num_clients))
    return desk, policy


def questions_per_pick(make_desk: MakeDesk, num_clients: int) -> tuple[float, float, int]:
    desk, policy = crowd(make_desk, num_clients)
    policy.num_order = policy.num_lift = 0
    before = len(desk.dispatcher.queue.groups[""]._heap)
    replica = desk.replica(slots=500, kv=10**6)
    granted = tuple(desk.dispatcher.leases)
    replica.report(received=granted, started=granted, served={f"client-{i}": (1, 1) for i in range(100)})
    num_picks = desk.dispatcher.num_granted
    assert num_picks >= 500
    grown = len(desk.dispatcher.queue.groups[""]._heap) - before
    return policy.num_order / num_picks, policy.num_lift / num_picks, grown


def test_a_pick_asks_the_policy_as_often_among_ten_thousand_clients_as_among_one_thousand(make_desk: MakeDesk) -> None:
    thousand, ten_thousand = (questions_per_pick(make_desk, num) for num in (1_000, 10_000))
    assert max(thousand[0], ten_thousand[0]) <= 2
    assert ten_thousand[1] == thousand[1] == 0
    assert ten_thousand[2] <= thousand[2] + 500, "and pushes as few heap entries"


def test_stale_heap_entries_stay_in_proportion_to_the_clients_that_wait(desk: Desk) -> None:
    router = desk.router()
    router.call(*(submit(request_id, request_id) for request_id in ("ann", "bob")))
    for i in range(10_000):
        desk.dispatcher.queue.charge("ann" if i % 2 else "bob", 1.0)
    assert len(desk.dispatcher.queue.groups[""]._heap) <= 4 * 2 + 65


@pytest.mark.parametrize("num_rounds", [50])
def test_a_day_of_short_requests_leaves_nothing_per_request_behind(desk: Desk, num_rounds: int) -> None:
    router, replica = desk.router(), desk.replica(slots=8)
    sizes = []
    for i in range(num_rounds):
        ids = tuple(f"{i}-{j}" for j in range(8))
        router.call(*(submit(request_id, f"client-{request_id[-1]}") for request_id in ids))
        router.poll()
        replica.report(received=ids, started=ids, served={f"client-{j}": (10, 1) for j in range(8)}, free_slots=0)
        replica.report(finished=ids[:6], free_slots=6)
        router.call(cancels=ids[6:])
        replica.report(finished=ids[6:])
        desk.wait(0.1)
        d = desk.dispatcher
        session, leases, watch = desk.session(), d.leases, d.watch
        sizes.append(
            (
                *(len(x) for x in (leases, leases._unconfirmed, leases._of, watch.unserved, watch.owed, watch.service)),
                *(len(x) for x in (session.requests, session.outbox, d.gaps._watched, d.gaps._lead)),
                *(len(x) for x in (d.queue, d.queue.groups[""]._heap)),
                sum(map(len, leases._on.values())),
            )
        )
    assert max(sizes[1:]) == sizes[1]


def test_replicas_that_come_and_go_leave_nothing_but_their_accounts(desk: Desk) -> None:
    for i in range(20):
        replica = desk.replica(f"r{i}")
        router = desk.router()
        router.seq = 2 * i
        router.call(submit(f"a{i}"))
        replica.report(received=(f"a{i}",), started=(f"a{i}",), served={"ann": (10, 1)})
        desk.wait(21.0)
    d = desk.dispatcher
    assert (len(d.capacity), len(d.leases._on), len(d.bounds._unmerged), d.num_routers) == (0, 0, 0, 0)


def test_a_client_that_only_a_report_names_may_be_forgotten_like_any_other(desk: Desk) -> None:
    desk.replica().report(served={"stranger": (10, 1)})
    assert "stranger" in desk.dispatcher.queue.table
    assert not desk.dispatcher.state.idlers.overlooked()
