"""Where the counters outlive the authority: one row in a SQLite file."""

from __future__ import annotations

import json
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any


class SqliteStore:
    """Keeps the newest snapshot. ``save`` is atomic and may run on any thread, one at a time."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser()

    def save(self, snapshot: dict[str, Any]) -> None:
        """
        Raises:
            OSError, sqlite3.Error: the file cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = zlib.compress(json.dumps(snapshot, separators=(",", ":")).encode(), 1)
        with closing(self._connect()) as db, db:
            db.execute("INSERT OR REPLACE INTO snapshot (id, data) VALUES (1, ?)", (data,))

    def load(self) -> dict[str, Any] | None:
        """The newest snapshot, or None when there is none.

        Raises:
            ValueError: the file is there and cannot be read as a snapshot.
        """
        if not self._path.exists():
            return None
        try:
            with closing(self._connect()) as db:
                row = db.execute("SELECT data FROM snapshot WHERE id = 1").fetchone()
            return None if row is None else dict(json.loads(zlib.decompress(row[0])))
        except (sqlite3.Error, zlib.error, ValueError, TypeError) as error:
            raise ValueError(f"{self._path} holds no readable snapshot: {error}") from error

    def set_aside(self) -> Path:
        """Rename a file that cannot be read, so that service can start; returns its new name."""
        aside = self._path.with_suffix(self._path.suffix + ".unreadable")
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        return aside

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=5.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), data BLOB NOT NULL)")
        return db
