"""Routers and replicas against a counter service in the same loop: time-outs, degraded mode, cancellation. No Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from fairserve.clock import SystemClock, VirtualClock
from fairserve.cluster import counter_client
from fairserve.cluster.counter_client import CounterLink, RayTransport, RouterClient
from fairserve.cluster.counter_service import CounterService
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.messages import Grant, RouterCall, StepReport, Submit, Totals
from fairserve.dispatch.router_book import RouterBook
from fairserve.errors import ClientQueueFull
from tests.cluster.scripted import Wire, until

CONFIG = CounterConfig(call_timeout_s=0.2, poll_s=0.05)


def replica_report(seq: int, free_slots: int = 1, **events: Any) -> StepReport:
    return StepReport("replica", 1, seq, 0, 1000, free_slots, 1000, 1, **events)


def num_waiting(service: CounterService) -> int:
    return len(service.dispatcher.queue)


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


async def test_a_request_that_is_granted_at_once_costs_one_call(
    wire: Wire, service: CounterService, client: RouterClient
) -> None:
    await service.report(replica_report(1))
    assert await client.acquire(submit()) is not None
    assert wire.num_calls == 1, "no poll stands beside it"
    waits = asyncio.create_task(client.acquire(submit("r2")))
    await until(lambda: len(service.main._polls) == 1)
    await service.report(replica_report(2, finished=("r1",)))
    assert await waits is not None


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


async def test_waiters_are_let_go_once_and_leave_nothing_behind(wire: Wire, client: RouterClient) -> None:
    tasks = [asyncio.create_task(client.acquire(submit(f"r{i}"))) for i in range(3)]
    await until(lambda: num_waiting(wire.service) == 3)
    wire.is_cut = True
    assert await asyncio.gather(*tasks) == [None] * 3
    assert not client._waiters and not len(client._book)
    wire.is_cut = False
    await until(lambda: num_waiting(wire.service) == 0)
    assert not client.is_degraded


async def test_what_goes_ahead_is_known_as_accepted_only_if_the_counter_actor_had_it(
    wire: Wire, client: RouterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = asyncio.create_task(client.acquire(submit("had")))
    await until(lambda: num_waiting(wire.service) == 1 and client._book._wanted["had"].was_taken)
    wire.is_cut = True
    assert await client.acquire(submit("never")) is None
    assert await accepted is None
    assert client.was_accepted("had") and not client.was_accepted("never")
    assert not client._never_accepted, "it is asked once"
    monkeypatch.setattr(counter_client, "MAX_NEVER_ACCEPTED", 2)
    for i in range(4):
        assert await client.acquire(submit(f"r{i}")) is None
    assert [*client._never_accepted] == ["r2", "r3"]


async def test_a_stalled_event_loop_is_not_taken_for_a_silent_actor(service: CounterService, wire: Wire) -> None:
    """The reply stands in line behind the time-out that fired when the loop went on."""
    link = CounterLink(CONFIG, SystemClock())
    loop = asyncio.get_running_loop()
    answered = loop.create_future()

    async def attempt() -> str:
        return await answered

    calling = asyncio.create_task(link.call(attempt))
    await asyncio.sleep(0)
    stall_s = 3 * CONFIG.call_timeout_s
    timer = threading.Timer(stall_s + 0.05, loop.call_soon_threadsafe, (answered.set_result, "reply"))
    timer.start()
    time.sleep(stall_s)  # noqa: ASYNC251 - the stall
    assert await calling == "reply"
    assert not link.is_down and link.num_faults == 0


async def test_a_stall_without_a_reply_still_ends_in_the_time_out() -> None:
    link = CounterLink(CONFIG, SystemClock())
    calling = asyncio.create_task(link.call(lambda: asyncio.Event().wait()))
    await asyncio.sleep(0)
    time.sleep(2 * CONFIG.call_timeout_s)  # noqa: ASYNC251 - the stall
    async with asyncio.timeout(5 * CONFIG.call_timeout_s):
        assert await calling is None
    assert link.is_down


async def test_a_timer_that_fires_a_little_early_tells_of_a_silent_actor_all_the_same() -> None:
    """Else new requests wait for a second time-out."""
    clock = VirtualClock()
    link = CounterLink(CONFIG, clock)

    async def silence() -> None:
        clock.advance(0.99 * CONFIG.call_timeout_s)
        await asyncio.Event().wait()

    assert await link.call(silence) is None
    assert link.is_down


async def test_a_stalled_router_keeps_its_place_in_the_queue(service: CounterService, client: RouterClient) -> None:
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    time.sleep(3 * CONFIG.call_timeout_s)  # noqa: ASYNC251 - the stall
    await service.report(replica_report(1))
    assert await task is not None
    assert not client.is_degraded


async def test_a_slow_call_beside_quick_ones_does_not_degrade(caplog: Any) -> None:
    link = CounterLink(CONFIG, SystemClock())
    slow = asyncio.create_task(link.call(lambda: asyncio.Event().wait()))
    while not slow.done():
        await link.call(lambda: asyncio.sleep(0.02))
    assert await slow is None
    assert link.num_faults == 1
    assert "unreachable" not in caplog.text


@pytest.mark.parametrize("method", ["compose", "compose_poll", "replied"])
async def test_a_bug_in_the_book_leaves_no_request_hanging(
    service: CounterService, client: RouterClient, monkeypatch: pytest.MonkeyPatch, caplog: Any, method: str
) -> None:
    whole, broken = getattr(client._book, method), [True]

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if broken:
            broken.clear()
            raise ZeroDivisionError("a bug")
        return whole(*args, **kwargs)

    monkeypatch.setattr(client._book, method, fail_once)
    with caplog.at_level(logging.ERROR):
        waits = asyncio.create_task(client.acquire(submit()))
        await until(lambda: num_waiting(service) == 1 and not broken)
        await service.report(replica_report(1))
        async with asyncio.timeout(5):
            assert await waits is not None
    assert "a bug" in caplog.text


async def test_a_grant_for_a_cancelled_wait_goes_back_and_its_charge_returns(
    service: CounterService, client: RouterClient
) -> None:
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    task.cancel()
    await service.report(replica_report(1))  # grants it before the cancel arrives
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not service.dispatcher.leases)
    assert num_waiting(service) == 0
    assert service.dispatcher.queue.counter("ann") == 0
    service.dispatcher.check()


async def test_a_wait_cancelled_in_the_moment_of_its_grant_gives_the_grant_back(
    service: CounterService, client: RouterClient
) -> None:
    task = asyncio.create_task(client.acquire(submit()))
    await until(lambda: num_waiting(service) > 0)
    future = client._waiters["r1"]
    await service.report(replica_report(1))
    await until(future.done)  # granted; the task has not run yet, or has just
    is_in_time = not task.done()
    task.cancel()
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    if is_in_time:
        assert isinstance(result, asyncio.CancelledError)
        await until(lambda: not service.dispatcher.leases)
        assert service.dispatcher.queue.counter("ann") == 0


async def test_a_refusal_for_a_cancelled_wait_is_dropped(service: CounterService, client: RouterClient) -> None:
    first = asyncio.create_task(client.acquire(submit("r1", max_waiting=1)))
    await until(lambda: num_waiting(service) > 0)
    second = asyncio.create_task(client.acquire(submit("r2", max_waiting=1)))
    await asyncio.sleep(0)  # wanted, not sent yet
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await service.report(replica_report(1))
    assert await first is not None
    assert not client._waiters


async def test_a_declined_grant_returns_its_charge_and_the_request_may_wait_again(
    service: CounterService, client: RouterClient
) -> None:
    await service.report(replica_report(1, free_slots=1))
    grant = await client.acquire(submit())
    assert grant is not None
    client.decline(grant, is_unreachable=False)
    again = await client.acquire(submit(is_retry=True, waited_s=1.0))
    assert again is not None and again.seq > grant.seq
    assert service.dispatcher.queue.counter("ann") == 10, "charged once"


async def test_a_reconfigured_service_keeps_counters_and_asks_for_everything_again(
    service: CounterService, client: RouterClient
) -> None:
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


async def test_a_service_that_an_ingress_asks_for_keys_does_not_end_itself() -> None:
    ended = asyncio.Event()
    clock = VirtualClock()
    args = FairServeArgs.model_validate({"counter": {"idle_ttl_s": 50}})
    service = CounterService(args.model_dump_json(), clock=clock, on_idle=ended.set)
    for _ in range(4):
        clock.advance(40)
        assert await service.key_directory(-1) is not None
        await service.main.tick()
    assert not ended.is_set()
    clock.advance(51)
    await service.main.tick()
    assert ended.is_set()


async def test_counters_outlive_the_service_in_a_snapshot(tmp_path: Any) -> None:
    clock = VirtualClock()
    args = FairServeArgs.model_validate({"counter": {"store": str(tmp_path / "c.sqlite"), "snapshot_s": 1}})
    first = CounterService(args.model_dump_json(), clock=clock)
    await first.report(replica_report(1, totals={"bob": Totals(5, 0, 5, 15.0)}))
    async with asyncio.timeout(5):
        while not first.main.upkeep._saved_acks:  # the file is there before anything is in it
            clock.advance(1)
            await asyncio.sleep(0.05)
    second = CounterService(args.model_dump_json())
    assert (await second.status())["clients"]["bob"]["service"] == 15


async def test_an_unreadable_snapshot_is_set_aside_and_service_starts(tmp_path: Any, caplog: Any) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database, it only looks like one for a moment")
    args = FairServeArgs.model_validate({"counter": {"store": str(path)}})
    service = CounterService(args.model_dump_json())
    assert (await service.status())["clients"] == {}
    assert (tmp_path / "c.sqlite.unreadable").exists()
    assert "set aside" in caplog.text


async def test_a_failing_tick_does_not_end_the_ticking(service: CounterService, monkeypatch: Any, caplog: Any) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(service.dispatcher, "tick", lambda now_s: 1 / 0)
        await service.ping()
        await until(lambda: "ZeroDivisionError" in caplog.text)
    ticks: list[float] = []
    monkeypatch.setattr(service.dispatcher, "tick", ticks.append)
    await until(lambda: bool(ticks))


async def test_two_polls_of_one_router_both_end_and_leave_nothing_behind(service: CounterService) -> None:
    """The router gave the first one up (a stall, a partition) and polls again."""
    call = RouterCall("router", 1, 1, 0, submits=(submit(),))
    await service.route(call)
    polls = [asyncio.create_task(service.poll(RouterCall("router", 1, 1, service.dispatcher.epoch))) for _ in "ab"]
    await asyncio.sleep(0)
    await service.report(replica_report(1))
    replies = await asyncio.gather(*polls)
    assert [len(reply.grants) for reply in replies] == [1, 1], "given out again until it is acknowledged"
    await service.poll(RouterCall("router", 1, 1, service.dispatcher.epoch, grants_ack=replies[0].grants[0].seq))
    assert not service.main._polls


async def test_a_poll_that_was_open_while_the_settings_changed_asks_for_everything_again(
    service: CounterService,
) -> None:
    """Even a router's very first poll, which knows no epoch: its requests are known to the former dispatcher only."""
    await service.route(RouterCall("router", 1, 1, 0, submits=(submit(),)))
    poll = asyncio.create_task(service.poll(RouterCall("router", 1, 1, 0)))
    await asyncio.sleep(0)
    changed = FairServeArgs.model_validate({"counter": CONFIG.model_dump(), "fairness": {"policy": "fcfs"}})
    await service.configure(changed.model_dump_json())
    assert (await poll).resubmit


