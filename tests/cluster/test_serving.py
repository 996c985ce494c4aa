"""Two ingress and two model replicas on a real Ray, through the unmodified openai package."""

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


async def test_a_chat_is_answered(served: Served) -> None:
    async with served.client() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 8


async def test_the_same_greedy_prompt_gives_the_same_text_on_every_replica(served: Served) -> None:
    async with served.client() as client:
        answers = await asyncio.gather(
            *(client.completions.create(model="tiny", prompt="abc", max_tokens=16, temperature=0) for _ in range(16))
        )
    assert len({answer.choices[0].text for answer in answers}) == 1


async def test_eight_choices_and_a_list_of_prompts_do_not_hang(served: Served) -> None:
    """Ray's own routers hang when one request makes several concurrent handle calls."""
    async with served.client() as client, asyncio.timeout(60):
        answer = await client.completions.create(model="tiny", prompt=["a", "b", "c"], n=8, max_tokens=4)
    assert [choice.index for choice in answer.choices] == list(range(24))


async def test_a_stream_ends_with_the_usage(served: Served) -> None:
    async with served.client() as client:
        stream = await client.completions.create(
            model="tiny",
            prompt="x" * 40,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (40, 12)


async def test_both_replicas_and_both_ingresses_take_part(served: Served) -> None:
    async with served.client("spread") as client:
        await asyncio.gather(*(client.completions.create(model="tiny", prompt=f"{i}", max_tokens=8) for i in range(64)))
    status = await served.quiet()
    assert len(status["replicas"]) == 2
    assert status["routers"] == 2


async def test_charges_equal_reported_usage_after_random_disconnects(served: Served, rng: Any) -> None:
    """To the token: of streams that were cut, everything the replica made is charged, nothing more."""
    told = {"ann": [0, 0], "bob": [0, 0]}

    async def one(client: Any, name: str, i: int) -> None:
        tokens = rng.randrange(1, 60)
        stream = await client.completions.create(
            model="tiny",
            prompt="p" * rng.randrange(1, 100),
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage:
                told[name][0] += chunk.usage.prompt_tokens
                told[name][1] += chunk.usage.completion_tokens

    async with served.client("ann") as ann, served.client("bob") as bob:
        await asyncio.gather(*(one(c, n, i) for i in range(20) for c, n in ((ann, "ann"), (bob, "bob"))))
        whole = await served.quiet()
        for name, (num_input, num_output) in told.items():
            row = whole["clients"][name]
            assert (row["num_input"], row["num_output"]) == (num_input, num_output)
        # Now cut streams at random; the counter may hold what was made, at most what was asked for.
        asked = 0
        tasks = []
        for _ in range(30):
            asked += 400
            tasks.append(asyncio.create_task(_cut(ann, rng.randrange(0, 30))))
        await asyncio.gather(*tasks)
    after = await served.quiet()
    row, before = after["clients"]["ann"], whole["clients"]["ann"]
    assert row["num_output"] - before["num_output"] < asked
    assert row["service"] == row["num_input"] + 2 * row["num_output"]
    assert abs(after["waiting"]) == 0
    assert all(r["free_kv_tokens"] == r["kv_capacity_tokens"] for r in after["replicas"].values())


async def _cut(client: Any, after: int) -> None:
    stream = await client.completions.create(
        model="tiny", prompt="q" * 50, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    num = 0
    async for _ in stream:
        num += 1
        if num > after:
            break
    await stream.close()


async def test_three_thousand_waiting_requests_do_not_deadlock(served: Served) -> None:
    import httpx

    limits = httpx.Limits(max_connections=None)
    body = {"model": "tiny", "prompt": "zz", "max_tokens": 1}
    async with httpx.AsyncClient(limits=limits, timeout=240, headers={"Authorization": "Bearer flood"}) as http:
        flood = [asyncio.create_task(http.post(f"{served.url}/v1/completions", json=body)) for _ in range(1500)]
        many = {"model": "tiny", "prompt": ["y"] * 128, "max_tokens": 1}
        flood += [asyncio.create_task(http.post(f"{served.url}/v1/completions", json=many)) for _ in range(12)]
        answers = await asyncio.gather(*flood)
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) > 1000
