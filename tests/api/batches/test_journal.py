"""Whatever breaks off in the middle, and whoever goes on: each line is answered once, and what is answered stays."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairserve.api.batches.disk import Disk
from fairserve.api.batches.files import FileFolder, FileLimits, FileRecord
from fairserve.api.batches.hold import Hold
from fairserve.api.batches.lines import Answered, Line
from fairserve.api.batches.runner import Runner
from fairserve.api.batches.store import BatchRecord, BatchStore
from fairserve.api.identity import Client
from tests.api.batches.conftest import chat_line, jsonl

NOW_S = 1_700_000_000
ANN = Client("acme/ann", 2.0, applications=("night",))
NUM_LINES = 4
BODY_BYTES = 10_000


class PowerCut(BaseException):
    """Nothing after it is done, not even what a handler of exceptions would do."""


class FailingDisk(Disk):
    """Breaks off at step ``last`` (from 0) of all that it is asked, half-way through a write."""

    def __init__(self, last: int | None = None) -> None:
        self.num_steps = 0
        self._last = last

    def _next(self) -> None:
        self.num_steps += 1
        if self._last is not None and self.num_steps > self._last:
            raise PowerCut()

    def _write(self, descriptor: int, data: bytes) -> None:
        try:
            self._next()
        except PowerCut:
            os.write(descriptor, data[: len(data) // 2])
            raise
        super()._write(descriptor, data)

    def _sync(self, descriptor: int) -> None:
        self._next()

    def _replace(self, source: Path, target: Path) -> None:
        self._next()
        super()._replace(source, target)

    def _link(self, source: Path, target: Path) -> None:
        self._next()
        super()._link(source, target)

    def _remove(self, path: Path) -> None:
        self._next()
        super()._remove(path)

    def _sync_folder(self, folder: Path) -> None:
        self._next()


class World:
    """One folder; each process that comes by has its own ``store``."""

    def __init__(self, root: Path, num_lines: int = NUM_LINES) -> None:
        self.root = root
        (root / "open").mkdir(parents=True)
        self.asked: list[str] = []
        """Custom ids, as often as they were run."""
        self.ids = [f"task-{i}" for i in range(num_lines)]
        files = self.files(Disk())
        file_id, path, _ = files.begin(ANN.name)
        path.write_bytes(jsonl(*map(chat_line, self.ids)))
        self.source = files.commit(
            FileRecord(file_id, ANN.name, "in.jsonl", "batch", path.stat().st_size, NOW_S, NOW_S + 9_999)
        )
        self.record = BatchRecord(
            id="batch_" + "0" * 32,
            owner=ANN,
            endpoint="/v1/chat/completions",
            model="tiny",
            input_file_id=file_id,
            completion_window="24h",
            metadata=None,
            created_s=NOW_S,
            expires_s=NOW_S + 86_400,
            keep_s=9_999.0,
        )

    def files(self, disk: Disk) -> FileFolder:
        return FileFolder(self.root, FileLimits(10**6, 10**7, 100), unix_time_s=lambda: NOW_S, disk=disk)

    def store(self, disk: Disk) -> BatchStore:
        return BatchStore(self.root, self.files(disk), unix_time_s=lambda: NOW_S, disk=disk)

    def create(self, disk: Disk | None = None) -> None:
        self.store(disk or Disk()).create(self.record, 10)

    def runner(self, hold: Hold, ask: Callable[..., Any] | None = None) -> Runner:
        async def echo(endpoint: str, line: Line, client: Client) -> Answered:
            self.asked.append(line.custom_id)
            await asyncio.sleep(0)
            # Of a line that is run again the answer may be another one.
            usage = {"prompt_tokens": 10**line.number, "completion_tokens": len(self.asked), "total_tokens": 0}
            body = json.dumps({"n": line.number, "usage": usage}).encode()
            return Answered(400 if line.number % 3 == 0 else 200, f"req-{len(self.asked)}", body)

        return Runner(
            hold,
            ask or echo,
            ANN,
            max_running=3,
            max_lines=100,
            max_body_bytes=BODY_BYTES,
            unix_time_s=lambda: NOW_S,
        )

    def process(self, disk: Disk) -> bool:
        """One process comes by, takes up the batch if it is open, and runs it. True: nothing is open any more."""
        store = self.store(disk)
        for one in store.open():
            if (hold := store.claim(one)) is not None:
                asyncio.run(self.runner(hold).run())
                store.publish(hold)
        return not store.open()

    def check_whole(self) -> dict[str, Any]:
        """The batch is there, complete, each line once."""
        view = self.store(Disk()).view(ANN.name, self.record.id)
        assert view["status"] == "completed", view
        answers = self.answers()
        assert sorted(answers) == sorted(self.ids)
        num_failed = len(self.ids) // 3
        counts = {"total": len(self.ids), "completed": len(self.ids) - num_failed, "failed": num_failed}
        assert view["request_counts"] == counts
        told = [one["response"]["body"].get("usage") for one in answers.values() if is_ok(one)]
        used = view["usage"]
        assert used["input_tokens"] == sum(one["prompt_tokens"] for one in told if one)
        assert used["output_tokens"] == sum(one["completion_tokens"] for one in told if one)
        assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
        left = {path.name for path in next(self.root.glob("clients/*/batches/*")).iterdir() if path.name[0] != "."}
        assert left == {"batch.json", "decided.json", "final.json"}
        files = self.files(Disk()).of(ANN.name)
        assert [one.purpose for one in files].count("batch_output") == 2, "files that nobody names are left"
        return answers

    def answers(self) -> dict[str, Any]:
        view, files = self.store(Disk()).view(ANN.name, self.record.id), self.files(Disk())
        found: dict[str, Any] = {}
        for name, is_good in (("output_file_id", True), ("error_file_id", False)):
            for line in files.open(ANN.name, view[name]):
                one = json.loads(line)
                assert one["custom_id"] not in found, "answered twice"
                assert is_ok(one) is is_good
                found[one["custom_id"]] = one
        return found


def is_ok(answer: Any) -> bool:
    return bool(answer["response"]["status_code"] == 200)


def steps_of(root: Path) -> int:
    """How many steps a run without a crash takes."""
    world, disk = World(root), FailingDisk()
    world.create()
    assert world.process(disk)
    world.check_whole()
    assert sorted(world.asked) == sorted(world.ids)
    return disk.num_steps


def crashed(work: Callable[[], Any]) -> None:
    try:
        work()
    except PowerCut:
        pass
    except BaseExceptionGroup as group:
        if not group.subgroup(PowerCut):
            raise


def test_a_crash_at_any_step_loses_nothing_and_answers_nothing_twice(tmp_path: Path) -> None:
    num_steps = steps_of(tmp_path / "whole")
    assert num_steps > 30
    for last in range(num_steps):
        world = World(tmp_path / str(last))
        world.create()
        crashed(lambda world=world, last=last: world.process(FailingDisk(last)))  # type: ignore[misc]
        kept = kept_answers(world)
        num_asked = len(world.asked)
        assert world.process(Disk()), last
        answers = world.check_whole()
        again = set(world.asked[num_asked:])
        assert not again & kept, "what was on disk has been computed again"
        assert {answers[name]["response"]["request_id"] for name in kept} <= {f"req-{i + 1}" for i in range(num_asked)}


def kept_answers(world: World) -> set[str]:
    """The custom ids in whole journal entries."""
    entries = [path.read_bytes() for path in world.root.glob("clients/*/batches/*/journal.*")]
    whole = [line for entry in entries for line in entry.splitlines(keepends=True) if line.endswith(b"\n")]
    return {json.loads(line.split(b" ", 2)[2])["custom_id"] for line in whole}


def test_a_crash_while_a_batch_is_made_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    disk = FailingDisk()
    World(tmp_path / "whole").create(disk)
    for last in range(disk.num_steps):
        world = World(tmp_path / str(last))
        crashed(lambda world=world, last=last: world.create(FailingDisk(last)))  # type: ignore[misc]
        is_made = bool(world.store(Disk()).of(ANN.name))
        assert world.process(Disk()) or not is_made
        if is_made:
            world.check_whole()
        else:
            assert not world.asked


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_crash_after_crash_each_line_is_answered_once(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    world = World(tmp_path_factory.mktemp("world"), data.draw(st.integers(1, 12)))
    world.create()
    for last in data.draw(st.lists(st.integers(0, 60), max_size=6)):
        crashed(lambda last=last: world.process(FailingDisk(last)))  # type: ignore[misc]
    assert world.process(Disk())
    view = world.store(Disk()).view(ANN.name, world.record.id)
    assert view["status"] == "completed" and view["request_counts"]["total"] == len(world.ids)


@pytest.mark.parametrize("seed", range(12))
def test_holders_that_run_beside_each_other_make_one_end(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    world = World(tmp_path)
    world.create()

    async def life() -> None:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(3):  # each takes the lease from the one before, which goes on all the same
            store = world.store(Disk())
            holds = [store.claim(one) for one in store.open()]
            tasks += [asyncio.create_task(run(store, hold)) for hold in holds if hold is not None]
            for _ in range(rng.randrange(30)):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    async def run(store: BatchStore, hold: Hold) -> None:
        async def ask(endpoint: str, line: Line, client: Client) -> Answered:
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            return Answered(400 if line.number % 3 == 0 else 200, f"holder-{hold.number}", b"{}")

        try:
            await world.runner(hold, ask).run()
        except Exception:  # what it read is gone
            if not hold.is_lost():
                raise
        store.publish(hold)

    asyncio.run(life())
    assert world.process(Disk())
    world.check_whole()


def test_nothing_is_written_behind_half_an_entry(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.create()
    store = world.store(Disk())
    hold = store.claim(store.open()[0])
    assert hold is not None
    lines = [(Line(i + 1, f"task-{i}", b"{}"), Answered(200, "r", b"{}")) for i in range(3)]
    hold.keep(lines[:1])
    hold._disk = FailingDisk(0)
    with pytest.raises(PowerCut):
        hold.keep(lines[1:2])
    hold._disk = Disk()
    with pytest.raises(OSError, match="failed before"):
        hold.keep(lines[2:])
    assert [number for number, _, _ in hold.answers()] == [1]


def test_of_several_who_claim_at_once_one_holds(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.create()
    stores = [world.store(Disk()) for _ in range(3)]
    seen = [store.open()[0] for store in stores]
    holds = [store.claim(one) for store, one in zip(stores, seen, strict=True)]
    assert [hold is not None for hold in holds] == [True, False, False]


def test_an_upload_that_breaks_off_is_never_seen_and_taken_away(tmp_path: Path) -> None:
    disk = FailingDisk()
    for last in range(6):
        world = World(tmp_path / str(last))
        files = world.files(FailingDisk(last))
        file_id, path, _ = files.begin(ANN.name)
        path.write_bytes(b"{}")
        record = FileRecord(file_id, ANN.name, "x", "batch", 2, NOW_S, NOW_S + 9_999)
        crashed(lambda files=files, record=record: files.commit(record))  # type: ignore[misc]
        seen = [one.id for one in world.files(disk).of(ANN.name) if one.id == file_id]
        for one in seen:
            assert world.files(disk).open(ANN.name, one).read() == b"{}"
        later = FileFolder(tmp_path / str(last), FileLimits(1, 1, 1), unix_time_s=lambda: 4e9, disk=disk)
        later.sweep()
        assert not [one for one in (tmp_path / str(last)).rglob("*") if one.is_file()]
