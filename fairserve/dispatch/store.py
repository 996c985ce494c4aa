"""What outlives the authority: its snapshot, what was set live, who set it, the history. Here in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from fairserve.dispatch.cut import SNAPSHOT_VERSION, Cut
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.usage_rows import UsageKey, UsageRow
from fairserve.fairness.hierarchy import TOP, is_group

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS head (id INTEGER PRIMARY KEY CHECK (id = 1), data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS node (name TEXT PRIMARY KEY, counter REAL, weight REAL, last TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS served (
    account TEXT PRIMARY KEY, num_input INTEGER, num_cached INTEGER, num_output INTEGER, service REAL, weight REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS book (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, incarnation INTEGER NOT NULL, seq INTEGER NOT NULL,
    UNIQUE (name, incarnation)
);
CREATE TABLE IF NOT EXISTS reported (
    book INTEGER, account TEXT, num_input INTEGER, num_cached INTEGER, num_output INTEGER, service REAL,
    PRIMARY KEY (book, account)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS document (name TEXT PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS audit (seq INTEGER PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS history (
    resolution_s INTEGER NOT NULL, time_s REAL NOT NULL, client TEXT NOT NULL,
    service REAL, waiting REAL, lead REAL,
    PRIMARY KEY (resolution_s, time_s, client)
) WITHOUT ROWID;
"""
_USAGE = """
CREATE TABLE IF NOT EXISTS {table} (
    {period} INTEGER, client TEXT, num_requests INTEGER, num_input INTEGER, num_cached INTEGER, num_output INTEGER,
    service REAL, PRIMARY KEY ({period}, client)
) WITHOUT ROWID;
"""
"""Made by whoever writes there first: an older fairserve, which knows nothing of it, can read the rest."""
_BATCH = 500
"""Rows written in one go, so that other threads get their turns."""

HistoryRow = tuple[int, float, str, float | None, float | None, float | None]
"""resolution_s, time_s, client, service, waiting, lead: one point of one client."""
Snapshot = dict[str, Any]
"""As ``Dispatcher.dump``."""


class OutOfStep(Exception):
    """The store does not hold the cut before this one: the next must be whole."""


class Superseded(Exception):
    """A later life of the same authority writes here."""


class Overtaken(Exception):
    """The document was changed by somebody else."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a snapshot says of itself."""

    cluster: str = ""
    """Id of the Ray cluster whose replicas it counts."""
    incarnation: int = 0
    """When counting began, by the first life of the authority that counted on from there."""
    life: int = 0
    """Of the authority that wrote it; a later life has a greater number."""
    seq: int = 0
    """Rises with every cut."""
    saved_s: float = 0.0
    """Unix time."""
    version: int = SNAPSHOT_VERSION

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Head:
        """
        Raises:
            ValueError: it cannot be read, or is of another version.
        """
        try:
            fields = dict(json.loads(text))
            if fields["version"] != SNAPSHOT_VERSION:
                raise ValueError(f"snapshot version {fields['version']!r}, this fairserve reads {SNAPSHOT_VERSION}")
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no readable snapshot: {error!r}") from error

    def check_follows(self, before: Head | None, *, is_whole: bool) -> None:
        """``before``: what the store holds.

        Raises:
            OutOfStep: this is not the next cut.
            Superseded: a later life wrote it.
        """
        if before is not None and before.life > self.life:
            raise Superseded(f"life {before.life} of the counter actor saves there, this is {self.life}")
        if not is_whole and (before is None or (before.incarnation, before.seq + 1) != (self.incarnation, self.seq)):
            raise OutOfStep


@dataclass(frozen=True, slots=True)
class Published:
    """Accounts of another cluster that changed, as far as its cut ``seq``."""

    cluster: str
    incarnation: int
    seq: int
    totals: Mapping[str, Totals] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    """By account."""


class Store(Protocol):
    """Every method is atomic, durable when it returns, may block for seconds, and may run on any thread.

    All raise OSError when the place cannot be reached, read or written at all; those that read raise ValueError when
    what is there cannot be understood, or was written by a newer fairserve. No text of an error holds a password.
    """

    @property
    def place(self) -> str:
        """For people."""
        ...

    def save(self, cut: Cut, head: Head) -> None:
        """Raises what :meth:`Head.check_follows` raises; then nothing was changed."""
        ...

    def load(self) -> tuple[Head, Snapshot] | None:
        """The newest snapshot; of another cluster where this one has none. None where nobody has one."""
        ...

    def load_usage(self, days: range) -> dict[UsageKey, UsageRow]:
        """Usage of these days since 1970, by day and client, as of the snapshot that :meth:`load` gave."""
        ...

    def load_usage_hours(self, hours: range) -> dict[UsageKey, UsageRow]:
        """The same of these hours since 1970."""
        ...

    def set_aside(self) -> str:
        """Rename a snapshot that cannot be read, so that the next can be written; returns its new name."""
        ...

    def heads(self) -> list[Head]:
        """Of every cluster that keeps its counters here, this one included."""
        ...

    def others(self, known: Mapping[tuple[str, int], int]) -> list[Published]:
        """What other clusters published in the same place beyond the ``seq`` that is known, by cluster and
        incarnation; of one whose newest is known, nothing."""
        ...

    def save_document(
        self, name: str, data: str, audit: Sequence[tuple[int, str]] = (), max_audit: int = 10_000, version: int = 0
    ) -> None:
        """Keep ``data`` under ``name`` and append the entries (seq, data) to the audit log, all or nothing; of the log
        the newest ``max_audit`` are kept.

        Raises:
            Overtaken: clusters share the place, and it holds another document of this ``version`` or a later one.
        """
        ...

    def load_document(self, name: str) -> str | None: ...

    def load_audit(self, limit: int) -> list[str]:
        """The newest entries of the audit log, oldest first."""
        ...

    def save_history(self, rows: Iterable[HistoryRow], keep_since: dict[int, float] | None = None) -> None:
        """Add points; a point of the same resolution, time and client is replaced. ``keep_since``: by resolution, the
        time before which points are dropped."""
        ...

    def load_history(self, resolution_s: int, since_s: float = 0.0, max_rows: int = -1) -> list[HistoryRow]:
        """Points of one resolution since a time, oldest first; where there are more than ``max_rows``, the newest."""
        ...


