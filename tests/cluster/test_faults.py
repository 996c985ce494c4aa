"""What happens to running and waiting requests when the counter actor goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


async def test_what_was_let_go_without_the_actor_returns_to_the_cluster_queue_when_it_is_back(served: Served) -> None:
    """Else a flood that was let through in the meantime would block the replicas for everybody else."""
    import ray

    lookahead = served.args.dispatch.lookahead

    def local_backlog(status: dict[str, Any]) -> int:
        return sum(replica["waiting"] for replica in status["replicas"].values())

    async with served.client("flood") as flood, served.client("modest") as modest:
        long = {"model": "tiny", "prompt": "f" * 30, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        tasks = [asyncio.create_task(flood.completions.create(**long)) for _ in range(120)]
        async with asyncio.timeout(30):
            while (await asyncio.to_thread(served.status))["waiting"] < 80:
                await asyncio.sleep(0.1)
        ray.kill(served.counter_actor(), no_restart=False)
        was_let_go = False
        async with asyncio.timeout(40):
            while True:
                try:
                    status = await asyncio.to_thread(served.status)
                except ray.exceptions.RayError:
                    continue  # it is not back yet
                print(
                    status["waiting"],
                    status["leases"],
                    [(r["running"], r["waiting"], r["granted_unconfirmed"]) for r in status["replicas"].values()],
                    sum(t.done() for t in tasks),
                )
                was_let_go = was_let_go or local_backlog(status) > 10 * lookahead
                if was_let_go and local_backlog(status) <= 2 * lookahead:
                    break
                await asyncio.sleep(0.05)
        assert status["waiting"] > 10
        answer = await modest.completions.create(model="tiny", prompt="m", max_tokens=2)
        assert answer.usage.completion_tokens <= 2
        assert sum(task.done() for task in tasks) < 100, "the modest client waited for the flood to end"
        answers = await asyncio.gather(*tasks)
    assert all(answer.usage.completion_tokens == 300 for answer in answers)
    await served.quiet()
