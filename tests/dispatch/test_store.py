"""One file for what must outlive the authority."""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fairserve.dispatch.cut import Cut
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.store import SCHEMA_VERSION, Head, OutOfStep, SqliteStore, Superseded
from tests.dispatch.kit import Desk
from tests.memory_store import MemoryStore, counter_of_ann, normal, run_to_end, whole

HEAD = Head("here", incarnation=5, life=9, seq=1)
"""Of the first cut."""


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
        store.save(whole(number), replace(HEAD, seq=number))
        store.save_document("live", f"text {number}")
    again = SqliteStore(path)
    assert counter_of_ann(again) == 2
    assert again.heads() == [replace(HEAD, seq=2)]
    assert (again.load_document("live"), again.load_document("other")) == ("text 2", None)


def test_the_audit_log_keeps_the_newest_entries_in_order(store: SqliteStore) -> None:
    for seq in range(1, 8):
        store.save_document("live", "x", [(seq, f"entry {seq}")], max_audit=4)
    assert store.load_audit(10) == [f"entry {seq}" for seq in (4, 5, 6, 7)]
    assert store.load_audit(2) == ["entry 6", "entry 7"]


def test_a_change_and_its_audit_entry_are_written_together_or_not_at_all(store: SqliteStore) -> None:
    store.save_document("live", "before", [(1, "first")])
    with pytest.raises(OSError, match=r"c\.sqlite cannot be written"):
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


def test_cuts_come_back_as_what_the_dispatcher_would_have_dumped(store: SqliteStore, desk: Desk) -> None:
    replica, memory = desk.replica(), MemoryStore()
    desk.dispatcher.ledger._max_books = 3
    for seq in range(1, 8):
        replica.report(served={"ann": (10, 5), f"acme/x/c{seq}": (1, 2)})
        desk.replica(f"r{seq}").report(served={"ann": (1, 0)})
        desk.dispatcher.merge_cluster("far", 7, {"ann": Totals(seq, 0, 0, float(seq))}, {}, seq)
        cut = run_to_end(desk.dispatcher.cutter.steps(is_whole=False))
        store.save(cut, replace(HEAD, seq=seq))
        memory.save(cut)
        found = store.load()
        assert found is not None and found[0] == replace(HEAD, seq=seq)
        assert normal(found[1]) == normal(memory.snapshot()) == normal(desk.dispatcher.dump())
    desk.restart(snapshot=found[1])
    assert desk.dispatcher.ledger.totals("ann").num_input == 7 * 10 + 7 + 7


def test_a_cut_that_does_not_follow_is_refused_and_changes_nothing(store: SqliteStore) -> None:
    part = Cut(is_whole=False, nodes={"ann": (7.0, 1.0, None)})
    with pytest.raises(OutOfStep):
        store.save(part, HEAD)
    store.save(whole(1.0), HEAD)
    for head in (HEAD, replace(HEAD, seq=3), replace(HEAD, seq=2, incarnation=6)):
        with pytest.raises(OutOfStep):
            store.save(part, head)
    assert counter_of_ann(store) == 1
    store.save(part, replace(HEAD, seq=2))
    assert counter_of_ann(store) == 7


def test_an_earlier_life_may_not_write_over_a_later_one(store: SqliteStore) -> None:
    store.save(whole(1.0), HEAD)
    with pytest.raises(Superseded, match="life 9 of the counter actor saves there, this is 8"):
        store.save(whole(2.0), replace(HEAD, life=8, seq=2))
    assert counter_of_ann(store) == 1


def write_version_1(path: Path, dispatcher: Dispatcher) -> None:
    """As fairserve did before schema version 2."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(
            "CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), data BLOB NOT NULL);"
            "CREATE TABLE document (name TEXT PRIMARY KEY, data TEXT NOT NULL); PRAGMA user_version = 1;"
        )
        data = zlib.compress(json.dumps(dispatcher.dump()).encode(), 1)
        db.execute("INSERT INTO snapshot (id, data) VALUES (1, ?)", (data,))
        db.execute("INSERT INTO document VALUES ('live', 'text')")


def test_a_file_of_schema_version_1_is_read_and_taken_further(path: Path, store: SqliteStore, desk: Desk) -> None:
    desk.replica().report(served={"ann": (10, 5)})
    write_version_1(path, desk.dispatcher)
    found = store.load()
    assert found is not None and found[0] == Head() and store.load_document("live") == "text"
    assert normal(found[1]) == normal(desk.dispatcher.dump())
    store.save(whole(3.0), HEAD)
    assert counter_of_ann(store) == 3
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert db.execute("SELECT count(*) FROM snapshot").fetchone() == (0,)


def test_a_file_of_a_newer_fairserve_is_left_alone_until_it_is_set_aside(path: Path, store: SqliteStore) -> None:
    store.save(whole(), HEAD)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version = 99")
    for attempt in (store.load, store.check_readable, lambda: store.save(whole(), HEAD)):
        with pytest.raises(ValueError, match=r"schema version 99.*reads up to 2"):
            attempt()
    assert Path(store.set_aside()).exists() and not path.exists()
    store.save(whole(1.0), HEAD)
    assert counter_of_ann(store) == 1


@pytest.mark.parametrize(
    "text", [b"this is no database, it only looks like one for a moment", b"SQLite format 3\0" * 90]
)
def test_a_file_that_is_no_database_is_told_by_its_name(path: Path, store: SqliteStore, text: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"c\.sqlite cannot be read"):
        store.load_document("live")
    assert Path(store.set_aside()).read_bytes() == text


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE node SET counter = 'much'",
        "UPDATE node SET weight = NULL",
        "UPDATE head SET data = '{'",
        """UPDATE head SET data = '{"version": 99}'""",
    ],
)
def test_a_damaged_snapshot_is_an_error_and_not_an_empty_one(path: Path, store: SqliteStore, damage: str) -> None:
    store.save(whole(), HEAD)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(damage)
    with pytest.raises(ValueError, match="no readable snapshot"):
        store.load()


def test_threads_may_write_at_the_same_time(store: SqliteStore) -> None:
    store.save(whole(), HEAD)

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


def test_hours_of_usage_are_kept_beside_the_days_of_an_older_store(store: SqliteStore, path: Path) -> None:
    row, later = (1, 10, 4, 5, 20.0), (2, 20, 8, 10, 40.0)
    store.save(replace(whole(1), usage={(100, "ann"): row}), HEAD)  # as before hours were known
    with closing(sqlite3.connect(path)) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'usage_hours'").fetchall()
    assert store.load_usage_hours(range(10_000)) == {}
    hours = {(2_400, "ann"): row, (2_399, "ann"): row, (2_401, "bob"): row}
    store.save(Cut(is_whole=False, usage_hours=hours, first_hour=2_300), replace(HEAD, seq=2))
    store.save(Cut(is_whole=False, usage_hours={(2_401, "bob"): later}, first_hour=2_400), replace(HEAD, seq=3))
    assert store.load_usage_hours(range(10_000)) == {(2_400, "ann"): row, (2_401, "bob"): later}
    assert store.load_usage_hours(range(2_401, 2_402)) == {(2_401, "bob"): later}
    assert store.load_usage(range(300)) == {(100, "ann"): row}


def test_days_of_usage_that_are_too_old_are_deleted(store: SqliteStore) -> None:
    row = (1, 10, 4, 5, 20.0)
    store.save(replace(whole(1), usage={(100, "ann"): row}, first_day=10), HEAD)
    store.save(replace(whole(2), usage={(200, "ann"): row}, first_day=110), replace(HEAD, seq=2))
    assert store.load_usage(range(300)) == {(200, "ann"): row}
