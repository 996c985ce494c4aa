"""A file of lines that is written off the path of whoever makes them."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from fairserve.cluster import line_file
from fairserve.cluster.line_file import LineFile


def test_lines_stand_in_the_file_in_order_once_flushed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "log.jsonl"
    file = LineFile(str(path))
    file.write("one")
    assert not path.exists(), "writing does not touch the disk"
    file.write("two")
    file.flush()
    file.write("three")
    file.flush()
    assert path.read_text().splitlines() == ["one", "two", "three"]


def test_flushing_nothing_makes_no_file(tmp_path: Path) -> None:
    LineFile(str(tmp_path / "log")).flush()
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_life_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    file = LineFile(str(tmp_path / "log"))
    file.write("after")
    file.flush()
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_a_full_file_moves_aside_over_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = LineFile(str(path), max_bytes=20)
    for i in range(4):
        file.write(f"{i} {'x' * 10}")
        file.flush()
    old = path.with_name("log.1")
    assert old.read_text().splitlines() == [f"{i} {'x' * 10}" for i in (2, 3)]
    assert not path.exists()
    file.write("next")
    file.flush()
    assert path.read_text() == "next\n"


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = LineFile("~/log")
    file.write("x")
    file.flush()
    assert (tmp_path / "log").read_text() == "x\n"


def test_a_disk_that_cannot_be_written_is_told_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    file = LineFile(str(blocker / "log"))
    file.write("lost")
    with caplog.at_level(logging.ERROR):
        file.flush()
    assert "1 lines could not be written" in caplog.text
    blocker.unlink()
    file.write("kept")
    file.flush()
    assert (blocker / "log").read_text() == "kept\n", "and it goes on when the disk is back"


def test_while_the_disk_is_slow_the_newest_lines_are_kept_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "MAX_PENDING", 3)
    file = LineFile(str(tmp_path / "log"))
    for i in range(10):
        file.write(str(i))
    file.flush()
    assert (tmp_path / "log").read_text().splitlines() == ["7", "8", "9"]


def test_the_file_after_a_full_one_begins_with_the_heading_of_now(tmp_path: Path) -> None:
    path, headings = tmp_path / "log", ["first", "second"]
    file = LineFile(str(path), max_bytes=10, heading=lambda: headings[-1])
    for line in ("0123456789", "a"):
        file.write(line)
        file.flush()
    assert path.read_text() == "second\na\n"
    file.write("second")
    file.write("b")
    file.flush()
    assert path.with_name("log.1").read_text() == "second\na\nsecond\nb\n"
    headings.append("")
    file.write("c")
    file.flush()
    assert path.read_text() == "c\n", "no heading, no line"


def test_a_flush_returns_only_when_another_that_is_under_way_has_written(tmp_path: Path) -> None:
    is_slow, may_go = threading.Event(), threading.Event()

    class Slow(LineFile):
        def _append(self) -> None:
            if not is_slow.is_set():
                is_slow.set()
                may_go.wait(10)
            super()._append()

    file = Slow(str(tmp_path / "log"))
    file.write("one")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(file.flush)
        assert is_slow.wait(10)
        second = threads.submit(file.flush)
        assert wait([second], timeout=0.05).not_done
        may_go.set()
        first.result(10)
        second.result(10)
