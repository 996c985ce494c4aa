"""Whom the authority forgets, and whom never."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fairserve.dispatch.controls import NO_CONTROL, Control
from fairserve.dispatch.ledger import FORGOTTEN
from fairserve.fairness.hierarchy import is_group
from tests.dispatch.kit import Desk, submit

MakeDesk = Callable[..., Desk]


class Service:
    """A desk with one router and one replica, and clients that are served."""

    def __init__(self, desk: Desk, slots: int = 4) -> None:
        self.desk, self.router, self.replica = desk, desk.router(), desk.replica(slots=slots)
        self._num = 0

    def serve(self, client: str, num_output: int = 5, weight: float = 1.0) -> None:
        """One request of 10 input tokens, from its arrival to its end."""
        self._num += 1
        name = f"{client}-{self._num}"
        self.router.call(submit(name, client, weight=weight))
        self.replica.report(received=(name,), started=(name,), served={client: (10, num_output)})
        self.replica.report(finished=(name,))

    @property
    def known(self) -> set[str]:
        return {node for node in self.desk.dispatcher.queue.table if not is_group(node)}

    def lead(self, client: str) -> float:
        return self.desk.counter(client) - self.desk.dispatcher.queue.level()


@pytest.fixture
def make(make_desk: MakeDesk) -> Callable[..., Service]:
    return lambda max_clients, policy="vtc", **limits: Service(make_desk(policy, max_clients=max_clients, **limits))


def test_as_long_as_there_is_room_nobody_is_forgotten(make: Callable[..., Service]) -> None:
    service = make(5)
    for i in range(5):
        service.serve(f"client-{i}")
    assert len(service.known) == 5
    assert service.desk.status()["forgotten"] == 0
    service.serve("one-more")
    assert len(service.known) == 5
    assert service.desk.status()["forgotten"] == 1


def test_who_is_at_or_below_the_level_goes_before_anybody_who_is_ahead(make: Callable[..., Service]) -> None:
    service = make(3)
    service.serve("behind")
    service.serve("ahead", num_output=400)
    service.serve("level")
    service.desk.dispatcher.queue.set_counter("ahead", service.desk.counter("level") + 300)
    for i in range(5):
        service.serve(f"new-{i}")
        assert "ahead" in service.known
    assert "behind" not in service.known
    assert service.desk.status()["most_forgiven"] == 0


def test_for_who_is_not_ahead_being_forgotten_is_the_same_as_being_remembered(make: Callable[..., Service]) -> None:
    small, large = make(2), make(100)
    for service in (small, large):
        for client in ("ann", "bob", "cyd", "dan", "ann", "bob", "ann"):
            service.serve(client)
    assert small.desk.dispatcher.num_forgotten > 0
    assert [small.desk.counter(client) for client in ("ann", "bob")] == [
        large.desk.counter(client) for client in ("ann", "bob")
    ]


def test_when_all_are_ahead_the_least_ahead_goes_and_what_it_is_forgiven_is_told(make: Callable[..., Service]) -> None:
    service = make(3)
    service.router.call(submit("w0", "waits"), submit("w1", "waits"))
    desk = service.desk
    for i, client in enumerate(("far", "near", "middle")):
        desk.dispatcher.weights.carry(client, 1.0)
        desk.dispatcher.queue.set_counter(client, desk.dispatcher.queue.newcomer("") + (900.0, 100.0, 500.0)[i])
        desk.dispatcher.state.idlers.look_at(client)
    desk.wait(0.1)
    assert {"far", "near", "middle"} <= service.known
    desk.dispatcher.weights.carry("fifth", 1.0)
    desk.dispatcher.queue.set_counter("fifth", desk.dispatcher.queue.newcomer("") + 700.0)
    desk.dispatcher.state.idlers.look_at("fifth")
    desk.wait(0.1)
    assert service.known & {"far", "near", "middle", "fifth"} == {"far", "middle", "fifth"}
    assert desk.status()["most_forgiven"] == 100


def test_who_waits_runs_or_is_set_live_is_never_forgotten(make: Callable[..., Service]) -> None:
    service = make(1)
    desk = service.desk
    desk.dispatcher.control("heavy", Control(weight=4.0), desk.now_s)
    desk.dispatcher.control("paused", Control(is_paused=True), desk.now_s)
    service.router.call(submit("r", "runs"), submit("p", "paused"))
    service.replica.report(received=("r",), started=("r",), served={"runs": (10, 1)}, free_slots=0)
    service.router.call(submit("w", "waits"))
    for i in range(20):
        service.router.call(submit(f"gone-{i}", f"gone-{i}"))
        service.router.call(cancels=(f"gone-{i}",))
    assert {"heavy", "paused", "runs", "waits"} <= service.known
    assert len(service.known) <= 6
    desk.dispatcher.control("heavy", NO_CONTROL, desk.now_s)
    assert not desk.dispatcher.state.idlers.overlooked()


def test_a_crowd_that_waits_pushes_out_nobody(make: Callable[..., Service]) -> None:
    service = make(5)
    service.serve("ann", num_output=100)
    for i in range(50):
        service.router.call(*(submit(f"{i}-{j}", f"crowd-{i}") for j in range(2)))
    assert "ann" in service.known


def test_an_interaction_under_way_keeps_its_client(make: Callable[..., Service]) -> None:
    service = make(1)
    service.router.call(submit("t0", "ann", interaction="task"))
    service.replica.report(received=("t0",), started=("t0",), served={"ann": (10, 1)})
    service.replica.report(finished=("t0",))
    for i in range(5):
        service.serve(f"other-{i}")
    assert "ann" in service.known
    service.desk.wait(61.0)
    service.desk.replica()
    service.serve("last")
    assert "ann" not in service.known


def test_a_newcomer_is_lifted_to_where_the_last_to_leave_stands_although_names_are_forgotten(
    make: Callable[..., Service],
) -> None:
    service = make(1)
    for i in range(10):
        service.serve(f"client-{i}")
    level = service.desk.dispatcher.queue.level()
    assert level > 0
    service.router.call(submit("n", "new"))
    assert service.desk.counter("new") == level + 10, "lifted, and charged its input"


def test_what_comes_late_for_a_forgotten_client_is_charged_on_top_of_the_level(make: Callable[..., Service]) -> None:
    service = make(2)
    service.router.call(submit("a", "ann"))
    service.replica.report(received=("a",), started=("a",), served={"ann": (10, 1)})
    service.router.call(cancels=("a",))
    for i in range(5):
        service.serve(f"other-{i}")
    assert "ann" not in service.known
    level = service.desk.dispatcher.queue.level()
    service.replica.report(finished=("a",), served={"ann": (0, 50)})
    assert service.desk.counter("ann") == level + 100
    assert service.desk.dispatcher.ledger.whole.num_output == 51 + 5 * 5


def test_what_forgotten_clients_received_stays_in_the_sum(make: Callable[..., Service]) -> None:
    service = make(2)
    for i in range(10):
        service.serve(f"client-{i}", num_output=3)
    ledger = service.desk.dispatcher.ledger
    assert (ledger.whole.num_input, ledger.whole.num_output) == (100, 30)
    assert ledger.accounts()[FORGOTTEN].num_output == 3 * 8
    data = json.loads(json.dumps(service.desk.dispatcher.dump()))
    service.desk.restart(snapshot=data)
    assert service.desk.dispatcher.ledger.whole.num_output == 30


def test_an_organisation_keeps_its_debt_as_long_as_one_of_its_clients_is_known(make: Callable[..., Service]) -> None:
    service = make(4)
    service.serve("acme/ann", num_output=400)
    service.serve("zeta/zoe")
    queue = service.desk.dispatcher.queue
    for i in range(8):
        service.serve(f"acme/key-{i}")
    assert len(service.known) == 4
    service.serve("zeta/zoe")
    queue.set_counter("acme/", queue.counter("zeta/") + 500)
    for i in range(8):
        service.serve(f"org-{i}/user")
    assert "acme/" in queue.table, "the least ahead go first"
    assert len(service.known) == 4
    assert len(queue.groups) <= 1 + 4


def test_an_organisation_goes_with_its_last_client(make: Callable[..., Service]) -> None:
    service = make(2)
    for i in range(10):
        service.serve(f"org-{i}/team/user")
    dispatcher = service.desk.dispatcher
    assert len(dispatcher.queue.groups) == 1 + 2 * 2
    assert dispatcher.watch.bounds.keys() == dispatcher.queue.groups.keys() == dispatcher.watch.gaps.keys()


def test_a_snapshot_with_more_names_than_may_be_remembered_is_cut(make_desk: MakeDesk) -> None:
    desk = make_desk(max_clients=100)
    service = Service(desk)
    for i in range(20):
        service.serve(f"client-{i}")
    data = json.loads(json.dumps(desk.dispatcher.dump()))
    small = make_desk(max_clients=5)
    small.dispatcher.load(data)
    assert len(small.dispatcher.queue.table) == 5


def test_a_refused_name_is_forgotten_like_any_other(make: Callable[..., Service]) -> None:
    service = make(3, max_waiting=1, max_waiting_per_client=1)
    service.replica.report(free_slots=0, free_kv=0)
    service.router.call(submit("w0", "waits"), submit("w1", "waits"))
    for i in range(30):
        service.router.call(submit(f"r{i}-0", f"refused-{i}"), submit(f"r{i}-1", f"refused-{i}"))
        service.router.call(cancels=(f"r{i}-0",))
    assert len(service.known) <= 5
    assert len(service.desk.dispatcher.recent.num_refused) <= 5
