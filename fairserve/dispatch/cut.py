"""A cut through the authority at one moment, taken in slices between which it goes on deciding.

What is kept is rows: of nodes (counters), of accounts (what this cluster's replicas served) and of books (what each
incarnation reported). They must all be of the same moment, or a restart would charge tokens twice (a counter that
knows of a report beside a book that does not) or drop them. A row that is about to change while it still has to be
read is therefore read first (copy on write), and only rows that changed since the last cut are read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fairserve.dispatch.messages import Totals
from fairserve.dispatch.usage import UsageBook
from fairserve.dispatch.usage_rows import UsageKey, UsageRow
from fairserve.fairness.hierarchy import TOP, is_group
from fairserve.fairness.queue import FairQueue

if TYPE_CHECKING:
    from fairserve.dispatch.ledger import Ledger
    from fairserve.dispatch.watch import Watch
    from fairserve.dispatch.weights import Weights

SNAPSHOT_VERSION = 2
SLICE = 250
"""Rows read in one go: about a millisecond."""

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row")
BookKey = tuple[str, int]
"""A replica (or another cluster) and its incarnation."""
Node = tuple[float, float, str | None]
"""Counter without provisional charges; weight that requests carry; of a group, the member whose counter
newcomers are lifted to."""
Served = tuple[int, int, int, float, float]
"""Input, cached and output tokens, service; then the weight of the account's client."""


class Changes(Generic[Key, Row]):
    """Which rows of one kind changed since the last cut, and those of a cut that are still to be read. A row that is
    None is no more."""

    def __init__(self, read: Callable[[Key], Row | None]) -> None:
        self._read = read
        self._changed: set[Key] = set()
        self._pending: set[Key] = set()
        self._every: list[Key] | None = None
        """In place of ``_pending``, of a cut of all rows: copying names takes a tenth of putting them into a set."""
        self._rows: dict[Key, Row | None] = {}

    def before(self, keys: Collection[Key]) -> None:
        """The rows of these are about to change."""
        self.before_unkept(keys)
        self._changed.update(keys)

    def before_unkept(self, keys: Collection[Key]) -> None:
        """The same, by something that the next cut need not tell."""
        if self._every is not None:
            for key in keys:
                self._take(key)
        elif self._pending and not self._pending.isdisjoint(keys):
            for key in self._pending.intersection(keys):
                self._pending.discard(key)
                self._take(key)

    def begin(self, every: Iterable[Key] | None) -> None:
        """A cut is taken now: of what changed since the last one, or of ``every`` row."""
        self._pending, self._changed = self._changed if every is None else set(), set()
        self._every = None if every is None else list(every)
        self._rows = {}

    def steps(self) -> Generator[None, None, dict[Key, Row | None]]:
        """Read what is left of the cut; returns its rows."""
        left = self._pending if self._every is None else self._every
        while left:
            for _ in range(min(SLICE, len(left))):
                self._take(left.pop())
            yield
        self._every = None
        rows, self._rows = self._rows, {}
        return rows

    def _take(self, key: Key) -> None:
        if key not in self._rows:
            self._rows[key] = self._read(key)


@dataclass(slots=True)
class Cut:
    """Rows of one moment: all, or those that changed since the cut before; None for one that is no more. Nobody writes
    it once it is returned."""

    is_whole: bool
    nodes: Mapping[str, Node | None] = field(default_factory=dict)
    served: Mapping[str, Served | None] = field(default_factory=dict)
    """By account, what this cluster's own replicas have served; what other clusters can merge."""
    books: Mapping[BookKey, tuple[int, Mapping[str, Totals | None]]] = field(default_factory=dict)
    """Newest sequence number, and totals by account."""
    gone: list[BookKey] = field(default_factory=list)
    """Books that are no more."""
    usage: Mapping[UsageKey, UsageRow] = field(default_factory=dict)
    """By day and client: those that changed since what was kept last. No part of the snapshot."""
    first_day: int = 0
    """Rows of usage of earlier days go."""
    usage_hours: Mapping[UsageKey, UsageRow] = field(default_factory=dict)
    """The same, by hour and client."""
    first_hour: int = 0

    def snapshot(self) -> dict[str, Any]:
        """Of a whole cut: as ``Dispatcher.dump``."""
        assert self.is_whole
        nodes = {node: row for node, row in self.nodes.items() if row is not None}
        return {
            "version": SNAPSHOT_VERSION,
            "counters": {node: list(row[:2]) for node, row in nodes.items() if node != TOP},
            "last_to_leave": {node: row[2] for node, row in nodes.items() if node == TOP or is_group(node)},
            "ledger": {
                "totals": {account: list(row[:4]) for account, row in self.served.items() if row is not None},
                "books": [
                    [name, incarnation, seq, {account: total.row() for account, total in totals.items() if total}]
                    for (name, incarnation), (seq, totals) in self.books.items()
                ],
            },
        }


class Cutter:
    """Takes cuts of one dispatcher's counters and ledger. Nothing is watched before the first."""

    def __init__(self, queue: FairQueue[Any], watch: Watch, weights: Weights, ledger: Ledger, usage: UsageBook) -> None:
        self._usage = usage
        self._queue = queue
        self._watch = watch
        self._weights = weights
        self._ledger = ledger
        self._nodes: Changes[str, Node] | None = None

    def steps(self, *, is_whole: bool) -> Generator[None, None, Cut]:
        """The moment of the cut is the first step; each step takes less than a millisecond or so. The next cut tells
        what changed since this moment, unless this one was given up: then it must be whole. One at a time."""
        if self._nodes is None:
            self._nodes, is_whole = Changes(self._node), True
            self._queue.tell_before(self._nodes.before)
        nodes, ledger = self._nodes, self._ledger
        usage = self._usage
        cut = Cut(is_whole, usage=usage.cut(is_whole=is_whole), first_day=usage.first_day)
        cut.usage_hours, cut.first_hour = usage.cut_hours(is_whole=is_whole), usage.first_hour
        nodes.before((TOP,))
        nodes.begin(self._queue.table if is_whole else None)
        nodes.before_unkept((TOP,))  # everything moves it: read now
        reading = ledger.cut(self._weights.carried, is_whole=is_whole)
        cut.served, cut.books, cut.gone = yield from reading
        cut.nodes = yield from nodes.steps()
        return cut

    def _node(self, node: str) -> Node | None:
        queue = self._queue
        if node not in queue.table and node != TOP:
            return None
        siblings = queue.groups.get(node)
        # The next life begins with nobody waiting: the lift's reference is then whoever is least served now.
        last = None if siblings is None else siblings.least_served() or siblings.last_to_leave
        return queue.counter(node) - self._watch.unserved.get(node, 0.0), self._weights.carried(node), last
