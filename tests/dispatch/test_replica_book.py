"""The replica's side: the local queue and its charges (LocalBook), and the reports that carry them (Reporter)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fairserve.dispatch.messages import ReportReply, StepReport, Totals
from fairserve.dispatch.replica_book import BookEvents, LocalBook, Reporter
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import KvTokenTime, WeightedTokens


@dataclass(frozen=True)
class Here:
    request_id: str
    client: str
    weight: float = 1.0
    application: str = ""


@pytest.fixture
def book() -> Iterator[LocalBook]:
    book = LocalBook(make_policy("vtc"), WeightedTokens())
    yield book
    book.check()


def arrive(book: LocalBook, *requests: Here) -> None:
    for request in requests:
        book.received(request)
        book.push(request)


# -- LocalBook ---------------------------------------------------------------------------------------------------------


def test_the_local_queue_serves_the_least_served_client_first(book: LocalBook) -> None:
    arrive(book, Here("a1", "ann"), Here("a2", "ann"), Here("b1", "bob"))
    book.pop()
    book.started("a1", 100, 0)
    assert [book.pop().request_id for _ in range(2)] == ["b1", "a2"]
    assert len(book) == 0


def test_charges_move_the_counter_while_the_request_runs(book: LocalBook) -> None:
    arrive(book, Here("a", "ann", weight=2.0))
    book.pop()
    book.started("a", 100, 40)
    assert book.counter("ann") == 30
    for _ in range(5):
        book.output("a", 1)
    assert book.counter("ann") == 35
    assert book.take_events().totals == {"ann": Totals(100, 40, 5, 70.0)}


def test_under_another_policy_counters_stay_and_what_waits_keeps_its_place() -> None:
    book: LocalBook[Here] = LocalBook(make_policy("fcfs"), WeightedTokens())
    arrive(
        book, Here("a1", "acme/ann", 2.0), Here("a2", "acme/ann", 2.0), Here("b1", "bob"), Here("a3", "acme/ann", 2.0)
    )
    assert book.pop().request_id == "a1"
    book.started("a1", 100, 0)
    book.remove("a2")
    before = book.counter("acme/ann")
    book.take_settings(make_policy("vtc"), {"acme": 4.0}, tracks_outputs=True)
    book.check()
    assert book.counter("acme/ann") == before > book.counter("bob")
    book.output("a1", 1)
    assert book.counter("acme/ann") == before + 2 / 2
    assert book.take_events().outputs == {"a1": 1}
    assert [book.pop().request_id for _ in range(2)] == ["b1", "a3"]
    arrive(book, Here("b2", "bob"), Here("a4", "acme/ann", 2.0), Here("b3", "bob"))
    book.take_settings(make_policy("fcfs"), {}, tracks_outputs=False)
    assert [book.pop().request_id for _ in range(3)] == ["b2", "a4", "b3"]
    book.check()


def test_the_service_of_a_request_is_its_cost_as_a_whole_however_it_is_cut_into_steps() -> None:
    cost = KvTokenTime()
    book = LocalBook(make_policy("vtc"), cost)
    for request_id, steps in (("a", [1] * 6), ("b", [4, 2])):
        arrive(book, Here(request_id, request_id))
        book.pop()
        book.started(request_id, 50, 20)
        for num in steps:
            book.output(request_id, num)
    totals = book.take_events().totals
    assert totals["a"].service == totals["b"].service == cost.service(50, 6, 20)


def test_a_preempted_request_goes_before_its_clients_others_and_is_not_charged_again(book: LocalBook) -> None:
    first = Here("a1", "ann")
    arrive(book, first, Here("a2", "ann"))
    book.pop()
    book.started("a1", 10, 0)
    book.push_front(first)
    assert [book.pop().request_id for _ in range(2)] == ["a1", "a2"]
    assert book.counter("ann") == 10


def test_of_two_preempted_requests_the_one_preempted_last_goes_first(book: LocalBook) -> None:
    for request in (one := Here("a1", "ann"), two := Here("a2", "ann")):
        book.received(request)
    book.push_front(two)
    book.push_front(one)
    assert book.peek() == one


def test_input_that_was_never_computed_is_given_back(book: LocalBook) -> None:
    arrive(book, Here("a", "ann"))
    book.pop()
    book.started("a", 100, 30)
    book.refund_input("a", 60)
    book.finished("a")
    assert book.take_events().totals["ann"] == Totals(40, 30, 0, 10.0)
    assert book.counter("ann") == 10


def test_a_request_that_never_ran_costs_nothing(book: LocalBook) -> None:
    request = Here("a", "ann")
    arrive(book, request)
    assert book.remove("a") == request
    assert book.remove("a") is None
    book.finished("a")
    events = book.take_events()
    assert (events.totals, events.received, events.started, events.finished) == ({}, ("a",), (), ("a",))
    assert (events.clients, book.held) == ((), ())


def test_a_request_may_not_come_twice_nor_pay_its_input_twice(book: LocalBook) -> None:
    arrive(book, Here("a", "ann"))
    with pytest.raises(AssertionError, match="here already"):
        book.received(Here("a", "ann"))
    book.pop()
    book.started("a", 10, 0)
    with pytest.raises(AssertionError, match="charged its input already"):
        book.started("a", 10, 0)


def test_events_are_taken_once_and_totals_are_cumulative(book: LocalBook) -> None:
    arrive(book, Here("a", "ann", weight=3.0))
    book.pop()
    book.started("a", 10, 0)
    first = book.take_events()
    assert (first.received, first.started, first.weights) == (("a",), ("a",), {"ann": 3.0})
    assert book.take_events() == BookEvents({}, {}, (), (), (), {}, clients=("ann",), outputs={})
    book.output("a", 1)
    assert book.take_events().totals == {"ann": Totals(10, 0, 1, 12.0)}


def test_a_counter_is_the_authoritys_answer_plus_what_was_charged_here_since(book: LocalBook) -> None:
    arrive(book, Here("a", "ann", weight=2.0), Here("e", "eve"))
    book.pop()
    book.started("a", 10, 0)
    reported = book.take_events().service
    for _ in range(3):
        book.output("a", 1)
    book.apply_counters({"ann": 1_000.0, "eve": 7.0, "gone": 9.0}, reported)
    assert book.counter("ann") == 1_003
    assert book.counter("eve") == 7
    assert book.counter("gone") == 0, "nothing of it is here"


def test_without_the_authority_the_replica_stays_fair_by_itself(book: LocalBook) -> None:
    """Two clients, one with long answers: turns follow service, not numbers of requests."""
    for i in range(40):
        arrive(book, Here(f"long{i}", "long"), Here(f"short{i}", "short"))
    turns = {"long": 0, "short": 0}
    for _ in range(40):
        request = book.pop()
        turns[request.client] += 1
        book.started(request.request_id, 10, 0)
        book.output(request.request_id, 45 if request.client == "long" else 5)
        book.finished(request.request_id)
    assert turns["short"] == pytest.approx(5 * turns["long"], rel=0.15)


# -- Reporter ----------------------------------------------------------------------------------------------------------


def events(
    totals: dict[str, Totals] | None = None,
    received: tuple[str, ...] = (),
    started: tuple[str, ...] = (),
    finished: tuple[str, ...] = (),
    clients: tuple[str, ...] = (),
) -> BookEvents:
    totals = totals or {}
    service = {client: total.service for client, total in totals.items()}
    return BookEvents(totals, service, received, started, finished, dict.fromkeys(totals, 2.0), clients, outputs={})


def compose(reporter: Reporter) -> StepReport:
    return reporter.compose(free_kv_tokens=1, free_slots=1, kv_capacity_tokens=1, max_slots=1)


def ok(report: StepReport, epoch: int = 1, **more: bool) -> ReportReply:
    return ReportReply(epoch, report.seq, **more)  # type: ignore[arg-type]


def test_an_acknowledged_report_is_not_told_again() -> None:
    reporter = Reporter("r0", 7)
    reporter.add(events({"ann": Totals(5, 0, 0, 5.0)}, received=("a",), started=("a",)))
    assert reporter.has_news
    assert reporter.unmerged == 1
    report = compose(reporter)
    assert (report.incarnation, report.seq, report.epoch, report.weights) == (7, 1, 0, {"ann": 2.0})
    assert reporter.replied(ok(report)) == {"ann": 5.0}
    assert not reporter.has_news
    assert reporter.unmerged == 0
    empty = compose(reporter)
    assert (empty.seq, empty.epoch, empty.totals, empty.received, empty.started) == (2, 1, {}, (), ())


def test_whatever_no_reply_acknowledged_is_in_the_next_report_with_the_newest_totals() -> None:
    reporter = Reporter("r0", 1)
    reporter.add(events({"ann": Totals(5, 0, 0, 5.0)}, received=("a",)))
    compose(reporter)
    reporter.add(events({"ann": Totals(5, 0, 1, 7.0), "bob": Totals(1, 0, 0, 1.0)}, received=("b",), finished=("a",)))
    assert reporter.has_news
    report = compose(reporter)
    assert report.totals == {"ann": Totals(5, 0, 1, 7.0), "bob": Totals(1, 0, 0, 1.0)}
    assert (report.seq, report.received, report.finished) == (2, ("a", "b"), ("a",))
    reporter.replied(ok(report))
    assert not reporter.has_news


def test_the_reply_is_read_against_what_its_report_carried() -> None:
    reporter = Reporter("r0", 1)
    reporter.add(events({"ann": Totals(5, 0, 0, 5.0)}))
    reporter.replied(ok(compose(reporter)))
    reporter.add(events(clients=("ann", "bob")))
    report = compose(reporter)
    assert report.clients == ("ann", "bob")
    reporter.add(events({"ann": Totals(5, 0, 9, 23.0)}))
    assert reporter.replied(ok(report)) == {"ann": 5.0, "bob": 0.0}


def test_a_new_authority_that_asks_is_told_everything_until_it_acknowledges() -> None:
    reporter = Reporter("r0", 1)
    reporter.add(events({"ann": Totals(5, 0, 0, 5.0)}, received=("a", "b"), finished=("a",)))
    reporter.replied(ok(compose(reporter)))
    reporter.add(events({"bob": Totals(1, 0, 0, 1.0)}, received=("c",)))
    reporter.replied(ok(compose(reporter), epoch=2, need_full=True))
    assert (reporter.epoch, reporter.num_epochs) == (2, 2)
    assert reporter.has_news
    for _ in range(2):
        full = compose(reporter)
        assert full.is_full
        assert (set(full.totals), full.held, full.received, full.epoch) == ({"ann", "bob"}, ("b", "c"), ("c",), 2)
    reporter.replied(ok(full, epoch=2))
    assert not reporter.has_news
    assert not compose(reporter).is_full


def test_a_reply_from_an_authority_that_is_no_more_is_ignored() -> None:
    reporter = Reporter("r0", 1)
    reporter.replied(ok(compose(reporter), epoch=2))
    reporter.add(events({"ann": Totals(5, 0, 0, 5.0)}))
    report = compose(reporter)
    assert reporter.replied(ok(report, epoch=1)) is None
    assert reporter.epoch == 2
    assert reporter.has_news
