"""Changes through the counter service: in force at once, durable when they return, kept over deployments and lives."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from fairserve import views
from fairserve.clock import SystemClock
from fairserve.cluster.counter_client import RouterClient
from fairserve.cluster.counter_service import CounterService
from fairserve.config import CounterConfig, FairServeArgs, key_digest
from fairserve.dispatch.messages import RouterCall, StepReport, Submit
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import ChangeNotKept, ClientRateLimited, InvalidRequest, UnknownKey
from tests.cluster.scripted import Wire, until

CONFIG = CounterConfig(call_timeout_s=1.0, poll_s=0.05)
ARGS = FairServeArgs.model_validate({"counter": CONFIG.model_dump(), "dispatch": {"lookahead": 0}})
KEY = {"client": "eve", "key_sha256": key_digest("fs-eve"), "weight": 2.0}


class Memory:
    def __init__(self) -> None:
        self.text: str | None = None
        self.gate: threading.Event | None = None

    def recall(self) -> str | None:
        return self.text

    def remember(self, text: str) -> None:
        if self.gate is not None and not self.gate.wait(5):
            raise TimeoutError
        self.text = text


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def service(memory: Memory) -> CounterService:
    return CounterService(ARGS.model_dump_json(), live_memory=memory)


def report(seq: int, free_slots: int = 1) -> StepReport:
    return StepReport("replica", 1, seq, 0, 1000, free_slots, 1000, 1)


async def test_a_resumed_client_is_granted_at_once(service: CounterService) -> None:
    client = RouterClient(RouterBook("router", 1), Wire(service), CONFIG, SystemClock())
    paused = await service.set_client("ann", {"is_paused": True}, "root")
    assert views.ClientView.model_validate(paused).is_paused
    task = asyncio.create_task(client.acquire(Submit("r1", "ann", 10, 5)))
    await until(lambda: len(service.dispatcher.room) > 0)
    await service.report(report(1))
    assert not task.done()
    view = views.ClientView.model_validate(await service.client("ann"))
    assert (view.is_paused, view.waiting) == (True, 1)
    await service.set_client("ann", {"is_paused": False}, "root")
    assert (await task) is not None
    await client.close()


async def test_a_rate_is_in_force_when_the_call_returns(service: CounterService) -> None:
    view = views.ClientView.model_validate(await service.set_client("ann", {"requests_per_min": 1}, "root"))
    assert view.requests_per_min == 1
    calls = RouterCall("router", 1, 1, 0, submits=(Submit("r1", "ann", 10, 5), Submit("r2", "ann", 10, 5)))
    (refusal,) = (await service.route(calls)).refusals
    assert isinstance(refusal.error, ClientRateLimited)


async def test_everything_that_was_changed_is_there_in_the_next_life(service: CounterService, memory: Memory) -> None:
    await service.set_client("ann", {"weight": 4, "max_waiting": 3}, "root")
    await service.set_settings({"fairness.policy": "lcf"}, "root")
    await service.add_key(KEY, "root")
    again = CounterService(ARGS.model_dump_json(), live_memory=memory)
    view = views.ClientView.model_validate(await again.client("ann"))
    assert (view.weight, view.max_waiting) == (4.0, 3)
    assert (await again.status())["policy"] == "lcf"
    assert [views.KeyView.model_validate(key).client for key in await again.keys()] == ["eve"]
    await again.set_client("ann", {"weight": None}, "root")
    assert views.ClientView.model_validate(await again.client("ann")).weight == 1.0


async def test_the_audit_log_is_in_the_file(tmp_path: Path) -> None:
    args = ARGS.model_copy(update={"counter": CounterConfig(store=str(tmp_path / "c.sqlite"))}).model_dump_json()
    first = CounterService(args)
    await first.add_key(KEY, "root")
    await first.revoke_key(key_digest("fs-eve")[:12], "eve")
    entries = [views.AuditView.model_validate(one) for one in await CounterService(args).audit()]
    assert [(one.seq, one.who, one.action) for one in entries] == [(2, "eve", "key.revoke"), (1, "root", "key.create")]
    assert key_digest("fs-eve") not in json.dumps(await first.audit())
    assert await first.audit(before_seq=2, limit=1) == [entries[1].model_dump(mode="json")]


async def test_settings_begin_a_new_epoch_and_stay_over_a_new_deployment(service: CounterService) -> None:
    epoch = await service.ping()
    (row,) = await service.set_settings({"dispatch.max_waiting": 5}, "root")
    assert views.SettingView.model_validate(row).is_live
    assert await service.ping() > epoch
    assert service.dispatcher.limits.max_waiting == 5
    deployed = ARGS.model_copy(update={"fairness": ARGS.fairness.model_copy(update={"policy": "fcfs"})})
    await service.configure(deployed.model_dump_json())
    assert service.dispatcher.limits.max_waiting == 5 and (await service.status())["policy"] == "fcfs"
    epoch = await service.ping()
    await service.configure(deployed.model_dump_json())  # a replica that starts again
    assert await service.ping() == epoch
    rows = {one["path"]: one for one in await service.settings()}
    assert (rows["dispatch.max_waiting"]["value"], rows["dispatch.max_waiting"]["deployed"]) == (5, 10_000)
    await service.set_settings({"dispatch.max_waiting": None}, "root")
    assert service.dispatcher.limits.max_waiting == 10_000


async def test_controls_hold_after_the_settings_changed(service: CounterService) -> None:
    await service.set_client("ann", {"is_paused": True, "weight": 3}, "root")
    await service.set_settings({"fairness.policy": "drr"}, "root")
    await service.report(report(1))
    reply = await service.route(RouterCall("router", 1, 1, 0, submits=(Submit("r1", "ann", 10, 5),)))
    assert not reply.grants and service.dispatcher.room.num_waiting("ann") == 1
    assert service.dispatcher.queue.table.weight("ann") == 3.0


async def test_a_change_is_not_in_force_before_it_is_kept_and_decisions_go_on_meanwhile(
    service: CounterService, memory: Memory
) -> None:
    memory.gate = threading.Event()
    first = asyncio.create_task(service.set_client("ann", {"weight": 4}, "root"))
    second = asyncio.create_task(service.set_client("ann", {"weight": 5}, "root"))
    await asyncio.sleep(0)
    reply = await service.route(RouterCall("router", 1, 1, 0, submits=(Submit("r1", "ann", 10, 5),)))
    assert not reply.refusals and service.dispatcher.queue.table.weight("ann") == 1.0
    memory.gate.set()
    await first
    assert (await second)["weight"] == 5.0
    assert [one["seq"] for one in await service.audit()] == [2, 1]


async def test_a_change_whose_caller_has_gone_is_made_all_the_same(service: CounterService, memory: Memory) -> None:
    memory.gate = threading.Event()
    task = asyncio.create_task(service.set_client("ann", {"weight": 4}, "root"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    memory.gate.set()
    await until(lambda: service.dispatcher.queue.table.weight("ann") == 4.0)


async def test_a_change_that_cannot_be_kept_is_not_made(service: CounterService, memory: Memory) -> None:
    def broken(text: str) -> None:
        raise RuntimeError("no GCS")

    memory.remember = broken  # type: ignore[method-assign]
    with pytest.raises(ChangeNotKept, match="no GCS"):
        await service.add_key(KEY, "root")
    assert await service.keys() == [] and await service.audit() == []


async def test_wrong_changes_reach_the_caller_and_change_nothing(service: CounterService) -> None:
    await service.route(RouterCall("router", 1, 1, 0, submits=(Submit("r1", "acme/ann", 10, 5),)))
    for change in (
        service.set_client("acme", {"weight": 2}, "root"),
        service.set_client("ann", {"weight": -2}, "root"),
        service.set_settings({"fairness.polciy": "vtc"}, "root"),
        service.add_key({"client": "ann", "key": "fs-secret"}, "root"),
    ):
        with pytest.raises(InvalidRequest):
            await change
    with pytest.raises(UnknownKey):
        await service.revoke_key("abc", "root")
    assert await service.audit() == []


async def test_a_new_store_takes_what_was_changed_before(service: CounterService, tmp_path: Path) -> None:
    await service.set_client("ann", {"weight": 4}, "root")
    moved = ARGS.model_copy(update={"counter": CounterConfig(store=str(tmp_path / "c.sqlite"))})
    await service.configure(moved.model_dump_json())
    assert (await CounterService(moved.model_dump_json()).client("ann"))["weight"] == 4.0


async def test_a_rotated_decision_log_begins_with_who_decides(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    counter = CONFIG.model_copy(update={"decision_log_path": str(path)})
    service = CounterService(ARGS.model_copy(update={"counter": counter}).model_dump_json())
    service.main.authority.log_file._max_bytes = 1  # type: ignore[union-attr]
    await service.ping()
    await until((tmp_path / "log.jsonl.1").exists)
    await service.set_client("ann", {"weight": 2}, "root")
    await until(lambda: "change" in (tmp_path / "log.jsonl.1").read_text())
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl.1").read_text().splitlines()]
    assert events == ["began", "change"]
