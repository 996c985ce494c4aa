"""What happens to running and waiting requests when the counter actor goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    return serve_app("main", num_replicas=2, num_ingress_replicas=2)


async def test_a_killed_counter_actor_loses_no_request_and_no_token(served: Served) -> None:
    import ray

    told = {"num_input": 0, "num_output": 0}

    async def one(client, i: int) -> None:  # type: ignore[no-untyped-def]
        answer = await client.completions.create(
            model="tiny", prompt="w" * (10 + i % 7), max_tokens=30, extra_body={"ignore_eos": True}
        )
        told["num_input"] += answer.usage.prompt_tokens
        told["num_output"] += answer.usage.completion_tokens

    epoch = (await asyncio.to_thread(served.status))["epoch"]
    async with served.client("crash") as client:
        tasks = [asyncio.create_task(one(client, i)) for i in range(60)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ray.kill(served.counter_actor(), no_restart=False)
        await asyncio.gather(*tasks)
        tasks = [asyncio.create_task(one(client, i)) for i in range(20)]
        await asyncio.gather(*tasks)
    status = await served.quiet()
    assert status["epoch"] > epoch
    row = status["clients"]["crash"]
    assert (row["num_input"], row["num_output"]) == (told["num_input"], told["num_output"])
    assert told["num_output"] == 80 * 30


@pytest.mark.parametrize("how", ["killed", "slow"])
async def test_nobody_waits_for_a_counter_actor_that_is(
    how: str, served: Served, record_property: Callable[[str, object], None]
) -> None:
    """Streams that run do not notice, and new requests go on without it. `make chaos` measures the times: about a
    second until the first goes on, two until the actor is back."""
    before = await served.quiet()
    whole = {"model": "tiny", "extra_body": {"ignore_eos": True}}
    begun = asyncio.Semaphore(0)

    async def stream(client: Any) -> int:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        num_output = 0
        async for chunk in await client.completions.create(prompt="s" * 20, max_tokens=300, **whole, **options):
            if not num_output:
                begun.release()
            num_output = chunk.usage.completion_tokens if chunk.usage else -1
        return num_output

    async with served.client("patient") as client:
        client = client.with_options(timeout=600)
        streams = [asyncio.create_task(stream(client)) for _ in range(4)]
        for _ in streams:
            await begun.acquire()
        actor_pid = await asyncio.to_thread(_actor_pid, served)
        began_s = time.monotonic()
        if how == "killed":
            os.kill(actor_pid, signal.SIGKILL)
            hobbling = None
        else:
            hobbling = asyncio.create_task(_hobble(actor_pid, 4))
        answer = await client.completions.create(prompt="n", max_tokens=2, **whole)
        admitted_s = time.monotonic() - began_s
        assert answer.usage.completion_tokens == 2
        if hobbling is not None:
            more = [client.completions.create(prompt="n", max_tokens=2, **whole) for _ in range(8)]
            assert {one.usage.completion_tokens for one in await asyncio.gather(*more)} == {2}
            await hobbling
        async with asyncio.timeout(60):
            while how == "killed" and await _epoch(served) in (None, before["epoch"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        back_s = time.monotonic() - began_s
        assert await asyncio.gather(*streams) == [300] * 4
    record_property("admitted_s", round(admitted_s, 2))
    record_property("back_s", round(back_s, 2))
    print(f"{how}: a new request was answered after {admitted_s:.2f} s, the counter actor after {back_s:.2f} s")
    assert admitted_s < 15 and back_s < 45, "generous: for machines that are slow and busy"
    row = (await served.quiet())["clients"]["patient"]
    was = before["clients"].get("patient", {"num_input": 0, "num_output": 0})
    num_short = 1 if how == "killed" else 9
    assert row["num_output"] - was["num_output"] == 4 * 300 + num_short * 2
    assert row["num_input"] - was["num_input"] == 4 * 20 + num_short


async def test_what_was_let_go_without_the_actor_returns_to_the_cluster_queue_when_it_is_back(served: Served) -> None:
    """Else a flood that was let through in the meantime would block the replicas for everybody else."""
    from ray import serve

    model = serve.get_deployment_handle("Model", app_name=served.name)

    async def local_backlog() -> int:
        loads = await asyncio.to_thread(model.broadcast("load").results, timeout_s=30)
        return sum(num_waiting for _, num_waiting in loads)

    async def until(condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await condition():  # noqa: ASYNC110 - the state of other processes
                await asyncio.sleep(0.1)

    async def num_waiting() -> int:
        return int((await asyncio.to_thread(served.status))["waiting"])

    async with served.client("flood") as flood, served.client("modest") as modest:
        long = {"model": "tiny", "prompt": "f" * 30, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
        tasks = [asyncio.create_task(flood.completions.create(**long)) for _ in range(120)]
        await until(lambda: _is(num_waiting(), lambda num: num > 80))
        actor_pid = await asyncio.to_thread(_actor_pid, served)
        os.kill(actor_pid, signal.SIGSTOP)  # it hangs: calls come to their time-outs
        try:
            await until(lambda: _is(local_backlog(), lambda num: num > 40))
        finally:
            os.kill(actor_pid, signal.SIGCONT)
        await until(lambda: _is(local_backlog(), lambda num: num <= 4))
        assert await num_waiting() > 10
        answer = await modest.completions.create(model="tiny", prompt="m", max_tokens=2)
        assert answer.usage.completion_tokens <= 2
        assert sum(task.done() for task in tasks) < 110, "the modest client waited for the flood to end"
        answers = await asyncio.gather(*tasks)
    assert all(answer.usage.completion_tokens == 150 for answer in answers)
    await served.quiet()


async def _is(value: Awaitable[int], condition: Callable[[int], bool]) -> bool:
    return condition(await value)


def _actor_pid(served: Served) -> int:
    import ray

    return int(ray.get(served.counter_actor().__ray_call__.remote(_pid), timeout=30))


async def _epoch(served: Served) -> int | None:
    """None while it does not answer."""
    import ray

    try:
        return int((await asyncio.to_thread(served.status))["epoch"])
    except ray.exceptions.RayError:
        return None


async def _hobble(pid: int, num: int) -> None:
    """Let the process run for a tenth of the time only."""
    for _ in range(num):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(0.9)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.1)


def _pid(_: object) -> int:
    return os.getpid()
