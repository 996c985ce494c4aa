"""What every client received, by UTC day and hour: differences of the ledger's totals, summed where they are merged.

The same differences move the counters, so nothing is counted twice, and what is kept of a day is written with the
snapshot, as of the same moment: after a restart the replicas' totals bring exactly what the snapshot did not hold yet.
What is merged counts on the day, and in the hour, in which it is merged: the hours of a day sum up to the day, service
but for the rounding of sums. With clusters that share a store it is what all of them served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fairserve.dispatch.messages import Totals
from fairserve.dispatch.periods import Periods, Window
from fairserve.dispatch.usage_rows import Row, UsageKey, UsageRow, UsageRows
from fairserve.fairness.hierarchy import is_group, owner_of, path_of

KEEP_DAYS = 93
KEEP_HOUR_DAYS = 7
MAX_CLIENTS = 10_000
"""Of one day; further ones are summed under ``OTHERS``, unless they have a budget."""
MAX_ROWS = 200_000
"""Of all days, about 50 MB; beyond, the same."""
OTHERS = ""
MAX_HOUR_ROWS = 200_000
"""Of all hours, as many bytes again; beyond, the oldest day's go, and of a single day what is further is summed."""
HOURS = 24
"""Of a day."""


class UsageBook:
    """Outlives the dispatcher that writes it. It has no clock: :meth:`turn` tells it the time, a few times a second."""

    def __init__(
        self,
        keep_days: int = KEEP_DAYS,
        max_clients: int = MAX_CLIENTS,
        max_rows: int = MAX_ROWS,
        *,
        keep_hour_days: int = KEEP_HOUR_DAYS,
        max_hour_rows: int = MAX_HOUR_ROWS,
    ) -> None:
        self.keep_days = keep_days
        self.keep_hour_days = keep_hour_days
        """Days of which the hours are kept; 0: none."""
        self.max_clients = max_clients
        self._max_rows = max_rows
        self._max_hour_rows = max_hour_rows
        self.now = Periods()
        self._days, self._hours = UsageRows(), UsageRows()
        self._dropped_until = 0
        """Hours before that day went, because there were too many."""
        self._under_way: dict[str, tuple[Row, ...]] = {}
        """Rows of today and of this hour, of clients that have rows of their own."""
        self._changed: set[str] = set()
        """Of those, since the last cut."""
        self._sums: dict[str, dict[Window, int]] = {}
        """Tokens of each window under way, of clients and groups that are watched here or elsewhere."""
        self._watched: set[str] = set()
        self._others: tuple[UsageBook, ...] = ()
        """Of the other models of the same service."""
        self._touched: set[str] = set()
        self.promised: Mapping[str, int] = {}
        """Tokens by client or group, promised to requests under way: ``budgets.py`` keeps them."""

    @property
    def first_day(self) -> int:
        """The first one that is kept."""
        return self.now.day - self.keep_days + 1

    @property
    def first_hour(self) -> int:
        """The same, of those by hour."""
        return max(self.now.day - self.keep_hour_days + 1, self._dropped_until) * HOURS

    # -- events -------------------------------------------------------------------------------------------------------

    def turn(self, unix_s: float) -> bool:
        """It is now so late; whether another minute, day or month has begun."""
        was, now = self.now, Periods(unix_s)
        if was.hour != now.hour:
            self._note_changes()
            self._under_way = {}
        self.now = now
        if (was.minute, was.day) == (self.now.minute, self.now.day):
            return False
        for sums in self._sums.values():
            sums["minute"] = 0
        if was.day != self.now.day:
            self._days.drop_before(self.first_day)
            self._hours.drop_before(self.first_hour)
            for node in self._sums:
                self._sum_up(node)
        return True

    def served(self, client: str, added: Totals) -> None:
        """The ledger's totals of the client rose by so much."""
        num_input, num_cached, num_output, service = added
        for row in self._rows_of(client):
            row.num_input += num_input
            row.num_cached += num_cached
            row.num_output += num_output
            row.service += service
        if self._sums:
            for node in path_of(owner_of(client)):
                if (sums := self._sums.get(node)) is not None:
                    for window in sums:
                        sums[window] += num_input + num_output
                    for other in self._others:
                        other._touched.add(node)

    def accepted(self, client: str) -> None:
        """A request of its may wait, or run."""
        for row in self._rows_of(client):
            row.num_requests += 1

    def meet(self, books: Iterable[UsageBook]) -> None:
        """These, and no others, are of the models of one service: a budget is of what they hold together."""
        self._others = tuple([book for book in books if book is not self])
        for node in {node for book in self._others for node in book._watched}:
            self._lend(node)

    def watch(self, node: str) -> None:
        """From now on :meth:`tokens` knows this client, or group. O(its rows of the month)."""
        self._watched.add(node)
        for book in (self, *self._others):
            book._lend(node)

    def unwatch(self, node: str) -> None:
        self._watched.discard(node)
        books = (self, *self._others)
        if not any(node in book._watched for book in books):
            for book in books:
                book._sums.pop(node, None)

    def take_touched(self) -> set[str]:
        """Whose tokens have risen at another model since the last call."""
        touched, self._touched = self._touched, set()
        return touched

    def _lend(self, node: str) -> None:
        if node not in self._sums:
            self._sums[node] = {"minute": 0, "day": 0, "month": 0}
            self._sum_up(node)

    # -- questions ----------------------------------------------------------------------------------------------------

    def tokens(self, node: str, window: Window) -> int:
        """Input and output tokens in the window under way, of what is watched, of all models. A minute counts from when
        its watch, or this process, began."""
        return sum(book._sums[node][window] for book in (self, *self._others))

    def promised_elsewhere(self, node: str) -> int:
        """Tokens promised to requests under way at other models."""
        return sum(book.promised.get(node, 0) for book in self._others)

    def rows(self, day: int) -> dict[str, UsageRow]:
        """By client, of one day."""
        return {client: row.plain() for client, row in self._days.of(day).items()}

    def page(self, first_day: int, last_day: int, most: int) -> tuple[list[tuple[Any, ...]], int | None]:
        """See :meth:`UsageRows.page`."""
        return self._days.page(first_day, last_day, most)

    def hour_page(self, first_hour: int, last_hour: int, most: int) -> tuple[list[tuple[Any, ...]], int | None]:
        """The same, by hour."""
        return self._hours.page(first_hour, last_hour, most)

    # -- what outlives this process -----------------------------------------------------------------------------------

    def cut(self, *, is_whole: bool) -> dict[UsageKey, UsageRow]:
        """See :meth:`UsageRows.cut`."""
        self._note_changes()
        return self._days.cut(is_whole=is_whole)

    def cut_hours(self, *, is_whole: bool) -> dict[UsageKey, UsageRow]:
        """The same, by hour."""
        self._note_changes()
        return self._hours.cut(is_whole=is_whole)

    def save_all_again(self) -> None:
        """The store is another one now."""
        self._days.save_all_again()
        self._hours.save_all_again()

    def load(self, rows: Mapping[UsageKey, UsageRow], hours: Mapping[UsageKey, UsageRow] | None = None) -> None:
        """Take over what an earlier life kept, instead of what is here."""
        self._under_way, self._changed = {}, set()
        self._days.load(rows)
        self._hours.load(hours or {})
        while len(self._hours) > self._max_hour_rows and self._drop_oldest():
            pass
        for node in self._sums:
            self._sum_up(node)

    def check(self) -> None:
        self._days.check()
        self._hours.check()
        for node, sums in self._sums.items():
            was = dict(sums)
            self._sum_up(node)
            assert was == sums, (node, was, sums)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _rows_of(self, client: str) -> tuple[Row, ...]:
        """Of today and of this hour, which are about to change. It is asked for every client of every report."""
        rows = self._under_way.get(client)
        if rows is None:
            return self._touch(client)
        self._changed.add(client)
        return rows

    def _note_changes(self) -> None:
        """To be done before another hour begins."""
        for client in self._changed:
            self._days.touch(self.now.day, client)
            if len(self._under_way[client]) > 1:
                self._hours.touch(self.now.hour, client)
        self._changed = set()

    def _touch(self, client: str) -> tuple[Row, ...]:
        named, day, hour = client, self.now.day, self.now.hour
        today = self._days.of(day)
        if client not in today:
            is_full = len(today) >= self.max_clients or len(self._days) >= self._max_rows
            if is_full and owner_of(client) not in self._sums:
                client = OTHERS
        rows: tuple[Row, ...] = (self._days.touch(day, client),)
        if self.keep_hour_days:
            if client not in self._hours.of(hour):
                while len(self._hours) >= self._max_hour_rows and client != OTHERS:
                    if not self._drop_oldest():
                        client = OTHERS
            rows = (*rows, self._hours.touch(hour, client))
        if client == named != OTHERS:
            self._under_way[client] = rows
        return rows

    def _drop_oldest(self) -> bool:
        """The hours of the oldest day go; False where that is today."""
        first = self._hours.first
        if first is None or first // HOURS >= self.now.day:
            return False
        self._dropped_until = first // HOURS + 1
        self._hours.drop_before(self._dropped_until * HOURS)
        return True

    def _sum_up(self, node: str) -> None:
        """Day and month from the rows."""
        today, sums = self.now.day, self._sums[node]
        sums["day"], sums["month"] = 0, 0
        for day in range(self.now.first_of_month, today + 1):
            rows = self._days.of(day)
            below = str.startswith if is_group(node) else lambda client, node: owner_of(client) == node
            num = sum(row.num_input + row.num_output for client, row in rows.items() if below(client, node))
            sums["month"] += num
            if day == today:
                sums["day"] = num
