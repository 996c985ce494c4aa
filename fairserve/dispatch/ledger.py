"""The ledger: what every client has received, merged from the replicas' cumulative totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairserve.dispatch.messages import NOTHING, StepReport, Totals
from fairserve.dispatch.sums import Sum
from fairserve.fairness.accounts import client_of


@dataclass(slots=True)
class _Book:
    """Newest totals of one incarnation of one replica."""

    seq: int = 0
    totals: dict[str, Totals] = field(default_factory=dict)


class Ledger:
    """Applies differences of cumulative totals, kept per account (client and application): a lost report is made good
    by the next, a repeated or overtaken one changes nothing. Books of dead incarnations are kept, so that a late report
    after a partition is still merged right, up to ``max_books``; then the longest silent one goes."""

    def __init__(self, max_books: int = 10_000) -> None:
        self._books: dict[tuple[str, int], _Book] = {}
        self._totals: dict[str, Sum] = {}
        self._with_application: dict[str, list[str]] = {}
        """client -> those of its accounts that name an application."""
        self._max_books = max_books
        self.whole = Sum()
        """What all clients together have received; to look at."""

    def service(self, client: str) -> float:
        """What this client has received, not divided by weight."""
        accounts = (client, *self._with_application.get(client, ()))
        return sum(total.service for account in accounts if (total := self._totals.get(account)) is not None)

    def totals(self, client: str) -> Totals:
        """Everything this client has received, over all replicas that ever reported."""
        whole = Sum()
        for account in (client, *self._with_application.get(client, ())):
            if account in self._totals:
                whole.add(self._totals[account])
        return whole.totals()

    def accounts(self) -> Mapping[str, Totals]:
        """The same, by account."""
        return {account: total.totals() for account, total in self._totals.items()}

    def ack(self, replica: str, incarnation: int) -> int:
        """The newest merged sequence number of that incarnation, 0 for none."""
        book = self._books.get((replica, incarnation))
        return book.seq if book else 0

    def merge(self, report: StepReport, *, as_baseline: bool = False) -> dict[str, Totals] | None:
        """Take a report in. Returns what it adds per account, or None when it is a repeat or was overtaken.

        ``as_baseline`` is for an authority without memory of a replica that served before it: totals of accounts not
        yet in the replica's book are taken over, but do not count as added.
        """
        key = (report.replica, report.incarnation)
        book = self._books.pop(key, None) or _Book()
        self._books[key] = book
        if report.seq <= book.seq:
            return None
        book.seq = report.seq
        added = {}
        for account, totals in report.totals.items():
            is_new = account not in book.totals
            had = book.totals.get(account, NOTHING)
            if totals.service != had.service or totals != had:
                difference = totals - had
                book.totals[account] = totals
                self._add(account, difference)
                if not (as_baseline and is_new):
                    added[account] = difference
        while len(self._books) > self._max_books:
            del self._books[next(iter(self._books))]
        return added

    def _add(self, account: str, difference: Totals) -> None:
        total = self._totals.get(account)
        if total is None:
            total = self._totals[account] = Sum()
            if (client := client_of(account)) != account:
                self._with_application.setdefault(client, []).append(account)
        total.add(difference)
        self.whole.add(difference)

    def dump(self) -> dict[str, Any]:
        """Plain values for a snapshot."""
        return {
            "totals": {account: _row(totals) for account, totals in self._totals.items()},
            "books": [
                [replica, incarnation, book.seq, {account: _row(totals) for account, totals in book.totals.items()}]
                for (replica, incarnation), book in self._books.items()
            ],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Take over what :meth:`dump` gave."""
        self._totals, self._with_application, self.whole = {}, {}, Sum()
        for account, row in data["totals"].items():
            self._add(account, Totals(*row))
        self._books = {
            (replica, incarnation): _Book(seq, {account: Totals(*row) for account, row in totals.items()})
            for replica, incarnation, seq, totals in data["books"]
        }

    def check(self) -> None:
        for client, totals in self._totals.items():
            assert totals.num_input >= totals.num_cached >= 0 and totals.num_output >= 0, (client, totals)
        assert self.whole.num_input == sum(totals.num_input for totals in self._totals.values())
        assert self.whole.num_output == sum(totals.num_output for totals in self._totals.values())


def _row(totals: Totals | Sum) -> list[float]:
    return [totals.num_input, totals.num_cached, totals.num_output, totals.service]
