"""Accounts that are closed at a replica, and opened again: from zero, under another generation of their name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fairserve.dispatch.ledger import Ledger
from fairserve.dispatch.messages import ReportReply, StepReport, Totals
from fairserve.dispatch.replica_book import LocalBook, Reporter
from fairserve.fairness.accounts import account_of, application_of, client_of, first_generation
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens


@dataclass(frozen=True)
class Here:
    request_id: str
    client: str
    weight: float = 1.0
    application: str = ""


class Replica:
    """A book, its reporter and the ledger at the other end; ``kept``: accounts that stay open."""

    def __init__(self, kept: int = 0) -> None:
        self.book: LocalBook[Here] = LocalBook(make_policy("vtc"), WeightedTokens())
        self.reporter = Reporter("r0", 1, kept)
        self.ledger = Ledger()
        self._num = 0

    def serve(self, client: str, num_output: int = 1, application: str = "") -> None:
        self._num += 1
        request = Here(f"{client}-{self._num}", client, application=application)
        self.book.received(request)
        self.book.push(request)
        self.book.pop()
        self.book.started(request.request_id, 10, 0)
        for _ in range(num_output):
            self.book.output(request.request_id, 1)
        self.book.finished(request.request_id)

    def compose(self) -> StepReport:
        self.reporter.add(self.book.take_events())
        return self.reporter.compose(free_kv_tokens=1, free_slots=1, kv_capacity_tokens=1, max_slots=1)

    def exchange(self, *, saved: int | None = None) -> StepReport:
        """One report, its reply, and what the replica does with it."""
        report = self.compose()
        self.ledger.merge(report)
        self.reporter.replied(ReportReply(1, report.seq, saved=report.seq if saved is None else saved))
        self.book.close(self.reporter.idle())
        return report


@pytest.fixture
def replica() -> Iterator[Replica]:
    replica = Replica()
    yield replica
    replica.book.check()
    replica.ledger.check()


def test_names_of_accounts_have_a_client_an_application_and_a_generation() -> None:
    for application in ("", "chat"):
        for generation in (0, 7):
            account = account_of("ann", application, generation)
            assert (client_of(account), application_of(account)) == ("ann", application)
            assert first_generation(account) == account_of("ann", application)
    assert len({account_of("ann", a, g) for a in ("", "chat") for g in (0, 7)}) == 4


def test_who_comes_back_after_its_account_was_closed_counts_from_zero_and_no_token_counts_twice(
    replica: Replica,
) -> None:
    replica.serve("ann", 5)
    replica.serve("bob")  # the last to leave: it stays
    replica.exchange()
    assert replica.exchange().closed == ("ann",)
    assert replica.ledger._books["r0", 1].totals.keys() == {"bob"}
    replica.serve("ann", 3)
    assert replica.exchange().totals == {"ann||1": Totals(10, 0, 3, 16.0)}
    assert replica.ledger.totals("ann") == Totals(20, 0, 8, 36.0)


def test_that_an_account_is_over_is_said_until_it_is_acknowledged(replica: Replica) -> None:
    replica.serve("ann")
    replica.serve("bob")
    replica.exchange()
    lost = replica.compose()
    again = replica.compose()
    assert lost.closed == again.closed == ("ann",)
    replica.ledger.merge(again)
    replica.ledger.merge(lost)
    assert replica.ledger._books["r0", 1].totals.keys() == {"bob"}
    replica.reporter.replied(ReportReply(1, again.seq))
    assert replica.compose().closed == ()


def test_nothing_is_closed_before_the_authority_is_sure_to_know_it(replica: Replica) -> None:
    closed: list[str] = []
    for client in ("ann", "bob", "cyd", "dan"):
        replica.serve(client)
        closed += replica.exchange(saved=1).closed
    assert closed == ["ann"], "only what the first report said is saved"


def test_an_account_in_which_something_happens_meanwhile_stays(replica: Replica) -> None:
    replica.serve("ann")
    replica.serve("bob")
    report = replica.compose()
    replica.reporter.replied(ReportReply(1, report.seq, saved=report.seq))
    idle = replica.reporter.idle()
    assert idle.keys() == {"ann", "bob"}
    replica.serve("ann")
    replica.book.close(idle)
    assert replica.compose().totals == {"ann": Totals(20, 0, 2, 24.0)}


def test_a_client_with_a_request_here_keeps_its_account(replica: Replica) -> None:
    replica.book.received(Here("w", "ann"))
    replica.book.push(Here("w", "ann"))
    replica.book.pop()
    replica.book.started("w", 10, 0)
    for client in ("bob", "cyd"):
        replica.serve(client)
    for _ in range(3):
        assert "ann" not in replica.exchange().closed


def test_the_accounts_used_last_stay_open() -> None:
    replica = Replica(kept=2)
    for i in range(10):
        replica.serve(f"client-{i}")
        replica.exchange()
    replica.exchange()
    assert set(map(client_of, replica.reporter._totals)) == {"client-8", "client-9"}


def test_who_was_never_charged_leaves_without_a_word(replica: Replica) -> None:
    for i in range(100):
        request = Here(f"r{i}", f"client-{i}")
        replica.book.received(request)
        replica.book.push(request)
        replica.book.remove(request.request_id)
        replica.book.finished(request.request_id)
    report = replica.exchange()
    assert (report.totals, report.closed) == ({}, ())
    assert len(replica.book._queue.table) == len(replica.book._account) == 1, "the last to leave"


def test_each_application_has_generations_of_its_own(replica: Replica) -> None:
    replica.serve("ann", application="chat")
    replica.serve("bob")
    replica.exchange()
    replica.exchange()
    replica.serve("ann", application="chat")
    replica.serve("ann", application="batch")
    assert replica.exchange().totals.keys() == {"ann|chat|1", "ann|batch|1"}
    assert replica.ledger.accounts().keys() == {"ann|chat", "ann|batch", "bob"}


def test_a_full_report_tells_which_accounts_are_over() -> None:
    ledger, ann, bob = Ledger(), Totals(1, 0, 0, 1.0), Totals(2, 0, 0, 2.0)
    ledger.merge(StepReport("r0", 1, 1, 1, 0, 0, 0, 0, totals={"ann": ann, "bob": bob}))
    ledger.merge(StepReport("r0", 1, 2, 1, 0, 0, 0, 0, totals={"bob": bob}, is_full=True))
    assert ledger._books["r0", 1].totals.keys() == {"bob"}
    assert ledger.totals("ann") == ann
    ledger.check()


def test_books_of_lost_replicas_go_when_there_are_too_many_rows_and_those_of_the_living_never() -> None:
    ledger = Ledger(max_rows=4)
    for i in range(4):
        totals = {f"a{i}": Totals(1, 0, 0, 1.0), f"b{i}": Totals(1, 0, 0, 1.0)}
        ledger.merge(StepReport(f"r{i}", 1, 1, 1, 0, 0, 0, 0, totals=totals))
    assert len(ledger.acks()) == 4, "more rows than there should be, but all may speak again"
    ledger.lost_replica("r1", 1)
    ledger.lost_replica("r0", 1)
    assert ledger.acks().keys() == {("r2", 1), ("r3", 1)}
    ledger.lost_replica("r2", 1)
    assert ledger.acks().keys() == {("r2", 1), ("r3", 1)}, "four rows are not too many"
    ledger.check()
