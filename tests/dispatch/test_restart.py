"""The authority dies and comes back: with a snapshot, with an old one, with none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fairserve.dispatch.dispatcher import Dispatcher
from tests.dispatch.kit import Desk, ReplicaVoice, RouterVoice, submit

MakeDesk = Callable[..., Desk]


def snapshot(desk: Desk) -> dict[str, Any]:
    """As it comes back from a file."""
    data: dict[str, Any] = json.loads(json.dumps(desk.dispatcher.dump()))
    return data


@pytest.fixture
def busy(desk: Desk) -> tuple[Desk, RouterVoice, ReplicaVoice]:
    """ann has had 10 + 2 * 45 = 100 and runs; bob, weight 2, came later, was lifted, and has a grant on its way."""
    router, replica = desk.router(), desk.replica(slots=2)
    router.call(submit("a0"))
    replica.report(received=("a0",), started=("a0",), served={"ann": (10, 45)}, free_slots=1)
    router.call(submit("b0", "bob", num_input=40, weight=2.0), submit("b1", "bob", num_input=40, weight=2.0))
    assert (desk.counter("ann"), desk.counter("bob")) == (100, 120)
    return desk, router, replica


def report_in_full(replica: ReplicaVoice, *held: str, **more: Any) -> None:
    """What a Reporter does when the reply asks for it."""
    assert replica.report(weights={"bob": 2.0}, **more).need_full
    assert not replica.report(weights={"bob": 2.0}, is_full=True, held=held).need_full


def test_a_snapshot_goes_through_json_and_back_unchanged(busy: tuple[Desk, RouterVoice, ReplicaVoice]) -> None:
    desk, _, _ = busy
    data = snapshot(desk)
    desk.restart(snapshot=data)
    again = snapshot(desk)
    base = min(counter for counter, _ in data["counters"].values())
    assert {c: row[0] - base for c, row in data["counters"].items()} == {
        c: row[0] for c, row in again["counters"].items()
    }
    assert (again["ledger"], again["last_to_leave"]) == (data["ledger"], data["last_to_leave"])
    assert desk.dispatcher.queue.table.weight("bob") == 2


def test_charges_on_their_way_are_not_in_the_snapshot(busy: tuple[Desk, RouterVoice, ReplicaVoice]) -> None:
    desk, _, _ = busy
    assert snapshot(desk)["counters"] == {"ann": [100.0, 1.0], "bob": [100.0, 2.0]}


def test_a_snapshot_of_another_version_is_not_read(desk: Desk) -> None:
    with pytest.raises(ValueError, match="snapshot version 99"):
        desk.dispatcher.load({**desk.dispatcher.dump(), "version": 99})


def test_only_a_dispatcher_that_has_seen_nothing_may_load(busy: tuple[Desk, RouterVoice, ReplicaVoice]) -> None:
    desk, _, _ = busy
    with pytest.raises(AssertionError):
        desk.dispatcher.load(desk.dispatcher.dump())


def test_after_a_restart_with_a_snapshot_no_token_is_lost_or_charged_twice(
    busy: tuple[Desk, RouterVoice, ReplicaVoice],
) -> None:
    desk, router, replica = busy
    data = snapshot(desk)
    replica.report(served={"ann": (0, 5)}, received=("b0",), started=("b0",))  # after the snapshot
    desk.restart(snapshot=data)
    report_in_full(replica, "a0", "b0", served={"ann": (0, 2), "bob": (40, 1)})
    assert desk.dispatcher.ledger.totals("ann").num_output == 52
    assert desk.dispatcher.ledger.totals("bob").num_input == 40
    assert desk.counter("ann") - desk.counter("bob") == (100 + 14) - (100 + 21)
    assert router.poll().resubmit


def test_what_waits_is_submitted_again_and_keeps_its_place_and_is_not_refused(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    router = desk.router()
    router.call(submit("a"))
    desk.restart(snapshot=snapshot(desk))
    assert router.poll().resubmit
    reply = router.call(
        submit("b", waited_s=1.0, is_retry=True), submit("a", waited_s=3.0, is_retry=True), is_full=True
    )
    assert (reply.refusals, reply.resubmit) == ((), False)
    desk.replica(slots=1)
    router.poll()
    assert list(router.granted) == ["a"]


def test_a_call_that_was_under_way_when_the_authority_died_counts_once(desk: Desk) -> None:
    router = desk.router()
    router.call(submit("z"))
    call = router.compose(submit("a"))
    desk.dispatcher.route(call, desk.now_s)
    desk.restart(snapshot=snapshot(desk))
    reply = desk.dispatcher.route(call, desk.now_s)
    assert reply.resubmit
    router.call(submit("z", is_retry=True), submit("a", is_retry=True), is_full=True)
    assert desk.status()["waiting"] == 2


def test_a_request_that_runs_already_is_not_granted_again_after_a_restart(
    busy: tuple[Desk, RouterVoice, ReplicaVoice],
) -> None:
    """A submit of before the grant, repeated into the new life."""
    desk, router, replica = busy
    desk.restart(snapshot=snapshot(desk))
    router.call(submit("a0", is_retry=True))
    report_in_full(replica, "a0")
    assert desk.status()["waiting"] == 0


def test_lifts_since_the_snapshot_are_all_that_is_lost_and_the_resubmit_lifts_again(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(*(submit(f"a{i}") for i in range(3)))
    data = snapshot(desk)
    replica.report(received=("a0",), started=("a0",), served={"ann": (10, 500)}, free_slots=0)
    router.call(submit("b", "bob"))  # idle until now: lifted, after the snapshot
    assert desk.counter("bob") > 1_000
    desk.restart(snapshot=data)
    report_in_full(replica, "a0")
    router.call(
        submit("a1", is_retry=True), submit("a2", is_retry=True), submit("b", "bob", is_retry=True), is_full=True
    )
    assert desk.counter("ann") - desk.counter("bob") == pytest.approx(0, abs=10), "no catch-up for bob's idle time"


def test_a_client_that_was_ahead_at_the_snapshot_is_not_forgiven(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a0"), submit("a1"), submit("d0", "deep"))
    desk.dispatcher.queue.set_counter("deep", 900.0)
    desk.restart(snapshot=snapshot(desk))
    router.call(submit("d0", "deep", is_retry=True), submit("a1", is_retry=True), is_full=True)
    report_in_full(replica)
    router.poll()
    assert desk.counter("deep") - desk.counter("ann") == 900 - 10, "whoever is named first"


def test_without_a_snapshot_all_clients_begin_level_whatever_they_had_before(
    busy: tuple[Desk, RouterVoice, ReplicaVoice],
) -> None:
    """Totals without the lifts would say that a newcomer is far behind, and give it all service until it is not."""
    desk, _, replica = busy
    replica.report(served={"ann": (0, 5_000)}, received=("b0",), started=("b0",))
    desk.restart(snapshot=None)
    report_in_full(replica, "a0", "b0", served={"bob": (40, 3)})
    assert (desk.counter("ann"), desk.counter("bob")) == (0, 0)
    assert desk.dispatcher.queue.table.weight("bob") == 2
    replica.report(served={"ann": (0, 2), "bob": (0, 3)})
    assert (desk.counter("ann"), desk.counter("bob")) == (4, 3), "from then on every token counts"
    assert desk.dispatcher.ledger.totals("ann").num_output == 5_047, "and the accounts are complete"
    assert desk.status()["clients"]["ann"]["num_output"] == 5_047


def test_without_a_snapshot_a_replica_that_is_new_itself_is_charged_in_full(desk: Desk) -> None:
    desk.restart(snapshot=None)
    replica = desk.replica("young")
    replica.report(served={"ann": (10, 5)})
    assert desk.counter("ann") == 20


def test_an_older_epoch_never_follows_a_newer_one(desk: Desk) -> None:
    with pytest.raises(AssertionError):
        Dispatcher(desk.dispatcher.queue.policy, desk.cost, desk.limits, epoch=0)


def test_replies_of_the_new_life_carry_its_epoch(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica()
    desk.restart(snapshot=None)
    assert router.poll().epoch == 2
    assert replica.report().epoch == 2
