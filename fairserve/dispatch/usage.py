"""What every client received, by UTC day: the differences of the ledger's totals, summed where they are merged.

The same differences move the counters, so nothing is counted twice, and what is kept of a day is written with the
snapshot, as of the same moment: after a restart the replicas' totals bring exactly what the snapshot did not hold yet.
What is merged counts on the day on which it is merged. With clusters that share a store it is what all of them served.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fairserve.dispatch.messages import Totals
from fairserve.dispatch.periods import Periods, Window
from fairserve.fairness.hierarchy import is_group, owner_of, path_of

KEEP_DAYS = 93
MAX_CLIENTS = 10_000
"""Of one day; further ones are summed under ``OTHERS``, unless they have a budget."""
MAX_ROWS = 200_000
"""Of all days, about 50 MB; beyond, the same."""
OTHERS = ""
UsageRow = tuple[int, int, int, int, float]
"""Requests accepted; input, cached (part of the input) and output tokens; service."""
UsageKey = tuple[int, str]
"""Day since 1970, client."""


@dataclass(slots=True)
class _Row:
    num_requests: int = 0
    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0

    def plain(self) -> UsageRow:
        return self.num_requests, self.num_input, self.num_cached, self.num_output, self.service


class UsageBook:
    """Outlives the dispatcher that writes it. It has no clock: :meth:`turn` tells it the time, a few times a second."""

    def __init__(self, keep_days: int = KEEP_DAYS, max_clients: int = MAX_CLIENTS, max_rows: int = MAX_ROWS) -> None:
        self.keep_days = keep_days
        self.max_clients = max_clients
        self._max_rows = max_rows
        self.now = Periods()
        self._days: dict[int, dict[str, _Row]] = {}
        self._num_rows = 0
        self._sums: dict[str, dict[Window, int]] = {}
        """Tokens of each window under way, of clients and groups that are watched here or elsewhere."""
        self._watched: set[str] = set()
        self._others: tuple[UsageBook, ...] = ()
        """Of the other models of the same service."""
        self._touched: set[str] = set()
        self.promised: Mapping[str, int] = {}
        """Tokens by client or group, promised to requests under way: ``budgets.py`` keeps them."""
        self._unsaved: set[UsageKey] = set()
        self._in_cut: set[UsageKey] = set()
        """Of the cut that may not be kept yet."""

    @property
    def first_day(self) -> int:
        """The first one that is kept."""
        return self.now.day - self.keep_days + 1

    # -- events -------------------------------------------------------------------------------------------------------

    def turn(self, unix_s: float) -> bool:
        """It is now so late; whether another minute, day or month has begun."""
        was, self.now = self.now, Periods(unix_s)
        if (was.minute, was.day) == (self.now.minute, self.now.day):
            return False
        for sums in self._sums.values():
            sums["minute"] = 0
        if was.day != self.now.day:
            for day in [day for day in self._days if day < self.first_day]:
                self._num_rows -= len(self._days.pop(day))
            for node in self._sums:
                self._sum_up(node)
        return True

    def served(self, client: str, added: Totals) -> None:
        """The ledger's totals of the client rose by so much."""
        num_input, num_cached, num_output, service = added
        row = self._row(client)
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
        self._row(client).num_requests += 1

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
        return {client: row.plain() for client, row in self._days.get(day, {}).items()}

    def page(self, first_day: int, last_day: int, most: int) -> tuple[list[tuple[Any, ...]], int | None]:
        """Rows of whole days, by day and client: day, client, then the fields of ``UsageRow``; up to the day with which
        they are ``most`` or more. Then the day to ask for next, None at the end."""
        found: list[tuple[Any, ...]] = []
        for day in sorted(self._days):
            if first_day <= day <= last_day:
                if len(found) >= most:
                    return found, day
                found += [(day, client, *row) for client, row in sorted(self.rows(day).items())]
        return found, None

    # -- what outlives this process -----------------------------------------------------------------------------------

    def cut(self, *, is_whole: bool) -> dict[UsageKey, UsageRow]:
        """Rows that changed since the last cut; with ``is_whole`` those of that one, which may be lost, too."""
        if is_whole:
            self._unsaved |= self._in_cut
        self._in_cut, self._unsaved = self._unsaved, set()
        days = self._days
        return {(day, client): days[day][client].plain() for day, client in self._in_cut if client in days.get(day, ())}

    def save_all_again(self) -> None:
        """The store is another one now."""
        self._unsaved |= {(day, client) for day, rows in self._days.items() for client in rows}

    def load(self, rows: Mapping[UsageKey, UsageRow]) -> None:
        """Take over what an earlier life kept, instead of what is here."""
        self._days = {}
        for (day, client), row in rows.items():
            self._days.setdefault(day, {})[client] = _Row(*row)
        self._num_rows = len(rows)
        for node in self._sums:
            self._sum_up(node)

    def check(self) -> None:
        assert self._num_rows == sum(map(len, self._days.values()))
        for node, sums in self._sums.items():
            was = dict(sums)
            self._sum_up(node)
            assert was == sums, (node, was, sums)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _row(self, client: str) -> _Row:
        day = self.now.day
        rows = self._days.setdefault(day, {})
        if client not in rows:
            is_full = len(rows) >= self.max_clients or self._num_rows >= self._max_rows
            if is_full and owner_of(client) not in self._sums:
                client = OTHERS
            if client not in rows:
                rows[client] = _Row()
                self._num_rows += 1
        self._unsaved.add((day, client))
        return rows[client]

    def _sum_up(self, node: str) -> None:
        """Day and month from the rows."""
        today, sums = self.now.day, self._sums[node]
        sums["day"], sums["month"] = 0, 0
        for day in range(self.now.first_of_month, today + 1):
            rows = self._days.get(day, {})
            below = str.startswith if is_group(node) else lambda client, node: owner_of(client) == node
            num = sum(row.num_input + row.num_output for client, row in rows.items() if below(client, node))
            sums["month"] += num
            if day == today:
                sums["day"] = num
