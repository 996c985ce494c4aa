"""The router's side of the protocol, rule by rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairserve.dispatch.messages import Grant, Refusal, RouterReply
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import ClusterQueueFull, Refused
from tests.dispatch.kit import submit


@dataclass
class Caller:
    """Wants requests of a book and notes what it is answered."""

    book: RouterBook = field(default_factory=lambda: RouterBook("east", 1))
    grants: list[str] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)

    def want(self, *request_ids: str, now_s: float = 0.0, **more: object) -> None:
        for request_id in request_ids:
            self.book.want(
                submit(request_id, **more),  # type: ignore[arg-type]
                now_s,
                lambda grant: self.grants.append(grant.request_id),
                self.refusals.append,
            )


def grant(request_id: str, seq: int, replica: str = "r0") -> Grant:
    return Grant(request_id, replica, 0.0, seq)


def submitted(book: RouterBook, now_s: float = 0.0) -> list[str]:
    return [one.request_id for one in book.compose(now_s).submits]


def acknowledge(book: RouterBook, epoch: int = 1) -> None:
    book.replied(RouterReply(epoch), to_poll=False)


def test_all_that_is_wanted_travels_in_one_call() -> None:
    caller = Caller()
    assert not caller.book.has_news
    caller.want("a", "b")
    assert caller.book.has_news
    assert submitted(caller.book) == ["a", "b"]
    acknowledge(caller.book)
    assert not caller.book.has_news
    assert len(caller.book) == 2


def test_a_call_without_a_reply_is_sent_again_with_the_same_number_and_new_wants_queue_behind_it() -> None:
    caller = Caller()
    caller.want("a")
    first = caller.book.compose(0.0)
    caller.want("b")
    again = caller.book.compose(1.0)
    assert (again.seq, [one.request_id for one in again.submits]) == (first.seq, ["a"])
    acknowledge(caller.book)
    assert (caller.book.compose(2.0).seq, submitted(caller.book)) == (first.seq + 1, ["b"])


def test_a_call_that_is_sent_again_says_how_long_the_request_has_waited_by_now() -> None:
    caller = Caller()
    caller.want("a", now_s=0.0, waited_s=2.0)
    assert caller.book.compose(1.0).submits[0].waited_s == 3.0
    assert caller.book.compose(6.0).submits[0].waited_s == 8.0


def test_a_poll_carries_no_events_and_does_not_use_up_a_number() -> None:
    caller = Caller()
    caller.want("a")
    poll = caller.book.compose_poll()
    assert (poll.submits, poll.seq) == ((), 0)
    assert caller.book.compose(0.0).seq == 1


def test_a_grant_is_passed_on_once_however_often_it_is_delivered() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    for to_poll in (True, False, True):
        caller.book.replied(RouterReply(1, (grant("a", 1),)), to_poll=to_poll)
    assert caller.grants == ["a"]
    assert caller.book.compose_poll().grants_ack == 1
    assert not caller.book.has_news, "nothing to decline"


def test_grants_are_passed_on_in_the_order_of_their_numbers() -> None:
    caller = Caller()
    caller.want("a", "b")
    caller.book.compose(0.0)
    caller.book.replied(RouterReply(1, (grant("b", 2), grant("a", 1))), to_poll=True)
    assert caller.grants == ["a", "b"]


def test_a_grant_that_nobody_waits_for_is_declined() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    caller.book.forget("a")
    caller.book.replied(RouterReply(1, (grant("a", 1),)), to_poll=False)
    call = caller.book.compose(0.0)
    assert (call.declined, call.cancels, call.unreachable, caller.grants) == (("a",), ("a",), (), [])


def test_declining_an_unreachable_replica_names_it() -> None:
    caller = Caller()
    caller.book.decline(grant("a", 1, "r7"), is_unreachable=True)
    call = caller.book.compose(0.0)
    assert (call.declined, call.unreachable) == (("a",), ("r7",))


def test_what_was_forgotten_before_it_was_told_is_never_told() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.forget("a")
    assert not caller.book.has_news
    assert len(caller.book) == 0


def test_what_was_told_is_cancelled() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    acknowledge(caller.book)
    caller.book.forget("a")
    assert caller.book.compose(0.0).cancels == ("a",)


def test_what_is_in_a_call_without_a_reply_is_cancelled_by_the_next() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    caller.book.forget("a")
    acknowledge(caller.book)
    assert caller.book.compose(0.0).cancels == ("a",)


def test_a_request_that_is_wanted_again_is_not_cancelled() -> None:
    caller = Caller()
    caller.book.forget("a")
    caller.want("a")
    call = caller.book.compose(0.0)
    assert (call.cancels, [one.request_id for one in call.submits]) == ((), ["a"])


def test_a_running_request_whose_caller_goes_away_is_cancelled() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    caller.book.replied(RouterReply(1, (grant("a", 1),)), to_poll=False)
    caller.book.forget("a")
    assert caller.book.compose(0.0).cancels == ("a",)


def test_a_refusal_reaches_the_caller_and_ends_the_wait() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    error = ClusterQueueFull(5, 5, 1.0)
    for _ in range(2):
        caller.book.replied(RouterReply(1, refusals=(Refusal("a", error),)), to_poll=False)
    assert caller.refusals == [error]
    assert len(caller.book) == 0


def test_a_refusal_that_overtakes_a_resubmission_leaves_nothing_behind() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.replied(RouterReply(1, refusals=(Refusal("a", ClusterQueueFull(5, 5, 1.0)),)), to_poll=True)
    assert submitted(caller.book) == []


def test_told_to_submit_again_it_submits_everything_as_retries_with_the_time_waited() -> None:
    caller = Caller()
    caller.want("a", now_s=0.0)
    caller.book.compose(0.0)
    acknowledge(caller.book)
    caller.want("b", now_s=3.0)
    caller.book.replied(RouterReply(2, resubmit=True), to_poll=True)
    assert (caller.book.epoch, caller.book.num_epochs) == (2, 2)
    call = caller.book.compose(4.0)
    assert call.is_full
    assert [(one.request_id, one.waited_s, one.is_retry) for one in call.submits] == [
        ("a", 4.0, True),
        ("b", 1.0, False),
    ]
    acknowledge(caller.book, epoch=2)
    assert not caller.book.has_news


def test_a_new_epoch_counts_its_grants_from_one_again() -> None:
    caller = Caller()
    caller.want("a", "b")
    caller.book.compose(0.0)
    caller.book.replied(RouterReply(1, (grant("a", 9),)), to_poll=False)
    caller.book.replied(RouterReply(2, (grant("b", 1),), resubmit=True), to_poll=True)
    assert caller.grants == ["a", "b"]
    assert caller.book.compose_poll().grants_ack == 1


def test_a_reply_from_an_authority_that_is_no_more_is_ignored() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    acknowledge(caller.book, epoch=2)
    caller.book.replied(RouterReply(1, (grant("a", 1),), resubmit=True), to_poll=True)
    assert (caller.grants, caller.book.epoch, caller.book.has_news) == ([], 2, False)


def test_a_successor_that_a_first_poll_reached_is_told_everything_though_it_does_not_ask() -> None:
    caller = Caller()
    caller.want("a")
    caller.book.compose(0.0)
    acknowledge(caller.book, epoch=1)  # the first authority has it, and dies
    caller.book.replied(RouterReply(2), to_poll=True)  # a poll of before the first reply: epoch 0, so nobody asks
    assert submitted(caller.book) == ["a"]
