"""A wave of work on a real Serve: one replica becomes three, then none; nothing is lost, and it stays fair."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import Served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

WAVE = 30
"""Requests of each of two clients; with four slots a replica, most of them wait."""
NUM_TOKENS = 200


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    scaling = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0.5, "downscale_delay_s": 3.0}
    return serve_app("wave", num_replicas=1, autoscaling=scaling)


def num_running(served: Served) -> int:
    """Model replicas that Serve says are running."""
    from ray import serve

    states: dict[str, int] = serve.status().applications[served.name].deployments["Model"].replica_states
    return states.get("RUNNING", 0)


async def until(num: int, served: Served, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while await asyncio.to_thread(num_running, served) != num:  # noqa: ASYNC110 (Serve tells nobody)
                await asyncio.sleep(0.2)
            return
    demand = await served.counter_actor().demand.remote()
    pytest.fail(f"never {num} replicas: {await asyncio.to_thread(num_running, served)} run, the actor sees {demand}")


async def test_replicas_follow_a_wave_up_and_down_to_none_and_the_next_request_brings_one_back(served: Served) -> None:
    extra = {"ignore_eos": True}

    async def ask(client: Any, num_tokens: int = NUM_TOKENS) -> int:
        patient = client.with_options(timeout=600)
        answer = await patient.completions.create(model="tiny", prompt="x", max_tokens=num_tokens, extra_body=extra)
        return int(answer.usage.completion_tokens)

    async with served.client("ann") as ann, served.client("bob") as bob:
        wave = [asyncio.create_task(ask(client)) for _ in range(WAVE) for client in (ann, bob)]
        await until(3, served, 240)
        # Work comes for as long as it takes the new replicas to get some of it.
        async with asyncio.timeout(180):
            while True:
                status = await asyncio.to_thread(served.status)
                if sum(room["running"] > 0 for room in status["replicas"].values()) == 3:
                    break
                if not status["waiting"]:
                    wave += [asyncio.create_task(ask(client)) for _ in range(8) for client in (ann, bob)]
                await asyncio.sleep(0.1)
        assert set(await asyncio.gather(*wave)) == {NUM_TOKENS}, "no request is lost or cut when replicas come"
        status = await asyncio.to_thread(served.status)
        assert status["worst_gap"] <= status["bound"]

        trickle = [asyncio.create_task(ask(ann, 20)) for _ in range(3)]
        await asyncio.gather(*trickle)
        await until(0, served, 240)
        assert await asyncio.wait_for(ask(bob, 5), 240) == 5, "the first request waits for the replica that it brings"
    status = await asyncio.to_thread(served.status)
    rows = status["clients"]
    assert rows["ann"]["num_output"] == 60 + NUM_TOKENS * sum(i % 2 == 0 for i in range(len(wave)))
    assert rows["bob"]["num_output"] == 5 + NUM_TOKENS * sum(i % 2 == 1 for i in range(len(wave)))
