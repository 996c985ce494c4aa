"""Rows of usage by client and period (a day or an hour since 1970), and which of them are not in the store yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UsageRow = tuple[int, int, int, int, float]
"""Requests accepted; input, cached (part of the input) and output tokens; service."""
UsageKey = tuple[int, str]
"""Day or hour since 1970, client."""


@dataclass(slots=True)
class Row:
    num_requests: int = 0
    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0

    def plain(self) -> UsageRow:
        return self.num_requests, self.num_input, self.num_cached, self.num_output, self.service


class UsageRows:
    """Of one kind of period."""

    def __init__(self) -> None:
        self._periods: dict[int, dict[str, Row]] = {}
        self._num = 0
        self._unsaved: set[UsageKey] = set()
        self._in_cut: set[UsageKey] = set()
        """Of the cut that may not be kept yet."""

    def __len__(self) -> int:
        return self._num

    def of(self, period: int) -> Mapping[str, Row]:
        """By client."""
        return self._periods.get(period, {})

    @property
    def first(self) -> int | None:
        """The earliest period of which something is known."""
        return min(self._periods, default=None)

    def touch(self, period: int, client: str) -> Row:
        """The row, which is about to change; made where there is none."""
        rows = self._periods.setdefault(period, {})
        if client not in rows:
            rows[client] = Row()
            self._num += 1
        self._unsaved.add((period, client))
        return rows[client]

    def drop_before(self, first: int) -> None:
        for period in [period for period in self._periods if period < first]:
            self._num -= len(self._periods.pop(period))

    def page(self, first: int, last: int, most: int) -> tuple[list[tuple[Any, ...]], int | None]:
        """Rows of whole periods, by period and client: period, client, then the fields of ``UsageRow``; up to the
        period with which they are ``most`` or more. Then the one to ask for next, None at the end."""
        found: list[tuple[Any, ...]] = []
        for period in sorted(self._periods):
            if first <= period <= last:
                if len(found) >= most:
                    return found, period
                found += [(period, client, *row.plain()) for client, row in sorted(self._periods[period].items())]
        return found, None

    def cut(self, *, is_whole: bool) -> dict[UsageKey, UsageRow]:
        """Rows that changed since the last cut; with ``is_whole`` those of that one, which may be lost, too."""
        if is_whole:
            self._unsaved |= self._in_cut
        self._in_cut, self._unsaved = self._unsaved, set()
        there = ((key, self.of(key[0]).get(key[1])) for key in self._in_cut)
        return {key: row.plain() for key, row in there if row is not None}

    def save_all_again(self) -> None:
        """The store is another one now."""
        self._unsaved |= {(period, client) for period, rows in self._periods.items() for client in rows}

    def load(self, rows: Mapping[UsageKey, UsageRow]) -> None:
        """Take over what an earlier life kept, instead of what is here."""
        self._periods = {}
        for (period, client), row in rows.items():
            self._periods.setdefault(period, {})[client] = Row(*row)
        self._num = len(rows)

    def check(self) -> None:
        assert self._num == sum(map(len, self._periods.values()))
