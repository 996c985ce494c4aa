"""What happens to running and waiting requests when the counter actor goes away."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

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


async def test_what_was_let_go_without_the_actor_returns_to_the_cluster_queue_when_it_is_back(served: Served) -> None:
    """Else a flood that was let through in the meantime would block the replicas for everybody else."""
    import ray
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
        long = {"model": "tiny", "prompt": "f" * 30, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        tasks = [asyncio.create_task(flood.completions.create(**long)) for _ in range(120)]
        await until(lambda: _is(num_waiting(), lambda num: num > 80))
        actor_pid = await asyncio.to_thread(ray.get, served.counter_actor().__ray_call__.remote(_pid))
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
    assert all(answer.usage.completion_tokens == 300 for answer in answers)
    await served.quiet()


async def _is(value: Awaitable[int], condition: Callable[[int], bool]) -> bool:
    return condition(await value)


def _pid(_: object) -> int:
    return os.getpid()
