"""The ledger: what every client has received, merged from the cumulative totals of replicas and of other clusters.

Two kinds of rows, each bounded by its own rule. *Books* hold, per incarnation of a replica, the newest total of each
account that is open there: a difference can be taken only while the row is there, so a row goes only when the replica
says that the account is over (``StepReport.closed``), or when a full report does not name it. *Totals* hold, per
account, the sum over all replicas for people to look at: no decision reads them, and those of a client that is
forgotten move to :data:`FORGOTTEN`, so that the sum of all stays. Where other clusters merge these totals
(``is_shared``), or other models of the same service do (:meth:`Ledger.take_news`), they only ever rise, so they stay,
whoever is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fairserve.dispatch.cut import SLICE, BookKey, Changes, Served
from fairserve.dispatch.messages import NOTHING, StepReport, Totals
from fairserve.dispatch.sums import Sum
from fairserve.fairness.accounts import client_of, first_generation

CLUSTER = "cluster:"
"""Before the id of another cluster, where the name of a replica stands. What those served counts here, and is not told
to others as ours."""
MODEL = CLUSTER + "model:"
"""Before the slot of another model of the same service, likewise."""
EARLIER: BookKey = (CLUSTER, 0)
"""What was served before counting began here: for people, charged to nobody."""
FORGOTTEN = ""
"""The account, nobody's, that holds what clients which are forgotten had received."""
MAX_ROWS = 1_000_000
"""Rows of replicas' books; beyond, the books of dead replicas go, the longest dead first."""


@dataclass(slots=True)
class _Book:
    """Newest totals of one incarnation of one replica, or of another cluster."""

    seq: int = 0
    totals: dict[str, Totals] = field(default_factory=dict)
    unkept: dict[str, Totals | None] = field(default_factory=dict)
    """Those that changed since the last cut; None for an account that is over."""


