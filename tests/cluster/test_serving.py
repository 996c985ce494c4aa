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
    assert status["routers"] >= 2  # doors of other tests may still be remembered


async def test_charges_equal_reported_usage_after_random_disconnects(served: Served, rng: Any) -> None:
    """To the token, for every client: of streams that were read to their end, what the last chunk said; of those that
    were left, whatever was made by then."""
    before, told_before = await served.quiet(), await asyncio.to_thread(served.usage)
    told, num_cached = {"ann": [0, 0], "bob": [0, 0]}, {"ann": 0, "bob": 0}
    num_cut = {"cut": 0, "hasty": 0}

    async def one(client: Any, name: str, kind: str) -> None:
        """A stream read to its end, cut after some chunks, or left at any time, also before it has begun."""
        leaves_s = rng.uniform(0, 1.5) if kind == "hasty" else None
        try:
            async with asyncio.timeout(leaves_s):
                await read(client, name, kind)
        except TimeoutError:
            num_cut["hasty"] += 1

    async def read(client: Any, name: str, kind: str) -> None:
        stream = await client.completions.create(
            model="tiny",
            prompt="p" * rng.randrange(1, 300),
            max_tokens=rng.randrange(1, 60) if kind == "whole" else 200,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        cut_after, num_chunks = rng.randrange(0, 20), 0
        try:
            async for chunk in stream:
                num_chunks += 1
                if kind == "cut" and num_chunks > cut_after:
                    num_cut["cut"] += 1
                    break
                if chunk.usage:
                    told[name][0] += chunk.usage.prompt_tokens
                    num_cached[name] += chunk.usage.prompt_tokens_details.cached_tokens
                    told[name][1] += chunk.usage.completion_tokens
        finally:
            await stream.close()

    async with served.client("ann") as ann, served.client("bob") as bob:
        pairs = ((ann, "ann"), (bob, "bob"))
        await asyncio.gather(*(one(client, name, "whole") for _ in range(15) for client, name in pairs))
        whole = await served.quiet()
        for name, (num_input, num_output) in told.items():
            assert gained(before, whole, name) == (num_input, num_output)
            was_cached = before["clients"].get(name, {"num_cached": 0})["num_cached"]
            assert whole["clients"][name]["num_cached"] - was_cached == num_cached[name] > 0
        kinds = ("whole", "cut", "hasty") * 8
        mixed = [(client, name, kind) for kind in kinds for client, name in pairs]
        await asyncio.gather(*(one(*three) for three in mixed))
    assert min(num_cut.values()) >= 4, "or this test shows nothing"
    after, told_after = await served.quiet(), await asyncio.to_thread(served.usage)
    for name, (num_input, num_output) in told.items():
        charged = gained(before, after, name)
        begun = told_before.get(name, (0, 0))
        assert charged == (told_after[name][0] - begun[0], told_after[name][1] - begun[1])
        assert charged[0] > num_input and charged[1] > num_output, "cut streams are charged, too"
        assert charged[1] < num_output + 16 * 200, "what was not made is not"
        row = after["clients"][name]
        assert row["service"] == row["num_input"] - row["num_cached"] + 2 * row["num_output"]
    assert after["waiting"] == 0
    assert all(r["free_kv_tokens"] == r["kv_capacity_tokens"] for r in after["replicas"].values())


def gained(before: dict[str, Any], after: dict[str, Any], client: str) -> tuple[int, int]:
    """Input and output tokens charged to a client between two pictures."""
    nothing = {"num_input": 0, "num_output": 0}
    old, new = before["clients"].get(client, nothing), after["clients"][client]
    return new["num_input"] - old["num_input"], new["num_output"] - old["num_output"]


async def test_three_thousand_waiting_requests_do_not_deadlock(served: Served) -> None:
    """Ray's async actors take 1,000 calls at a time: with one blocked call per waiting request, no report would arrive
    any more and no slot become free."""
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, (await asyncio.to_thread(served.status))["waiting"])
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    body = {"model": "tiny", "prompt": ["y"] * 128, "max_tokens": 4, "extra_body": {"ignore_eos": True}}
    async with served.client("flood-1") as one, served.client("flood-2") as two, served.client("flood-3") as three:
        answers = await asyncio.gather(*(client.completions.create(**body) for client in (one, two, three) * 9))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert peak > 3000, "or this test shows nothing"
    assert [len(answer.choices) for answer in answers] == [128] * 27
