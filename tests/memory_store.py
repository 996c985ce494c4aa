"""What a store does with cuts, in a few lines: rows in dictionaries."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fairserve.dispatch.cut import BookKey, Cut, Node, Served
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.store import Snapshot, Store

Answer = TypeVar("Answer")
Key = TypeVar("Key")
Row = TypeVar("Row")


@dataclass
class MemoryStore:
    nodes: dict[str, Node] = field(default_factory=dict)
    served: dict[str, Served] = field(default_factory=dict)
    books: dict[BookKey, tuple[int, dict[str, Totals]]] = field(default_factory=dict)

    def save(self, cut: Cut) -> None:
        if cut.is_whole:
            self.nodes, self.served, self.books = {}, {}, {}
        for key in cut.gone:
            self.books.pop(key, None)
        self.nodes = there({**self.nodes, **cut.nodes})
        self.served = there({**self.served, **cut.served})
        for key, (seq, totals) in cut.books.items():
            self.books[key] = (seq, there({**self.books.get(key, (0, {}))[1], **totals}))

    def snapshot(self) -> Snapshot:
        books: Mapping[BookKey, Any] = self.books
        return copy.deepcopy(Cut(True, {**self.nodes}, {**self.served}, dict(books)).snapshot())


def there(rows: Mapping[Key, Row | None]) -> dict[Key, Row]:
    """Without those that are no more."""
    return {key: row for key, row in rows.items() if row is not None}


def run_to_end(steps: Generator[None, None, Answer]) -> Answer:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def normal(snapshot: Snapshot) -> Snapshot:
    """In one order, without accounts of which nothing is told."""
    books = {
        (name, incarnation): (seq, {account: list(row) for account, row in totals.items()})
        for name, incarnation, seq, totals in snapshot["ledger"]["books"]
    }
    return {
        "counters": {node: list(row) for node, row in snapshot["counters"].items()},
        "last_to_leave": snapshot["last_to_leave"],
        "totals": {account: list(row) for account, row in snapshot["ledger"]["totals"].items() if any(row)},
        "books": books,
    }


def whole(counter: float = 0.0) -> Cut:
    """A cut of one client, to save."""
    return Cut(is_whole=True, nodes={"ann": (counter, 1.0, None), "": (0.0, 1.0, "ann")})


def counter_of_ann(store: Store) -> float:
    found = store.load()
    assert found is not None
    return float(found[1]["counters"]["ann"][0])
