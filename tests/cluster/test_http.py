"""What a caller of the whole cluster meets over HTTP: keys, limits, wrong requests, and leaving early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import skew
from fairserve.config import ApiConfig
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

DOOR = "keyed"
MAX_WAITING = 3
KEYS = {"key-of-limited": "limited", "key-of-filler": "filler", "key-of-leaver": "leaver"}


@pytest.fixture(scope="module")
def served(serve_app: Callable[..., Served]) -> Iterator[Served]:
    """The main application, and a door with keys to its replicas."""
    served = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    keys = [{"client": client, "key": key} for key, client in KEYS.items()]
    keys[0]["max_waiting"] = MAX_WAITING  # type: ignore[assignment]
    args = served.args.model_copy(update={"api": ApiConfig.model_validate({"keys": keys}), "num_ingress_replicas": 1})
    with skew.second_door(args, app=served.name, name=DOOR):
        yield served


@asynccontextmanager
async def caller(served: Served, key: str) -> AsyncIterator[httpx.AsyncClient]:
    url = served.url.removesuffix(served.name) + DOOR
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120, limits=limits
    ) as http:
        yield http


def body(max_tokens: int, **values: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, **values}


async def complete(http: httpx.AsyncClient, **values: Any) -> httpx.Response:
    return await http.post("/v1/completions", json=values)


async def reaches(served: Served, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Look at the status until it is so."""
    async with asyncio.timeout(30):
        while True:
            status = await asyncio.to_thread(served.status)
            if ready(status):
                return status
            await asyncio.sleep(0.05)  # another process changes: nothing to wait on but the clock


def waiting(status: dict[str, Any], client: str) -> int:
    return int(status["clients"].get(client, {"waiting": 0})["waiting"])


async def test_wrong_requests_are_answered_at_the_door_and_never_reach_the_counter_actor(served: Served) -> None:
    before = await served.quiet()
    async with caller(served, "key-of-nobody") as http:
        answer = await complete(http, **body(4))
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    async with caller(served, "key-of-limited") as http:
        answer = await complete(http, **body(4, model="other"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        for wrong in (body(4, prompt="x" * 600), body(512)):
            answer = await complete(http, **wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert "512 tokens" in answer.json()["error"]["message"]
    after = await served.quiet()
    assert after["granted"] == before["granted"]
    assert after["clients"].keys() == before["clients"].keys()


async def test_more_waiting_requests_than_the_key_allows_are_429_with_the_limit_and_retry_after(
    served: Served,
) -> None:
    async with caller(served, "key-of-limited") as http:
        answers = await asyncio.gather(*(complete(http, **body(150)) for _ in range(26)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(answers) - len(refused) >= MAX_WAITING
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert error["code"] == "client_queue_full"
        assert error["details"]["limit"] == MAX_WAITING
    status = await served.quiet()
    row, num_served = status["clients"]["limited"], len(answers) - len(refused)
    assert (row["num_input"], row["num_output"]) == (5 * num_served, 150 * num_served), "a refusal costs nothing"


async def test_who_leaves_the_queue_or_a_running_stream_frees_the_place_and_pays_for_what_was_made(
    served: Served,
) -> None:
    before = await asyncio.to_thread(served.usage)
    async with caller(served, "key-of-filler") as filler, caller(served, "key-of-leaver") as leaver:
        fill = [asyncio.create_task(complete(filler, **body(500))) for _ in range(24)]
        await reaches(served, lambda status: waiting(status, "filler") >= 10)
        leave = [asyncio.create_task(complete(leaver, **body(500, stream=i % 2 == 0))) for i in range(6)]
        await reaches(served, lambda status: waiting(status, "leaver") >= 4)
        await gone(leave)
        status = await reaches(served, lambda status: waiting(status, "leaver") == 0)
        row = status["clients"]["filler"]
        assert row["waiting"] >= 1 and row["running"] >= 4, "the queue still stands"
        made, to_make = row["num_output"], 500 * row["running"] - row["num_output"]
        await gone(fill)
    after = await served.quiet()
    assert all(r["free_kv_tokens"] == r["kv_capacity_tokens"] for r in after["replicas"].values())
    told = await asyncio.to_thread(served.usage)
    for client in ("filler", "leaver"):
        begun, row = before.get(client, (0, 0)), after["clients"][client]
        assert (row["num_input"], row["num_output"]) == (
            told.get(client, (0, 0))[0] - begun[0],
            told.get(client, (0, 0))[1] - begun[1],
        )
    assert after["clients"]["filler"]["num_output"] - made < to_make / 2, "it went on for nobody"


async def gone(tasks: list[asyncio.Task[httpx.Response]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_stream_over_http_is_events_with_a_done_and_says_how_long_it_queued(served: Served) -> None:
    async with (
        caller(served, "key-of-filler") as http,
        http.stream("POST", "/v1/completions", json=body(3, stream=True)) as answer,
    ):
        lines = [line async for line in answer.aiter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert float(answer.headers["x-fairserve-queue-ms"]) >= 0
    left, limit = (int(answer.headers[f"x-ratelimit-{name}-requests"]) for name in ("remaining", "limit"))
    assert 0 <= left <= limit, "as the counter actor said with the grant, through Serve's router"
    assert abs(float(answer.headers["x-fairserve-counter-position"])) < 1e9
    assert "ttft;dur=" in answer.headers["server-timing"]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["model"] == "tiny" for line in lines[:-1])


async def test_no_key_that_came_through_the_door_is_in_any_file_of_rays_session(served: Served) -> None:
    secret = b"canary-key-of-nobody-0123456789"
    for headers in ({"Authorization": f"Bearer {secret.decode()}"}, {"x-api-key": secret.decode()}):
        async with caller(served, "key-of-limited") as http:
            answer = await http.post("/v1/completions?key=" + secret.decode(), json=body(1), headers=headers)
            assert answer.status_code in (200, 401)
    assert await asyncio.to_thread(files_that_hold, [secret, *(key.encode() for key in KEYS)]) == []


def files_that_hold(secrets: list[bytes]) -> list[Path]:
    from fairserve.cluster.keeper import ray_session_folder

    files = [path for path in Path(ray_session_folder()).rglob("*") if path.is_file()]
    assert len(files) > 10, "logs, and more"
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]
