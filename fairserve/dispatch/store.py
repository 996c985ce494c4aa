"""What outlives the authority, in one SQLite file: its snapshot, what was set live, who set it, and the history."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS document (name TEXT PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS audit (seq INTEGER PRIMARY KEY, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS history (
    resolution_s INTEGER NOT NULL, time_s REAL NOT NULL, client TEXT NOT NULL,
    service REAL, waiting REAL, lead REAL,
    PRIMARY KEY (resolution_s, time_s, client)
) WITHOUT ROWID;
"""

HistoryRow = tuple[int, float, str, float | None, float | None, float | None]
"""resolution_s, time_s, client, service, waiting, lead: one point of one client."""


class SqliteStore:
    """Every method is atomic, durable when it returns, may block, and may run on any thread.

    Those that write raise OSError or sqlite3.Error when the file cannot be written; those that read raise ValueError
    when it is there and cannot be read, or was written by a newer fairserve.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    # -- the authority's snapshot -----------------------------------------------------------------------------------

    def save(self, snapshot: dict[str, Any]) -> None:
        """Keep it in place of the one before."""
        data = zlib.compress(json.dumps(snapshot, separators=(",", ":")).encode(), 1)
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO snapshot (id, data) VALUES (1, ?)", (data,))

    def load(self) -> dict[str, Any] | None:
        """The newest snapshot, or None when there is none."""
        rows = self._read("SELECT data FROM snapshot WHERE id = 1")
        try:
            return dict(json.loads(zlib.decompress(rows[0][0]))) if rows else None
        except (zlib.error, ValueError, TypeError) as error:
            raise ValueError(f"{self.path} holds no readable snapshot: {error}") from error

    # -- what was set live, and by whom -------------------------------------------------------------------------------

    def save_document(
        self, name: str, data: str, audit: Sequence[tuple[int, str]] = (), max_audit: int = 10_000
    ) -> None:
        """Keep ``data`` under ``name`` and append the entries (seq, data) to the audit log, all or nothing; of the log
        the newest ``max_audit`` are kept."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO document (name, data) VALUES (?, ?)", (name, data))
            db.executemany("INSERT OR REPLACE INTO audit (seq, data) VALUES (?, ?)", audit)
            if audit:
                db.execute("DELETE FROM audit WHERE seq <= ?", (max(seq for seq, _ in audit) - max_audit,))

    def load_document(self, name: str) -> str | None:
        rows = self._read("SELECT data FROM document WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def load_audit(self, limit: int) -> list[str]:
        """The newest entries of the audit log, oldest first."""
        return [data for (data,) in reversed(self._read("SELECT data FROM audit ORDER BY seq DESC LIMIT ?", (limit,)))]

    # -- history ------------------------------------------------------------------------------------------------------

    def save_history(self, rows: Iterable[HistoryRow], keep_since: dict[int, float] | None = None) -> None:
        """Add points; a point of the same resolution, time and client is replaced. ``keep_since``: by resolution, the
        time before which points are dropped."""
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO history VALUES (?, ?, ?, ?, ?, ?)", rows)
            for resolution_s, since_s in (keep_since or {}).items():
                db.execute("DELETE FROM history WHERE resolution_s = ? AND time_s < ?", (resolution_s, since_s))

    def load_history(self, resolution_s: int, since_s: float = 0.0, max_rows: int = -1) -> list[HistoryRow]:
        """Points of one resolution since a time, oldest first; where there are more than ``max_rows``, the newest."""
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

    def set_aside(self) -> Path:
        """Rename a file that cannot be read, so that service can start; returns its new name."""
        aside = self.path.with_suffix(self.path.suffix + ".unreadable")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        return aside

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if not self.path.exists():
            return []
        try:
            with closing(self._connect()) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as db, db:
            yield db

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
