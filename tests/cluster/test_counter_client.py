"""Routers and replicas against a counter service in the same loop: time-outs, degraded mode, cancellation. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fairserve.clock import SystemClock, VirtualClock
from fairserve.cluster.counter_actor import CounterService
from fairserve.cluster.counter_client import RouterClient
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.messages import Grant, RouterCall, StepReport, Submit
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import ClientQueueFull

CONFIG = CounterConfig(call_timeout_s=0.2, poll_s=0.05)


class Wire:
    """Calls a CounterService directly; may be cut, or hang like a partition."""

    def __init__(self, service: CounterService) -> None:
        self.service = service
        self.is_cut = False
        self.hangs = False
        self.num_calls = 0

    async def route(self, call: RouterCall) -> Any:
        await self._pass()
        return await self.service.route(call)

    async def poll(self, call: RouterCall) -> Any:
        await self._pass()
        return await self.service.poll(call)

    async def report(self, report: StepReport) -> Any:
        await self._pass()
        return await self.service.report(report)

    async def _pass(self) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_cut:
            raise ConnectionError("cut")


def replica_report(seq: int, free_slots: int = 1, **events: Any) -> StepReport:
    return StepReport("replica", 1, seq, 0, 1000, free_slots, 1000, 1, **events)


def num_waiting(service: CounterService) -> int:
    return len(service._dispatcher.queue)


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until the condition holds; they are event-driven, so this is no guess at a time."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition is a plain object's state, there is no event to await
            await asyncio.sleep(0.001)


@pytest.fixture
def service() -> CounterService:
    args = FairServeArgs.model_validate({"counter": CONFIG.model_dump(), "dispatch": {"lookahead": 0}})
    return CounterService(args.model_dump_json())


@pytest.fixture
def wire(service: CounterService) -> Wire:
    return Wire(service)


@pytest.fixture
async def client(wire: Wire) -> Any:
    client = RouterClient(RouterBook("router", 1), wire, CONFIG, SystemClock())
    yield client
    await client.close()


def submit(name: str = "r1", **values: Any) -> Submit:
    return Submit(name, "ann", 10, 5, **values)


async def test_a_grant_comes_with_the_reply_when_there_is_room(service: CounterService, client: RouterClient) -> None:
    await service.report(replica_report(1))
    grant = await client.acquire(submit())
    assert grant is not None
    assert grant.replica == "replica"


async def test_a_waiting_request_is_granted_as_soon_as_a_replica_reports_room(
    service: CounterService, client: RouterClient
) -> None:
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    await service.report(replica_report(1))
    grant = await task
    assert isinstance(grant, Grant)


async def test_a_refusal_reaches_the_caller(service: CounterService, client: RouterClient) -> None:
    first = asyncio.create_task(client.acquire(submit("r1", max_waiting=1)))
    await until(lambda: num_waiting(service) > 0)
    with pytest.raises(ClientQueueFull) as refused:
        await client.acquire(submit("r2", max_waiting=1))
    assert refused.value.retry_after_s > 0
    first.cancel()


async def test_a_cancelled_wait_leaves_the_cluster_queue(service: CounterService, client: RouterClient) -> None:
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    task.cancel()
    await until(lambda: num_waiting(service) == 0)


async def test_a_cut_counter_actor_lets_everybody_go_on_at_once(wire: Wire, client: RouterClient) -> None:
    tasks = [asyncio.create_task(client.acquire(submit(f"r{i}"))) for i in range(5)]
    await until(lambda: num_waiting(wire.service) > 0)
    wire.is_cut = True
    async with asyncio.timeout(2):
        assert await asyncio.gather(*tasks) == [None] * 5
        assert client.is_degraded
        assert await client.acquire(submit("later")) is None


async def test_a_call_into_a_partition_does_not_hang_anybody(wire: Wire, client: RouterClient) -> None:
    wire.hangs = True
    async with asyncio.timeout(2):
        assert await client.acquire(submit()) is None


async def test_grants_come_again_after_the_actor_is_back(
    wire: Wire, service: CounterService, client: RouterClient
) -> None:
    wire.is_cut = True
    async with asyncio.timeout(2):
        assert await client.acquire(submit("first")) is None
    wire.is_cut = False
    await service.report(replica_report(1))
    await until(lambda: not client.is_degraded)
    grant = await client.acquire(submit("second"))
    assert grant is not None
    assert (await service.status())["waiting"] == 0


async def test_a_reconfigured_service_keeps_counters_and_asks_for_everything_again(
    service: CounterService, client: RouterClient
) -> None:
    from fairserve.dispatch.messages import Totals

    await service.report(replica_report(1, free_slots=0, totals={"bob": Totals(5, 0, 5, 15.0)}))
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    args = FairServeArgs.model_validate({"counter": CONFIG.model_dump(), "fairness": {"policy": "lcf"}})
    await service.configure(args.model_dump_json())
    await until(lambda: num_waiting(service) > 0)
    reply = await service.report(replica_report(2))
    assert (await task) is not None
    status = await service.status()
    assert status["policy"] == "lcf"
    assert status["clients"]["bob"]["service"] == 15
    assert reply.epoch == status["epoch"]


async def test_an_idle_service_ends_itself_and_a_busy_one_does_not() -> None:
    ended = asyncio.Event()
    clock = VirtualClock()
    args = FairServeArgs.model_validate({"counter": {"idle_ttl_s": 50}})
    service = CounterService(args.model_dump_json(), clock=clock, on_idle=ended.set)
    await service.report(replica_report(1))
    clock.advance(19)  # the replica is not dead yet
    await asyncio.sleep(0.15)
    assert not ended.is_set()
    clock.advance(100)
    async with asyncio.timeout(2):
        while not ended.is_set():
            await asyncio.sleep(0.05)
            clock.advance(30)


async def test_counters_outlive_the_service_in_a_snapshot(tmp_path: Any) -> None:
    from fairserve.dispatch.messages import Totals

    clock = VirtualClock()
    args = FairServeArgs.model_validate({"counter": {"snapshot_path": str(tmp_path / "c.sqlite"), "snapshot_s": 1}})
    first = CounterService(args.model_dump_json(), clock=clock)
    await first.report(replica_report(1, totals={"bob": Totals(5, 0, 5, 15.0)}))
    async with asyncio.timeout(5):
        while not (tmp_path / "c.sqlite").exists():
            clock.advance(1)
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
    second = CounterService(args.model_dump_json())
    assert (await second.status())["clients"]["bob"]["service"] == 15


async def test_an_unreadable_snapshot_is_set_aside_and_service_starts(tmp_path: Any, caplog: Any) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database, it only looks like one for a moment")
    args = FairServeArgs.model_validate({"counter": {"snapshot_path": str(path)}})
    service = CounterService(args.model_dump_json())
    assert (await service.status())["clients"] == {}
    assert (tmp_path / "c.sqlite.unreadable").exists()
    assert "set aside" in caplog.text