class Ledger:
    """Applies differences of cumulative totals, kept per account (client and application): a lost report is made good
    by the next, a repeated or overtaken one changes nothing. Books of dead incarnations are kept, so that a late report
    after a partition is still merged right, up to ``max_books``; then the longest silent one of a replica goes. Beyond
    ``max_rows`` rows in all, those of replicas that were lost go, the longest lost first."""

    def __init__(self, max_books: int = 10_000, max_rows: int = MAX_ROWS) -> None:
        self._books: dict[BookKey, _Book] = {}
        self._clusters: dict[BookKey, _Book] = {}
        """Of other clusters; never dropped."""
        self._totals: dict[str, Sum] = {}
        self._with_application: dict[str, list[str]] = {}
        """client -> those of its accounts that name an application."""
        self._max_books = max_books
        self._max_rows = max_rows
        self._num_rows = 0
        """Of replicas' books."""
        self._lost: dict[BookKey, None] = {}
        """Books of replicas that are lost, the longest lost first."""
        self.is_shared = False
        """Other clusters merge what this one publishes of its totals."""
        self._news: dict[str, None] | None = None
        """Accounts whose totals have changed since :meth:`take_news`, while somebody asks."""
        self.whole = Sum()
        """What all clients together have received; to look at."""
        self._accounts: Changes[str, Served] | None = None
        self._weight: Callable[[str], float] = lambda client: 1.0
        self._changed_books: set[BookKey] = set()
        self._gone_books: list[BookKey] = []
        self._pending_books: dict[BookKey, _Book] = {}
        self._cut_books: dict[BookKey, tuple[int, Mapping[str, Totals | None]]] = {}

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
        """The same, by account; of clients that are forgotten, their sum under ``FORGOTTEN``."""
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
        self._lost.pop(key, None)
        if report.seq <= book.seq:
            return None
        self._before_book(key)
        book.seq = report.seq
        num_rows = len(book.totals)
        added: dict[str, Totals] = {}
        earlier: dict[str, Totals] = {}
        watched = self._accounts
        if watched is not None:
            watched.before({*map(first_generation, report.totals)})
        mine = book.totals
        for account, totals in report.totals.items():
            had = mine.get(account)
            if had is None or totals != had:
                if had is None and totals == NOTHING:
                    continue
                difference = totals if had is None else totals - had
                mine[account] = totals
                if watched is not None:
                    book.unkept[account] = totals
                self._add(first_generation(account), difference)
                (earlier if as_baseline and had is None else added)[account] = difference
        if earlier:
            self._note_earlier(earlier)
        closed = (*report.closed, *(book.totals.keys() - report.totals.keys() if report.is_full else ()))
        for account in closed:
            if book.totals.pop(account, None) is not None and watched is not None:
                book.unkept[account] = None
        self._num_rows += len(book.totals) - num_rows
        while len(self._books) > self._max_books:
            self._drop(next(iter(self._books)))
        self._shrink()
        return added

    def acks(self) -> dict[BookKey, int]:
        """The newest merged sequence number of every incarnation of a replica."""
        return {key: book.seq for key, book in self._books.items()}

    def lost_replica(self, replica: str, incarnation: int) -> None:
        """It has been silent for long; it may speak again all the same."""
        if (replica, incarnation) in self._books:
            self._lost[replica, incarnation] = None
            self._shrink()

    def forget(self, client: str) -> None:
        """Nobody will ask what this client has received. Books of replicas stay as they are: what is still to come is
        merged. No effect on totals that other clusters merge, or that hold some of theirs."""
        if self.is_shared or self._news is not None or self._clusters.keys() - {EARLIER}:
            return
        accounts = (client, *self._with_application.pop(client, ()))
        if self._accounts is not None:
            self._accounts.before({*accounts, FORGOTTEN})
        for account in accounts:
            total = self._totals.pop(account, None)
            if total is not None:
                self._totals.setdefault(FORGOTTEN, Sum()).add(total)
        earlier = self._clusters.get(EARLIER, _Book())
        for account in accounts:
            if (total_earlier := earlier.totals.pop(account, None)) is not None:
                self._note_earlier({FORGOTTEN: total_earlier})
                earlier.unkept[account] = None

    def merge_cluster(
        self, cluster: str, incarnation: int, totals: Mapping[str, Totals], seq: int
    ) -> dict[str, Totals]:
        """Take in part of what another cluster's replicas have served since its counting began; as often and in as
        many parts as one likes. Returns what it adds. ``seq``: up to where everything has been taken in."""
        key = (CLUSTER + cluster, incarnation)
        book = self._clusters.setdefault(key, _Book())
        self._before_book(key)
        book.seq = max(book.seq, seq)
        if self._accounts is not None:
            self._accounts.before_unkept(totals)
        added = {}
        for account, total in totals.items():
            had = book.totals.get(account, NOTHING)
            if total != had:
                book.totals[account] = book.unkept[account] = total
                added[account] = total - had
                self._add(account, added[account])
        return added

    def take_news(self, *, is_whole: bool) -> list[str]:
        """Accounts whose totals have changed since the last call; with ``is_whole`` all. From the first call until
        :meth:`no_news` totals only ever rise."""
        news = self._totals if is_whole or self._news is None else self._news
        self._news = {}
        return [account for account in news if account != FORGOTTEN]

    def no_news(self) -> None:
        """Nobody asks for them any more."""
        self._news = None

    def served_by_model(self, account: str) -> float:
        """Service by this model of the service since counting began, of this cluster and of those that share its store,
        and by none of the other models."""
        service: float = self._totals[account].service
        for key, book in self._clusters.items():
            if (key == EARLIER or key[0].startswith(MODEL)) and (elsewhere := book.totals.get(account)) is not None:
                service -= elsewhere.service
        return service

    def knows(self, cluster: str, incarnation: int) -> bool:
        """Whether something of it, at least that there is nothing, has been taken in."""
        return (CLUSTER + cluster, incarnation) in self._clusters

    def known_clusters(self) -> dict[tuple[str, int], int]:
        """Up to where other clusters' totals have been taken in, by cluster and incarnation."""
        return {(name.removeprefix(CLUSTER), number): book.seq for (name, number), book in self._clusters.items()}

    def _note_earlier(self, earlier: Mapping[str, Totals]) -> None:
        """It is in the totals, and is not to be told as served since counting began."""
        book = self._clusters.setdefault(EARLIER, _Book())
        self._before_book(EARLIER)
        for account, difference in earlier.items():
            account = first_generation(account)
            total = book.totals.get(account, NOTHING) + difference
            book.totals[account] = book.unkept[account] = total

    def _shrink(self) -> None:
        while self._num_rows > self._max_rows and self._lost:
            self._drop(next(iter(self._lost)))

    def _drop(self, key: BookKey) -> None:
        self._before_book(key)
        self._num_rows -= len(self._books.pop(key).totals)
        self._lost.pop(key, None)
        if self._accounts is not None:
            self._changed_books.discard(key)
            self._gone_books.append(key)

    def _served(self, account: str) -> Totals:
        """What this cluster's own replicas have served since counting began."""
        served = self._totals[account].totals()
        for book in self._clusters.values():
            if (elsewhere := book.totals.get(account)) is not None:
                served -= elsewhere
        return served

    # -- cuts ---------------------------------------------------------------------------------------------------------

    def cut(
        self, weight: Callable[[str], float], *, is_whole: bool
    ) -> Generator[
        None,
        None,
        tuple[dict[str, Served | None], dict[BookKey, tuple[int, Mapping[str, Totals | None]]], list[BookKey]],
    ]:
        """The rows of accounts and books as of the first step, and the books that are gone since the last cut; see
        :class:`~fairserve.dispatch.cut.Cutter`."""
        self._weight = weight
        if self._accounts is None:
            self._accounts, is_whole = Changes(self._row), True
        self._accounts.begin(self._totals if is_whole else None)
        gone, self._gone_books = self._gone_books, []
        changed, self._changed_books = self._changed_books, set()
        self._cut_books, self._pending_books = {}, {}
        if is_whole:
            self._pending_books = {**self._books, **self._clusters}
        else:
            for key in changed:
                book = self._book(key)
                self._cut_books[key] = (book.seq, book.unkept)
                book.unkept = {}
        num_copied = 0
        while self._pending_books:
            num_copied += self._copy(next(iter(self._pending_books)))
            if num_copied >= SLICE:
                num_copied = 0
                yield
        served = yield from self._accounts.steps()
        books, self._cut_books = self._cut_books, {}
        return served, books, gone

    def _row(self, account: str) -> Served | None:
        if account not in self._totals:
            return None
        had = self._served(account)
        return had.num_input, had.num_cached, had.num_output, had.service, self._weight(client_of(account))

    def _book(self, key: BookKey) -> _Book:
        return self._clusters[key] if key in self._clusters else self._books[key]

    def _before_book(self, key: BookKey) -> None:
        """The book is about to change, or to go."""
        if self._accounts is not None:
            if key in self._pending_books:
                self._copy(key)
            self._changed_books.add(key)

    def _copy(self, key: BookKey) -> int:
        book = self._pending_books.pop(key)
        book.unkept = {}
        self._cut_books[key] = (book.seq, dict(book.totals))
        return len(book.totals) + 1

    def _add(self, account: str, difference: Totals) -> None:
        if self._news is not None:
            self._news[account] = None
        total = self._totals.get(account)
        if total is None:
            total = self._totals[account] = Sum()
            if (client := client_of(account)) != account:
                self._with_application.setdefault(client, []).append(account)
        whole = self.whole
        num_input, num_cached, num_output, service = difference
        total.num_input += num_input
        total.num_cached += num_cached
        total.num_output += num_output
        total.service += service
        whole.num_input += num_input
        whole.num_cached += num_cached
        whole.num_output += num_output
        whole.service += service

    def dump(self) -> dict[str, Any]:
        """Plain values for a snapshot."""
        return {
            "totals": {account: self._served(account).row() for account in self._totals},
            "books": [
                [name, incarnation, book.seq, {account: totals.row() for account, totals in book.totals.items()}]
                for (name, incarnation), book in (*self._books.items(), *self._clusters.items())
            ],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Take over what :meth:`dump` gave."""
        self._totals, self._with_application, self.whole = {}, {}, Sum()
        self._books, self._clusters = {}, {}
        self._news = None
        for account, row in data["totals"].items():
            self._add(account, Totals(*row))
        for name, incarnation, seq, totals in data["books"]:
            book = _Book(seq, {account: Totals(*row) for account, row in totals.items()})
            if name.startswith(CLUSTER):
                self._clusters[name, incarnation] = book
                for account, total in book.totals.items():
                    self._add(account, total)
            else:
                self._books[name, incarnation] = book
        self._num_rows = sum(len(book.totals) for book in self._books.values())
        self._lost = dict.fromkeys(self._books)  # until they speak

    def check(self) -> None:
        assert self._num_rows == sum(len(book.totals) for book in self._books.values())
        assert self._lost.keys() <= self._books.keys()
        for client, totals in self._totals.items():
            assert totals.num_input >= totals.num_cached >= 0 and totals.num_output >= 0, (client, totals)
            had = self._served(client)
            assert had.num_input >= had.num_cached >= 0 and had.num_output >= 0, (client, had)
        assert self.whole.num_input == sum(totals.num_input for totals in self._totals.values())
        assert self.whole.num_output == sum(totals.num_output for totals in self._totals.values())
