"""What happened lately: one sentence each, told once, never too many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fairserve.dispatch.events import MAX_EVENTS, Events, event_view
from fairserve.errors import ClientQueueFull
from fairserve.views import EventView
from tests.dispatch.kit import Desk, submit

MakeDesk = Callable[..., Desk]


def told(desk: Desk, kind: str | None = None) -> list[tuple[str, str | None, str | None, int]]:
    """Newest first."""
    events = desk.dispatcher.events.newest(MAX_EVENTS)
    return [(e.kind, e.client, e.replica, e.count) for e in events if kind in (None, e.kind)]


# -- the ring ----------------------------------------------------------------------------------------------------------


def test_equal_events_within_a_second_are_one_that_counts_even_with_others_between() -> None:
    events = Events()
    for now_s in (10.0, 10.4, 10.9):
        events.note("refused", now_s, "ann was refused.", client="ann")
        events.note("refused", now_s, "bob was refused.", client="bob")
    assert [(e.client, e.count) for e in events.after(0, 10)] == [("ann", 3), ("bob", 3)]
    events.note("refused", 11.0, "ann was refused.", client="ann")
    assert [(e.client, e.count) for e in events.newest(10)] == [("ann", 1), ("bob", 3), ("ann", 3)]


def test_what_is_rare_stays_when_a_thousand_frequent_ones_come() -> None:
    events = Events()
    events.note("lost", 0.0, "Replica r0 is gone.", replica="r0")
    for i in range(3 * MAX_EVENTS):
        events.note("lifted", float(i), "lifted", client=f"c{i}")
        events.note("joined", float(i), "joined", replica="r0") if i < 10 else None
    assert len(events) < MAX_EVENTS
    assert events.after(0, 1)[0].kind == "lost"
    assert [e.seq for e in events.newest(50)] == sorted((e.seq for e in events.newest(50)), reverse=True)
    assert len(events._open) <= MAX_EVENTS + 1


def test_those_after_a_number_come_oldest_first_and_not_more_than_asked_for() -> None:
    events = Events()
    for i, kind in enumerate(["joined", "lifted", "lost", "refused", "joined"]):
        events.note(kind, 5.0 * i, "{} happened", kind, client=f"c{i}")
    assert [e.seq for e in events.after(1, 3)] == [2, 3, 4]
    assert events.after(5, 10) == []
    assert [e.text for e in events.after(4, 10)] == ["joined happened"]


def test_a_view_carries_unix_time_and_its_sentence() -> None:
    events = Events()
    events.note("lifted", 7.0, "{} rose by {:,.0f}.", "a{b}", 1234.5, client="a{b}")
    view = EventView.model_validate(event_view(events.newest(1)[0], 1000.0))
    assert (view.time_s, view.text, view.client) == (1007.0, "a{b} rose by 1,234.", "a{b}")


# -- what the dispatcher tells -----------------------------------------------------------------------------------------


def test_replicas_that_come_restart_and_fall_silent_are_told(desk: Desk) -> None:
    desk.replica("r0")
    desk.replica("r0", incarnation=2)
    desk.wait(21.0)
    assert told(desk) == [("lost", None, "r0", 1), ("lost", None, "r0", 1), ("joined", None, "r0", 1)]
    assert "began anew" in desk.dispatcher.events.after(1, 1)[0].text
    assert "silent for 21 s" in desk.dispatcher.events.newest(1)[0].text


def test_a_router_that_falls_silent_is_told(desk: Desk) -> None:
    desk.router("east").call(submit("a"))
    desk.wait(21.0)
    assert [e.text for e in desk.dispatcher.events.newest(1)] == [
        "Router east has been silent for 21 s: its waiting requests are dropped."
    ]


def served(desk: Desk) -> None:
    """``ann`` is served 10 tokens and waits no more; ``bob`` comes later."""
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a0", "ann"))
    replica.report(received=("a0",), started=("a0",), served={"ann": (10, 0)}, free_slots=0)
    router.call(submit("a1", "ann"))
    desk.wait(1.5)
    router.call(submit("b0", "bob"))


def test_a_client_that_comes_back_from_idleness_is_told_with_its_lift(desk: Desk) -> None:
    served(desk)
    assert told(desk, "lifted") == [("lifted", "bob", None, 1)]
    assert "raised by 10 to the level" in desk.dispatcher.events.newest(1)[0].text


def test_a_client_that_had_a_request_a_moment_ago_is_not_called_idle(desk: Desk) -> None:
    router, replica = desk.router(), desk.replica(slots=1)
    router.call(submit("a0", "ann"))
    replica.report(received=("a0",), started=("a0",), served={"ann": (10, 0)}, free_slots=0)
    router.call(submit("a1", "ann"), submit("b0", "bob"))
    router.call(cancels=("b0",))
    replica.report(received=("a0",), served={"ann": (90, 0)}, free_slots=0)
    before = desk.dispatcher.num_lifts
    router.call(submit("b1", "bob"))
    assert desk.dispatcher.num_lifts == before + 1
    assert len(told(desk, "lifted")) == 1, "of its first request, not of its second"


def test_refusals_of_a_second_are_one_event(make_desk: MakeDesk) -> None:
    desk = make_desk(max_waiting_per_client=1)
    router = desk.router()
    router.call(submit("a0"), submit("a1"), submit("a2"), submit("a3"))
    assert told(desk) == [("refused", "ann", None, 3)]
    assert isinstance(router.refused["a1"], ClientQueueFull)
    assert str(router.refused["a1"]) == desk.dispatcher.events.newest(1)[0].text
    assert desk.dispatcher.recent.num_refused == {"ann": 3}


def test_a_grant_that_nobody_confirms_is_told(make_desk: MakeDesk) -> None:
    desk = make_desk(lease_s=1.0)
    router = desk.router()
    desk.replica("r0")
    router.call(submit("a0"))
    desk.wait(1.5)
    assert told(desk, "lapsed") == [("lapsed", "ann", "r0", 1)]


@pytest.mark.parametrize("gap", [None, 100.0])
def test_somebody_who_gives_way_is_told(make_desk: MakeDesk, gap: float | None) -> None:
    desk = make_desk(preempt_gap=gap)
    router, replica = desk.router(), desk.replica("r0", slots=1)
    router.call(submit("g", "greedy"))
    replica.report(received=("g",), started=("g",), served={"greedy": (10, 0)}, free_slots=0)
    router.call(submit("m", "modest"))
    desk.dispatcher.queue.set_counter("greedy", 1e6)
    desk.dispatcher.dispatch(desk.now_s)
    assert told(desk, "preempted") == ([] if gap is None else [("preempted", "modest", "r0", 1)])
