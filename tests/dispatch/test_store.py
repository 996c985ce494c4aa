"""One file for what must outlive the authority."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from fairserve.dispatch.store import SCHEMA_VERSION, SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "c.sqlite"


@pytest.fixture
def store(path: Path) -> SqliteStore:
    return SqliteStore(path)


def test_reading_makes_no_file_and_finds_nothing(store: SqliteStore, path: Path) -> None:
    assert store.load() is None and store.load_document("live") is None
    assert store.load_audit(5) == [] and store.load_history(60) == []
    store.check_readable()
    assert not path.parent.exists()


def test_the_newest_snapshot_and_document_come_back(store: SqliteStore, path: Path) -> None:
    for number in (1, 2):
        store.save({"counters": {"ann": [number, 1.0]}})
        store.save_document("live", f"text {number}")
    again = SqliteStore(path)
    assert again.load() == {"counters": {"ann": [2, 1.0]}}
    assert (again.load_document("live"), again.load_document("other")) == ("text 2", None)


def test_the_audit_log_keeps_the_newest_entries_in_order(store: SqliteStore) -> None:
    for seq in range(1, 8):
        store.save_document("live", "x", [(seq, f"entry {seq}")], max_audit=4)
    assert store.load_audit(10) == [f"entry {seq}" for seq in (4, 5, 6, 7)]
    assert store.load_audit(2) == ["entry 6", "entry 7"]


def test_a_change_and_its_audit_entry_are_written_together_or_not_at_all(store: SqliteStore) -> None:
    store.save_document("live", "before", [(1, "first")])
    with pytest.raises(sqlite3.Error):
        store.save_document("live", "after", [(2, None)])  # type: ignore[list-item]
    assert (store.load_document("live"), store.load_audit(5)) == ("before", ["first"])


def test_history_replaces_drops_and_tells_the_newest_oldest_first(store: SqliteStore) -> None:
    rows = [(60, float(t), client, float(t), 1.0, None) for t in (60, 120, 180) for client in ("ann", "bob")]
    store.save_history([*rows, (1, 5.0, "ann", 1.0, 0.0, 0.0)])
    store.save_history([(60, 180.0, "bob", 7.0, 2.0, 3.0)], {60: 120.0})
    assert store.load_history(60) == [*rows[2:5], (60, 180.0, "bob", 7.0, 2.0, 3.0)]
    assert [row[1] for row in store.load_history(60, since_s=150)] == [180.0, 180.0]
    assert [row[1:3] for row in store.load_history(60, max_rows=1)] in ([(180.0, "ann")], [(180.0, "bob")])
    assert len(store.load_history(1)) == 1


def test_a_file_of_the_time_before_schema_versions_is_read_and_taken_further(path: Path, store: SqliteStore) -> None:
    store.save({"version": 2})
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript("DROP TABLE document; DROP TABLE audit; DROP TABLE history; PRAGMA user_version = 0;")
    assert SqliteStore(path).load() == {"version": 2}
    store.save_document("live", "x", [(1, "y")])
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_file_of_a_newer_fairserve_is_left_alone_until_it_is_set_aside(path: Path, store: SqliteStore) -> None:
    store.save({"version": 2})
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version = 99")
    for attempt in (store.load, store.check_readable, lambda: store.save({})):
        with pytest.raises(ValueError, match=r"schema version 99.*reads up to 1"):
            attempt()
    assert store.set_aside().exists() and not path.exists()
    store.save({"new": 1})
    assert store.load() == {"new": 1}


@pytest.mark.parametrize(
    "text", [b"this is no database, it only looks like one for a moment", b"SQLite format 3\0" * 90]
)
def test_a_file_that_is_no_database_is_told_by_its_name(path: Path, store: SqliteStore, text: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"c\.sqlite cannot be read"):
        store.load_document("live")
    assert store.set_aside().read_bytes() == text


def test_a_torn_snapshot_is_an_error_and_not_an_empty_one(path: Path, store: SqliteStore) -> None:
    store.save({"version": 2})
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE snapshot SET data = x'00ff'")
    with pytest.raises(ValueError, match="no readable snapshot"):
        store.load()


def test_threads_may_write_at_the_same_time(store: SqliteStore) -> None:
    store.save({})

    def write(first: int) -> None:
        for seq in range(first, first + 10):
            store.save_document(f"d{first}", str(seq), [(seq, str(seq))])

    threads = [threading.Thread(target=write, args=(first,)) for first in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.load_document(f"d{first}") for first in (100, 200, 300)] == ["109", "209", "309"]
    assert len(store.load_audit(100)) == 30
