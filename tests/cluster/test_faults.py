"""What happens to running and waiting requests when the counter actor goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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