class Memory:
    def __init__(self) -> None:
        self.text: str | None = None

    def recall(self) -> str | None:
        return self.text

    def remember(self, args_json: str) -> None:
        self.text = args_json


async def test_a_restarted_service_has_the_settings_of_the_newest_deployment() -> None:
    first_args, memory = FairServeArgs().model_dump_json(), Memory()
    first = CounterService(first_args, memory=memory)
    await first.configure(first_args)
    assert memory.text is None
    changed = FairServeArgs.model_validate({"fairness": {"policy": "lcf"}, "dispatch": {"lookahead": 3}})
    await first.configure(changed.model_dump_json())
    again = CounterService(first_args, memory=memory)  # Ray restarts an actor with its first arguments
    assert (await again.status())["policy"] == "lcf"
    assert again.dispatcher.limits.lookahead == 3


async def test_a_new_store_is_used_from_then_on(tmp_path: Any) -> None:
    service = CounterService(FairServeArgs().model_dump_json())
    path = tmp_path / "c.sqlite"
    args = FairServeArgs.model_validate({"counter": {"store": str(path), "snapshot_s": 0.01}})
    await service.configure(args.model_dump_json())
    await until(path.exists)


class Actor:
    """Stands for a Ray actor handle."""

    def __init__(self, answer: Any) -> None:
        self.route = self
        self._answer = answer

    async def remote(self, call: Any, slot: str) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