class SqliteStore:
    """A :class:`Store` in a file on this node, of one cluster."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    @property
    def place(self) -> str:
        return str(self.path)

    # -- the authority's snapshot -----------------------------------------------------------------------------------

    def save(self, cut: Cut, head: Head) -> None:
        with self._writing() as db:
            heads = db.execute("SELECT data FROM head").fetchall()
            before = Head.load(heads[0][0]) if heads else None
            head.check_follows(before, is_whole=cut.is_whole)
            if cut.is_whole:
                for table in ("snapshot", "node", "served", "book", "reported"):
                    db.execute(f"DELETE FROM {table}")
            db.execute("INSERT OR REPLACE INTO head VALUES (1, ?)", (head.dump(),))
            _write(db, "node", 4, ((node, *row) for node, row in cut.nodes.items() if row is not None))
            _delete(db, "node WHERE name = ?", ((node,) for node, row in cut.nodes.items() if row is None))
            _write(db, "served", 6, ((account, *row) for account, row in cut.served.items() if row is not None))
            _delete(db, "served WHERE account = ?", ((name,) for name, row in cut.served.items() if row is None))
            for key in cut.gone:
                db.execute(
                    "DELETE FROM reported WHERE book IN (SELECT id FROM book WHERE (name, incarnation) = (?, ?))", key
                )
                db.execute("DELETE FROM book WHERE (name, incarnation) = (?, ?)", key)
            for key, (seq, totals) in cut.books.items():
                upsert = (
                    "INSERT INTO book (name, incarnation, seq) VALUES (?, ?, ?) "
                    "ON CONFLICT (name, incarnation) DO UPDATE SET seq = excluded.seq RETURNING id"
                )
                (book,) = db.execute(upsert, (*key, seq)).fetchone()
                rows = ((book, account, *total.row()) for account, total in totals.items() if total is not None)
                _write(db, "reported", 6, rows)
                closed = ((book, account) for account, total in totals.items() if total is None)
                _delete(db, "reported WHERE (book, account) = (?, ?)", closed)
            _write_usage(db, "usage", "day", cut.usage, cut.first_day)
            _write_usage(db, "usage_hours", "hour", cut.usage_hours, cut.first_hour)

    def load(self) -> tuple[Head, Snapshot] | None:
        if not self.path.exists():
            return None
        with self._reading() as db:
            (fault,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if fault != "ok":
                raise ValueError(f"{self.path} cannot be read: {fault}")
            heads = db.execute("SELECT data FROM head").fetchall()
            old = db.execute("SELECT data FROM snapshot WHERE id = 1").fetchall()
            if not heads and not old:
                return None
            try:
                if not heads:  # written before schema version 2
                    return Head(), dict(json.loads(zlib.decompress(old[0][0])))
                return Head.load(heads[0][0]), _snapshot_of(db)
            except (zlib.error, ValueError, TypeError) as error:
                raise ValueError(f"{self.path} holds no readable snapshot: {error}") from error

    def heads(self) -> list[Head]:
        return [Head.load(data) for (data,) in self._read("SELECT data FROM head")]

    def others(self, known: Mapping[tuple[str, int], int]) -> list[Published]:
        return []

    def load_usage(self, days: range) -> dict[UsageKey, UsageRow]:
        return self._load_usage("usage", "day", days)

    def load_usage_hours(self, hours: range) -> dict[UsageKey, UsageRow]:
        return self._load_usage("usage_hours", "hour", hours)

    def _load_usage(self, table: str, period: str, periods: range) -> dict[UsageKey, UsageRow]:
        if not self._read("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)):
            return {}
        found = f"SELECT * FROM {table} WHERE {period} >= ? AND {period} < ?"
        rows = self._read(found, (periods.start, periods.stop))
        return {(number, client): _usage_row(*row) for number, client, *row in rows}

    # -- what was set live, and by whom -------------------------------------------------------------------------------

    def save_document(
        self, name: str, data: str, audit: Sequence[tuple[int, str]] = (), max_audit: int = 10_000, version: int = 0
    ) -> None:
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO document (name, data) VALUES (?, ?)", (name, data))
            db.executemany("INSERT OR REPLACE INTO audit (seq, data) VALUES (?, ?)", audit)
            if audit:
                db.execute("DELETE FROM audit WHERE seq <= ?", (max(seq for seq, _ in audit) - max_audit,))

    def load_document(self, name: str) -> str | None:
        rows = self._read("SELECT data FROM document WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def load_audit(self, limit: int) -> list[str]:
        return [data for (data,) in reversed(self._read("SELECT data FROM audit ORDER BY seq DESC LIMIT ?", (limit,)))]

    # -- history ------------------------------------------------------------------------------------------------------

    def save_history(self, rows: Iterable[HistoryRow], keep_since: dict[int, float] | None = None) -> None:
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?, ?)", rows)
            for resolution_s, since_s in (keep_since or {}).items():
                db.execute("DELETE FROM history WHERE resolution_s = ? AND time_s < ?", (resolution_s, since_s))

    def load_history(self, resolution_s: int, since_s: float = 0.0, max_rows: int = -1) -> list[HistoryRow]:
        newest_first = self._read(
            "SELECT resolution_s, time_s, client, service, waiting, lead FROM history "
            "WHERE resolution_s = ? AND time_s >= ? ORDER BY time_s DESC, client DESC LIMIT ?",
            (resolution_s, since_s, max_rows),
        )
        return newest_first[::-1]

    # -- the file -----------------------------------------------------------------------------------------------------

    def check_readable(self) -> None:
        """
        Raises:
            ValueError: the file is there and cannot be read, or was written by a newer fairserve.
        """
        self._read("SELECT 1")

    def set_aside(self) -> str:
        aside = self.path.with_suffix(self.path.suffix + ".unreadable")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        return str(aside)

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if not self.path.exists():
            return []
        with self._reading() as db:
            return db.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """All that is read in the block is of one moment."""
        try:
            with closing(self._connect()) as db:
                db.execute("BEGIN")
                yield db
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._connect()) as db, db:
                db.execute("BEGIN IMMEDIATE")
                yield db
        except sqlite3.Error as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=5.0)
        try:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise ValueError(
                    f"{self.path} has schema version {version}, written by a newer fairserve; "
                    f"this one reads up to {SCHEMA_VERSION}"
                )
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if version < SCHEMA_VERSION:
                db.executescript(f"{_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};")
        except BaseException:
            db.close()
            raise
        return db


def _write(db: sqlite3.Connection, table: str, num_columns: int, rows: Iterator[tuple[Any, ...]]) -> None:
    places = ", ".join("?" * num_columns)
    while batch := list(islice(rows, _BATCH)):
        db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", batch)


def _write_usage(
    db: sqlite3.Connection, table: str, period: str, rows: Mapping[UsageKey, UsageRow], first: int
) -> None:
    if rows:
        db.execute(_USAGE.format(table=table, period=period))
        _write(db, table, 7, ((*key, *row) for key, row in rows.items()))
        db.execute(f"DELETE FROM {table} WHERE {period} < ?", (first,))


def _delete(db: sqlite3.Connection, what: str, keys: Iterator[tuple[Any, ...]]) -> None:
    while batch := list(islice(keys, _BATCH)):
        db.executemany(f"DELETE FROM {what}", batch)


def _usage_row(num_requests: int, num_input: int, num_cached: int, num_output: int, service: float) -> UsageRow:
    return num_requests, num_input, num_cached, num_output, service


def _snapshot_of(db: sqlite3.Connection) -> Snapshot:
    nodes = {node: row for node, *row in db.execute("SELECT name, counter, weight, last FROM node")}
    served = db.execute("SELECT account, num_input, num_cached, num_output, service FROM served")
    totals = {account: row for account, *row in served}
    books: dict[int, list[Any]] = {
        book: [name, incarnation, seq, {}]
        for book, name, incarnation, seq in db.execute("SELECT id, name, incarnation, seq FROM book")
    }
    for book, account, *row in db.execute(
        "SELECT book, account, num_input, num_cached, num_output, service FROM reported"
    ):
        books[book][3][account] = row
    return snapshot_of(nodes, totals, list(books.values()))


def snapshot_of(nodes: Mapping[str, Any], totals: Mapping[str, Any], books: list[list[Any]]) -> Snapshot:
    """Rows as they were written, put together.

    Raises:
        ValueError: a row is not what it should be.
    """
    for row in (
        *totals.values(),
        *(row for book in books for row in book[3].values()),
        *(n[:2] for n in nodes.values()),
    ):
        if not all(type(value) in (int, float) for value in row):
            raise ValueError(f"{row!r} is no row of numbers")
    return {
        "version": SNAPSHOT_VERSION,
        "counters": {node: list(row[:2]) for node, row in nodes.items() if node != TOP},
        "last_to_leave": {node: row[2] for node, row in nodes.items() if node == TOP or is_group(node)},
        "ledger": {"totals": dict(totals), "books": books},
    }
