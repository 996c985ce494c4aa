"""The stages of a cold start, and the file that it serves."""

from __future__ import annotations

import asyncio

import pytest
import yaml

from benchmarks import cold_start
from fairserve.config import FairServeArgs


def test_stages_follow_one_another_and_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = cold_start.Watch()
    seen = iter([False, True, True])
    watch.until("first", lambda: next(seen))
    watch.until("second", lambda: next(seen))
    assert list(watch.stages) == ["first", "second"] and watch.stages["first"] >= cold_start.POLL_S
    with pytest.raises(RuntimeError, match="third: it ended"):
        watch.until("third", lambda: False, lambda: "it ended")
    monkeypatch.setattr(cold_start, "LONGEST_S", 0.0)
    with pytest.raises(RuntimeError, match="not within"):
        watch.until("third", lambda: False)


def test_a_table_of_stages_gives_the_median_and_the_extremes() -> None:
    told = cold_start.table("title", [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}]).splitlines()
    assert told[1].split() == ["a", "2.0", "s", "(1.0-3.0)"]
    assert told[3].split() == ["in", "all", "4.0", "s", "(3.0-5.0)"]


def test_the_file_of_a_cold_start_is_one_that_serve_takes() -> None:
    config = yaml.safe_load(cold_start.config_file(8123))
    (application,) = config["applications"]
    assert FairServeArgs.model_validate(application["args"]).num_replicas == 1
    assert config["http_options"]["port"] == 8123


async def test_nobody_listening_is_no_answer(free_port: int) -> None:
    assert await asyncio.to_thread(cold_start.answers, f"http://127.0.0.1:{free_port}") is None