CALL = RouterCall("router", 1, 1, 0)


async def test_a_dead_actor_is_found_again_and_an_unavailable_one_is_kept() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    found = iter([Actor(ActorUnavailableError("restarting", None)), Actor(ActorDiedError()), Actor("reply")])
    transport = RayTransport(lambda: next(found))
    for _ in range(2):
        with pytest.raises(ActorUnavailableError):
            await transport.route(CALL)
    transport._actor = None
    with pytest.raises(ActorDiedError):
        await transport.route(CALL)
    assert await transport.route(CALL) == "reply"
    assert await transport.route(CALL) == "reply"


async def test_an_actor_that_cannot_be_found_is_looked_for_by_one_thread_only() -> None:
    """Looking blocks as long as a partition lasts; calls give up and come again all that time."""
    release, num_looks = threading.Event(), 0

    def find() -> Any:
        nonlocal num_looks
        num_looks += 1
        release.wait(5)
        return Actor("reply")

    transport = RayTransport(find)
    link = CounterLink(CounterConfig(call_timeout_s=0.02, poll_s=0.01), SystemClock())
    for _ in range(5):
        assert await link.call(lambda: transport.route(CALL)) is None
    assert num_looks == 1
    release.set()
    assert await transport.route(CALL) == "reply"
    assert num_looks == 1


async def test_looking_in_vain_is_an_error_and_the_next_call_looks_again() -> None:
    found = iter([None, Actor("reply")])

    def find() -> Any:
        actor = next(found)
        if actor is None:
            raise ValueError("no actor of that name")
        return actor

    transport = RayTransport(find)
    with pytest.raises(ValueError, match="no actor"):
        await transport.route(CALL)
    assert await transport.route(CALL) == "reply"
