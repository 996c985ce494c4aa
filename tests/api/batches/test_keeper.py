"""Several ingress processes and one folder: each batch runs at one of them, and whoever dies is followed by another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from fairserve.api.batches.disk import Disk
from fairserve.engine.request import GenerateRequest
from tests.api.batches.conftest import Ingress, IngressMaker, chat_line, files_below
from tests.api.scripted import Step, settled, words

LEASE_S = 15.0
LINES = [chat_line(f"task-{i}") for i in range(12)]


def stuck_after(ingress: Ingress, num_answers: int) -> asyncio.Event:
    """From the k-th request on, nothing is answered until the event."""
    gate = asyncio.Event()

    def script(request: GenerateRequest) -> list[Step]:
        is_stuck = len(ingress.backend.requests) > num_answers and not gate.is_set()
        return [gate] if is_stuck else list(words("ok")(request))

    ingress.backend.script = script
    return gate


async def test_who_is_alive_keeps_its_batch_and_who_is_not_is_followed(make_ingress: IngressMaker) -> None:
    one, two = make_ingress(max_running=3), make_ingress(max_running=3)
    gate = stuck_after(one, 5)
    batch = await one.batch(*LINES)
    await one.look()
    await one.backend.until(lambda: len(one.backend.requests) == 8)
    for _ in range(20):  # both look, for longer than a lease
        await one.look(2.0)
        await two.look()
    assert len(one.backend.requests) == 8 and not two.batches.keeper._runs, "somebody else has begun with it"
    await one.batches.keeper.close()  # as when its process is killed: nothing is said
    await one.backend.until(lambda: len(one.backend.cancelled) == 3)
    gate.set()
    await two.look(LEASE_S - 1.0)
    assert len(one.backend.requests) == 8
    await two.look(1.1)
    await two.work()
    done = await two.client().batches.retrieve(batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 12)
    assert len(await two.results(done)) == 12
    assert len(one.backend.requests) == 8 + 7, "what was answered has been run again"


async def test_who_stops_as_planned_is_followed_at_the_next_look(make_ingress: IngressMaker) -> None:
    one, two = make_ingress(max_running=3), make_ingress(max_running=3)
    gate = stuck_after(one, 5)
    batch = await one.batch(*LINES)
    await one.look()
    await one.backend.until(lambda: len(one.backend.requests) == 8)
    await two.look()
    await one.batches.keeper.release()
    assert len(one.backend.cancelled) == 3, "its lines still run"
    await one.look()
    assert len(one.backend.requests) == 8, "it has taken up what it gave back"
    await two.look()
    await two.backend.until(lambda: len(two.backend.requests) == 11)
    now = await two.client().batches.retrieve(batch.id)
    assert now.usage is not None and now.usage.output_tokens == 5, "of the five that were answered before"
    gate.set()
    await two.work()
    done = await two.client().batches.retrieve(batch.id)
    assert done.usage is not None and done.usage.output_tokens == 12
    assert (done.status, done.request_counts.completed, len(await two.results(done))) == ("completed", 12, 12)
    assert len(one.backend.requests) == 8 + 7 + 3, "the gate answers nothing, so three were asked again"


async def test_a_batch_that_is_being_taken_up_at_a_planned_stop_is_given_back(make_ingress: IngressMaker) -> None:
    one, two = make_ingress(), make_ingress()
    await one.batch(*LINES)
    looking = asyncio.create_task(one.batches.keeper.look())
    await asyncio.sleep(0)
    assert one.batches.keeper._looking.locked()
    await one.batches.keeper.release()
    await looking
    await two.look()
    assert two.batches.keeper._runs


async def test_a_planned_stop_ends_although_the_disk_is_full(make_ingress: IngressMaker) -> None:
    disk = FullDisk()
    one, two = make_ingress(disk=disk), make_ingress()
    stuck_after(one, 0)
    await one.batch(*LINES)
    await one.look()
    await two.look()
    disk.is_full = True
    await one.batches.keeper.release()
    await two.look(LEASE_S - 1.0)
    assert not two.batches.keeper._runs
    await two.look(1.1)
    assert two.batches.keeper._runs, "its lease has run out"


async def test_one_that_hung_lets_go_when_it_sees_that_another_goes_on(make_ingress: IngressMaker) -> None:
    one, two = make_ingress(max_running=3), make_ingress(max_running=3)
    gate = stuck_after(one, 2)
    batch = await one.batch(*LINES)
    await one.look()
    await one.backend.until(lambda: len(one.backend.requests) == 5)
    await two.look()
    await two.look(LEASE_S + 1.0)
    await one.backend.until(lambda: len(one.backend.requests) == 8)  # the three run here and there
    await one.look()
    await one.backend.until(lambda: len(one.backend.cancelled) == 3)
    gate.set()
    await two.work()
    done = await two.client().batches.retrieve(batch.id)
    assert done.request_counts.completed == 12 and len(await one.results(done)) == 12


async def test_a_batch_ends_once_although_two_have_run_all_of_it(make_ingress: IngressMaker) -> None:
    one, two = make_ingress(), make_ingress()
    gate = stuck_after(one, 0)
    batch = await one.batch(*LINES)
    await one.look()
    await one.backend.until(lambda: len(one.backend.requests) == 12)
    await two.look()
    await two.look(LEASE_S + 1.0)
    await one.backend.until(lambda: len(one.backend.requests) == 24)
    gate.set()  # both get all answers, and neither knows of the other
    await asyncio.gather(one.batches.keeper.settled(), two.batches.keeper.settled())
    await one.work()
    done = await one.client().batches.retrieve(batch.id)
    assert done.request_counts.completed == 12 and len(await one.results(done)) == 12
    assert [f.purpose for f in (await one.client().files.list()).data].count("batch_output") == 1


async def test_one_batch_of_an_owner_runs_at_a_time_and_others_do_not_wait_for_it(ingress: Ingress) -> None:
    gate = stuck_after(ingress, 0)
    first = await ingress.batch(LINES[0])
    ingress.clock.advance(1.0)
    second = await ingress.batch(LINES[0])
    await ingress.batch(LINES[0], key="bob")
    await ingress.look()
    await ingress.backend.until(lambda: len(ingress.backend.requests) == 2)
    await ingress.look()
    await settled()
    assert sorted(one.client for one in ingress.backend.requests) == ["ann+batch", "bob+batch"]
    gate.set()
    for _ in range(2):
        await ingress.work()
    client = ingress.client()
    for batch in (first, second):
        assert (await client.batches.retrieve(batch.id)).status == "completed"


class FullDisk(Disk):
    is_full = False

    def _write(self, descriptor: int, data: bytes) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        super()._write(descriptor, data)


async def test_a_full_disk_stops_a_batch_and_it_goes_on_when_there_is_room(make_ingress: IngressMaker) -> None:
    disk = FullDisk()
    ingress = make_ingress(disk=disk)
    batch = await ingress.batch(*LINES)
    disk.is_full = True
    with pytest.raises(OSError, match="No space"):
        await ingress.look()
    with pytest.raises(openai.APIStatusError, match="No space left") as told:
        await ingress.client().batches.cancel(batch.id)
    assert told.value.status_code == 503
    disk.is_full = False
    await ingress.look()
    disk.is_full = True
    await ingress.batches.keeper.settled()
    await ingress.look()
    disk.is_full = False
    await ingress.look(1.0)
    assert (await ingress.client().batches.retrieve(batch.id)).status in ("validating", "in_progress")
    await ingress.look(LEASE_S + 1.0)
    await ingress.work()
    done = await ingress.client().batches.retrieve(batch.id)
    assert done.status == "completed" and len(await ingress.results(done)) == 12


async def test_files_and_finished_batches_are_forgotten_in_time(ingress: Ingress, tmp_path: Path) -> None:
    await ingress.batch(LINES[0])
    await ingress.work()
    assert files_below(tmp_path)
    await ingress.look(40 * 86_400.0)
    client = ingress.client()
    assert not (await client.files.list()).data
    assert not (await client.batches.list()).data
    assert not files_below(tmp_path)
