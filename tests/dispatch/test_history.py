"""Clients over time: what is told was so, memory is bounded, and a store can take the minutes over."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from fairserve.dispatch.history import HOUR_S, SLACK, WEEK_S, HistoryBook
from fairserve.views import History

BEGIN_S = 1_700_000_040
"""On a whole minute."""


def told(book: HistoryBook, clients: Sequence[str], now_s: float, since_s: float = 0.0, resolution_s: int = 1) -> Any:
    """Checked as the views say."""
    steps = book.series(clients, since_s, resolution_s, now_s)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return History.model_validate(end.value)


def book_with(*clients: str, max_clients: int = 10) -> HistoryBook:
    book = HistoryBook(max_clients)
    book.choose(clients, BEGIN_S)
    return book


def test_a_client_is_told_second_by_second_from_its_first_point_on() -> None:
    book = book_with("ann")
    for i in range(5):
        book.record("ann", (BEGIN_S + i, 10.0 * i, float(i), 0.5))
    history = told(book, ["ann"], BEGIN_S + 4.7, since_s=BEGIN_S - 2)
    assert history.times_s == tuple(float(BEGIN_S + i) for i in range(-2, 5))
    assert history.clients["ann"].service == (None, None, 0.0, 10.0, 20.0, 30.0, 40.0)
    assert history.clients["ann"].waiting == (None, None, 0.0, 1.0, 2.0, 3.0, 4.0)


def test_while_it_has_nothing_to_do_its_service_stays_and_it_does_not_wait() -> None:
    book = book_with("ann")
    book.record("ann", (BEGIN_S, 7.0, 3.0, 1.0))
    book.record("ann", (BEGIN_S + 10, 9.0, 3.0, 1.0))
    ann = told(book, ["ann"], BEGIN_S + 11, since_s=BEGIN_S).clients["ann"]
    assert ann.service == (7.0,) * 10 + (9.0,) * 2
    assert ann.waiting == (3.0, 3.0, *(0.0,) * 8, 3.0, 3.0), "one second late is no hole"
    assert ann.lead == (1.0, 1.0, *(None,) * 8, 1.0, 1.0)


def test_of_clients_that_are_not_kept_nothing_is_known() -> None:
    book = book_with("ann")
    book.record("eve", (BEGIN_S, 7.0, 3.0, 1.0))
    assert told(book, ["eve"], BEGIN_S + 1, since_s=BEGIN_S).clients["eve"].service == (None, None)


def test_a_point_a_minute_is_kept_for_a_week_and_a_point_a_second_for_an_hour() -> None:
    book = book_with("ann")
    for i in range(0, 9 * 24 * 3600, 30):
        book.record("ann", (BEGIN_S + i, float(i), 1.0, 0.0))
    points = book._clients["ann"].points
    assert len(points[60].time_s) <= WEEK_S // 60 + SLACK
    assert len(points[1].time_s) <= HOUR_S // 30 + SLACK // 30 + 2
    assert book.num_bytes <= 20 * (WEEK_S // 60 + HOUR_S + 2 * SLACK)
    now_s = BEGIN_S + 9 * 24 * 3600
    minutes = told(book, ["ann"], now_s, resolution_s=60)
    assert len(minutes.times_s) == WEEK_S // 60 and None not in minutes.clients["ann"].service
    assert minutes.times_s[-1] == now_s and minutes.clients["ann"].service[-2] == 9 * 24 * 3600 - 60
    seconds = told(book, ["ann"], now_s)
    assert len(seconds.times_s) == HOUR_S and None not in seconds.clients["ann"].service


def test_whoever_was_chosen_the_longest_ago_makes_room() -> None:
    book = book_with("ann", "bob", max_clients=3)
    book.choose(["cyd", "ann"], BEGIN_S + 10)
    book.choose(["dan"], BEGIN_S + 20)
    assert sorted(book._clients) == ["ann", "cyd", "dan"] and "bob" not in book
    rng = random.Random(1)
    for i in range(1_000):
        book.choose([f"c{rng.randrange(50)}" for _ in range(10)], BEGIN_S + i)
        assert len(book) <= 3


def test_a_second_that_comes_twice_is_one_point() -> None:
    book = book_with("ann")
    book.record("ann", (BEGIN_S, 1.0, 0.0, 0.0))
    book.record("ann", (BEGIN_S, 2.0, 0.0, 0.0))
    book.record("ann", (BEGIN_S - 5, 3.0, 0.0, 0.0))
    assert list(book._clients["ann"].points[1].service) == [1.0]


def test_the_minutes_go_through_a_store_and_come_back() -> None:
    book = book_with("ann", "bob")
    for i in range(0, 600, 7):
        book.record("ann", (BEGIN_S + i, float(i), 2.0, 5.0))
        book.record("bob", (BEGIN_S + i, 2.0 * i, 1.0, 0.0)) if i < 300 else None
    rows = book.take_new_rows()
    assert book.take_new_rows() == []
    assert {row[0] for row in rows} == {60} and len(rows) == 10 + 5
    heir = HistoryBook(10)
    heir.load(sorted(rows, key=lambda row: row[1]))
    now_s = BEGIN_S + 599
    assert told(heir, ["ann", "bob"], now_s, resolution_s=60) == told(book, ["ann", "bob"], now_s, resolution_s=60)
    assert heir.take_new_rows() == [], "the store has them already"


@pytest.mark.parametrize("num", [1, 40])
def test_a_long_answer_is_put_together_in_steps(num: int) -> None:
    book = book_with(*map(str, range(num)), max_clients=num)
    for client in range(num):
        book.record(str(client), (BEGIN_S, 1.0, 1.0, 1.0))
    assert sum(1 for _ in book.series(list(map(str, range(num))), 0, 1, BEGIN_S + 10.0)) == 4 * num
