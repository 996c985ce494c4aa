"""What clients used by day: exact over days, restarts and crowds of names."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.dispatch.messages import Totals
from fairserve.dispatch.periods import DAY_S, WINDOWS, Periods, Window, date_of, utc
from fairserve.dispatch.usage import HOURS, OTHERS, UsageBook
from fairserve.dispatch.usage_rows import UsageKey, UsageRow
from tests.dispatch.kit import Desk, submit
from tests.memory_store import run_to_end

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC).timestamp()
"""Of a leap day, which is the last of its month."""


@given(st.integers(0, 200_000))
def test_days_have_the_dates_that_the_calendar_gives_them(day: int) -> None:
    moment = datetime.fromtimestamp(day * DAY_S, UTC)
    assert date_of(day) == (moment.year, moment.month, moment.day)
    assert utc(day * DAY_S + 3_723) == moment.strftime("%Y-%m-%dT01:02:03Z")


@given(st.floats(0, 1e10))
def test_every_window_ends_after_now_where_the_next_one_begins(unix_s: float) -> None:
    now = Periods(unix_s)
    for window in WINDOWS:
        assert now.ends_s(window) > unix_s
    month_end = datetime.fromtimestamp(now.ends_s("month"), UTC)
    first = datetime.fromtimestamp(now.first_of_month * DAY_S, UTC)
    assert (month_end.day, month_end.hour, first.day) == (1, 0, 1)
    assert (first.year * 12 + first.month + 1) == month_end.year * 12 + month_end.month


def book(**more: int) -> UsageBook:
    made = UsageBook(**more)
    made.turn(NOON)
    return made


def used(made: UsageBook, node: str) -> dict[Window, int]:
    return {window: made.tokens(node, window) for window in WINDOWS}


def test_a_window_begins_empty_and_the_longer_ones_go_on() -> None:
    made = book()
    made.watch("ann")
    made.served("ann", Totals(10, 4, 5, 20.0))
    assert used(made, "ann") == {"minute": 15, "day": 15, "month": 15}
    made.turn(NOON + 60)
    made.served("ann", Totals(1, 0, 0, 1.0))
    assert used(made, "ann") == {"minute": 1, "day": 16, "month": 16}
    made.turn(NOON + DAY_S)
    assert used(made, "ann") == {"minute": 0, "day": 0, "month": 0}, "1 March"
    assert made.rows(Periods(NOON).day) == {"ann": (0, 11, 4, 5, 21.0)}, "and the day before stays"


def test_a_group_has_what_its_clients_used_also_before_it_was_watched() -> None:
    made = book()
    for client in ("acme/research/ann", "acme/bob", "acmes/eve"):
        made.served(client, Totals(10, 0, 0, 10.0))
    made.watch("acme/")
    made.served("acme/bob", Totals(1, 0, 2, 5.0))
    assert used(made, "acme/") == {"minute": 3, "day": 23, "month": 23}
    made.check()


def test_days_that_are_too_old_go() -> None:
    made = book(keep_days=31)
    made.accepted("ann")
    made.turn(NOON + 30 * DAY_S)
    assert made.rows(Periods(NOON).day) == {"ann": (1, 0, 0, 0, 0.0)}
    made.turn(NOON + 31 * DAY_S)
    assert made.rows(Periods(NOON).day) == {}
    made.check()


@pytest.mark.parametrize("bound", ["max_clients", "max_rows"])
def test_a_crowd_of_names_is_summed_but_who_has_a_budget_is_counted_by_name(bound: str) -> None:
    made = book(**{bound: 2})
    made.watch("payer")
    for client in ("a", "b", "c", "d", "payer"):
        made.served(client, Totals(1, 0, 0, 1.0))
    day = Periods(NOON).day
    assert {client: row[1] for client, row in made.rows(day).items()} == {"a": 1, "b": 1, OTHERS: 2, "payer": 1}
    assert used(made, "payer")["month"] == 1


def test_a_cut_holds_what_changed_and_again_what_may_be_lost() -> None:
    made, day = book(), Periods(NOON).day
    made.accepted("ann")
    assert made.cut(is_whole=False) == {(day, "ann"): (1, 0, 0, 0, 0.0)}
    made.accepted("bob")
    assert set(made.cut(is_whole=True)) == {(day, "ann"), (day, "bob")}, "the cut before was not kept"
    assert made.cut(is_whole=False) == {}
    made.save_all_again()
    assert set(made.cut(is_whole=False)) == {(day, "ann"), (day, "bob")}


def hours_of(made: UsageBook, day: int) -> dict[str, list[UsageRow]]:
    """By client, of the hours of one day."""
    found: dict[str, list[UsageRow]] = {}
    for _, client, *row in made.hour_page(day * HOURS, day * HOURS + HOURS - 1, 10**6)[0]:
        found.setdefault(client, []).append(tuple(row))  # type: ignore[arg-type]
    return found


def assert_hours_sum_up(made: UsageBook) -> None:
    """Each client's hours of a day are its day, of all days of which there are hours."""
    for day in range(made.first_hour // HOURS, made.now.day + 1):
        sums = {client: tuple(map(sum, zip(*rows, strict=True))) for client, rows in hours_of(made, day).items()}
        assert sums == {client: pytest.approx(row) for client, row in made.rows(day).items()}
    made.check()


@given(st.data())
def test_the_hours_of_a_day_are_the_day_whatever_is_lost_and_loaded(data: st.DataObject) -> None:
    """Cuts are kept or lost, lives end anywhere; names come in crowds."""
    kept: tuple[dict[UsageKey, UsageRow], dict[UsageKey, UsageRow]] = ({}, {})
    made, now_s, is_whole = book(max_clients=3, keep_hour_days=2), NOON, True
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(("served", "served", "accepted", "later", "cut", "lost", "restart"))):
            case "served":
                tokens = data.draw(st.integers(0, 9))
                made.served(data.draw(st.sampled_from("abcde")), Totals(tokens, tokens // 2, 1, tokens / 3))
            case "accepted":
                made.accepted(data.draw(st.sampled_from("abcde")))
            case "later":
                now_s += data.draw(st.sampled_from((60, 3_000, 30_000)))
                made.turn(now_s)
            case "cut":
                for rows, cut in zip(
                    kept, (made.cut(is_whole=is_whole), made.cut_hours(is_whole=is_whole)), strict=True
                ):
                    rows.update(cut)
                is_whole = False
            case "lost":
                made.cut(is_whole=is_whole)
                made.cut_hours(is_whole=is_whole)
                is_whole = True
            case "restart":
                made, is_whole = book(max_clients=3, keep_hour_days=2), True
                made.turn(now_s)
                made.load(*[{key: row for key, row in rows.items() if key[0] >= first} for rows, first in
                            zip(kept, (made.first_day, made.first_hour), strict=True)])  # fmt: skip
        assert_hours_sum_up(made)


def test_hours_go_with_their_days_and_none_are_kept_where_that_is_said() -> None:
    made, none = book(keep_hour_days=2), book(keep_hour_days=0)
    for one in (made, none):
        one.accepted("ann")
        one.turn(NOON + DAY_S)
        one.accepted("ann")
    today = Periods(NOON + DAY_S).day
    assert hours_of(made, today - 1) == hours_of(made, today) == {"ann": [(1, 0, 0, 0, 0.0)]}
    assert hours_of(none, today - 1) == hours_of(none, today) == {}
    made.turn(NOON + 2 * DAY_S)
    assert (hours_of(made, today - 1), len(hours_of(made, today))) == ({}, 1)
    assert made.first_hour == today * HOURS


def test_what_changed_before_the_hour_turned_is_in_the_next_cut() -> None:
    made, day, hour = book(), Periods(NOON).day, Periods(NOON).hour
    made.accepted("ann")
    made.cut(is_whole=True)
    made.cut_hours(is_whole=True)
    made.accepted("ann")
    made.turn(NOON + DAY_S)
    made.accepted("ann")
    one, two = (1, 0, 0, 0, 0.0), (2, 0, 0, 0, 0.0)
    assert made.cut(is_whole=False) == {(day, "ann"): two, (day + 1, "ann"): one}
    assert made.cut_hours(is_whole=False) == {(hour, "ann"): two, (hour + HOURS, "ann"): one}


def test_too_many_hours_cost_the_oldest_day_and_then_names() -> None:
    made, today = book(max_hour_rows=4), Periods(NOON).day
    for hour in (0, 1, DAY_S // 3_600):
        made.turn(NOON + hour * 3_600)
        made.accepted("ann")
        made.accepted("bob")
    assert (hours_of(made, today), made.first_hour) == ({}, (today + 1) * HOURS)
    assert_hours_sum_up(made)
    made.turn(NOON + DAY_S + 3_600)
    for client in ("ann", "bob", "eve"):
        made.served(client, Totals(5, 0, 1, 7.0))
    assert hours_of(made, today + 1)[OTHERS] == [(0, 5, 0, 1, 7.0)]
    again = book(max_hour_rows=2)
    again.turn(NOON + DAY_S)
    rows = {(hour, client): (1, 0, 0, 0, 0.0) for hour in (today * HOURS, again.now.hour) for client in ("ann", "bob")}
    again.load({}, rows)
    assert (hours_of(again, today), len(hours_of(again, today + 1))) == ({}, 2)


@pytest.mark.parametrize("is_late", [False, True], ids=["saved at the end", "saved a report before the end"])
def test_no_token_is_used_twice_or_forgotten_over_a_restart(desk: Desk, is_late: bool) -> None:
    """The rows of a cut are as old as its snapshot, and the replica tells the rest."""
    desk.dispatcher.usage.turn(NOON)
    replica = desk.replica()
    desk.router().call(submit("r1"))
    replica.report(received=("r1",), started=("r1",), served={"ann": (10, 1)})
    cuts = [run_to_end(desk.dispatcher.cutter.steps(is_whole=True))]
    replica.report(served={"ann": (0, 4)})
    if not is_late:
        cuts.append(run_to_end(desk.dispatcher.cutter.steps(is_whole=True)))
    desk.restart(snapshot=cuts[-1].snapshot())
    usage = desk.dispatcher.usage
    usage.turn(NOON)
    hours = {key: row for cut in cuts for key, row in cut.usage_hours.items()}
    usage.load({key: row for cut in cuts for key, row in cut.usage.items()}, hours)
    usage.turn(NOON + 3_600)
    replica.epoch = 1
    replica.report(served={"ann": (0, 2)}, is_full=True)
    assert usage.rows(Periods(NOON).day) == {"ann": (1, 10, 0, 7, 24.0)}
    before, after = hours_of(usage, Periods(NOON).day)["ann"]
    assert (before, after) == (
        ((1, 10, 0, 1, 12.0), (0, 0, 0, 6, 12.0)) if is_late else ((1, 10, 0, 5, 20.0), (0, 0, 0, 2, 4.0))
    )
