"""What callers see when a model replica dies, and what a counter actor still knows after its own death."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks import skew
from fairserve.config import ApiConfig
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

NUM_TOKENS = 300


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    return serve_app("main", num_replicas=2, num_ingress_replicas=2)


@dataclass
class Seen:
    """One stream as its caller saw it."""

    status: int | None = None
    num_chunks: int = 0
    num_output: int = 0
    error: dict[str, Any] | None = None
    is_done: bool = False
    text: str = ""
    usage: dict[str, Any] | None = None


async def read(http: httpx.AsyncClient, url: str, seen: Seen, **values: Any) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True} | values
    body["stream_options"] = {"include_usage": True}
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        seen.status = answer.status_code
        async for line in answer.aiter_lines():
            if seen.status != 200 and line:
                seen.error = json.loads(line)["error"]
            elif line == "data: [DONE]":
                seen.is_done = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                seen.error = event.get("error", seen.error)
                seen.text += "".join(choice["text"] for choice in event.get("choices", ()))
                seen.usage = event.get("usage")
                seen.num_output = (seen.usage or {}).get("completion_tokens", 0)
                seen.num_chunks += 1


@pytest.fixture
def door(served: Served) -> Iterator[str]:
    """URL of a second ingress, which retries."""
    args = served.args.model_copy(update={"api": ApiConfig(retry_on_replica_death=True), "num_ingress_replicas": 1})
    with skew.second_door(args, app=served.name, name="retrying"):
        yield served.url.removesuffix(served.name) + "retrying"


def kill_replica(served: Served, name: str) -> None:
    import ray

    (actor,) = (
        one
        for one in ray.util.list_named_actors(all_namespaces=True)
        if one["name"].startswith("SERVE_REPLICA::") and f"{served.name}#Model#{name}" in one["name"]
    )
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)


async def test_a_killed_replica_ends_its_own_streams_with_an_error_and_no_others(served: Served) -> None:
    before = await served.quiet()
    slots = served.args.engine.max_num_seqs
    streams = [Seen() for _ in range(14)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers={"Authorization": "Bearer mourner"}, timeout=60, limits=limits) as http:
        tasks = [asyncio.create_task(read(http, served.url, seen)) for seen in streams]
        async with asyncio.timeout(30):
            while True:  # all slots stream, and one request waits on the victim without a byte sent
                status = await asyncio.to_thread(served.status)
                busy = [n for n, r in status["replicas"].items() if r["waiting"] and r["running"] == slots]
                if busy and sum(seen.num_chunks > 0 for seen in streams) >= 2 * slots:
                    break
                await asyncio.sleep(0.02)
        victim = busy[0]
        kill_replica(served, victim)
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        whole = [seen for seen in streams if seen.num_output == NUM_TOKENS]
        cut = [seen for seen in streams if seen.status == 200 and seen.error is not None]
        assert len(whole) + len(cut) == len(streams), "what only waited on the victim was served elsewhere"
        assert 1 <= len(cut) <= slots
        for seen in streams:
            assert seen.is_done, "no stream just stops"
        for seen in cut:
            assert seen.error is not None and seen.error["code"] == "replica_failed"
            assert "Traceback" not in json.dumps(seen.error) and "Actor" not in json.dumps(seen.error)

        again = Seen()  # with one replica left
        async with asyncio.timeout(20):
            await read(http, served.url, again)
        assert again.num_output == NUM_TOKENS

    async with asyncio.timeout(90):
        while True:  # Serve notices, starts another one, and the counter actor forgets the dead one
            status = await served.quiet()
            if len(status["replicas"]) == 2 and victim not in status["replicas"]:
                break
            await asyncio.sleep(0.5)
    assert all(r["free_kv_tokens"] == r["kv_capacity_tokens"] for r in status["replicas"].values())
    assert (status["waiting"], status["leases"], status["epoch"]) == (0, 0, before["epoch"])
    row = status["clients"]["mourner"]
    least, lost = (len(whole) + 1) * NUM_TOKENS, len(cut) * NUM_TOKENS
    assert least < row["num_output"] < least + lost, "what the dead replica reported stays charged"
    assert row["service"] == row["num_input"] + 2 * row["num_output"]
    async with served.client("mourner") as client:
        await asyncio.gather(*(client.completions.create(model="tiny", prompt="x", max_tokens=4) for _ in range(16)))


async def test_with_retries_streams_go_on_elsewhere_and_say_what_they_would_have_said(
    served: Served, door: str
) -> None:
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.2, "seed": 7, "frequency_penalty": 0.5}] * 2
    async with httpx.AsyncClient(headers={"Authorization": "Bearer heir"}, timeout=600) as http:

        async def streams() -> tuple[list[Seen], list[asyncio.Task[None]]]:
            streams = [Seen() for _ in kinds]
            pairs = zip(streams, kinds, strict=True)
            return streams, [asyncio.create_task(read(http, door, seen, **kind)) for seen, kind in pairs]

        alone, tasks = await streams()
        await asyncio.gather(*tasks)
        before = await served.quiet()
        cut, tasks = await streams()
        async with asyncio.timeout(60):
            while not all(seen.num_chunks > 20 for seen in cut):  # noqa: ASYNC110 - they come from other processes
                await asyncio.sleep(0.01)
            status = await asyncio.to_thread(served.status)
        victim = max(status["replicas"], key=lambda name: int(status["replicas"][name]["running"]))
        assert status["replicas"][victim]["running"] > 0, "or this test shows nothing"
        kill_replica(served, victim)
        async with asyncio.timeout(120):
            await asyncio.gather(*tasks)
    for seen, undisturbed in zip(cut, alone, strict=True):
        assert (seen.status, seen.error, seen.is_done) == (200, None, True)
        assert seen.text == undisturbed.text
        assert seen.usage == undisturbed.usage
        assert seen.num_output == NUM_TOKENS
    async with asyncio.timeout(120):
        while True:  # Serve has started another one
            status = await served.quiet()
            if len(status["replicas"]) == 2 and victim not in status["replicas"]:
                break
    row, first = status["clients"]["heir"], before["clients"]["heir"]
    made = row["num_output"] - first["num_output"]
    wanted = len(kinds) * NUM_TOKENS  # a few were made and not delivered, or delivered and not reported
    assert wanted - NUM_TOKENS < made < wanted + NUM_TOKENS, "the victim's share was charged twice, or not at all"
    cached = row["num_cached"] - first["num_cached"]
    assert cached > 0, "nobody went on, and this test shows nothing"
    assert row["service"] - first["service"] == row["num_input"] - first["num_input"] - cached + 2 * made


async def test_a_restarted_counter_actor_has_the_newest_settings_not_its_first(served: Served) -> None:
    import ray

    actor = served.counter_actor()
    first = served.args.model_dump_json()
    fairness = served.args.fairness.model_copy(update={"policy": "lcf"})
    changed = served.args.model_copy(update={"fairness": fairness}).model_dump_json()
    epoch = await asyncio.to_thread(ray.get, actor.configure.remote(changed))
    try:
        ray.kill(actor, no_restart=False)
        async with asyncio.timeout(30):
            while True:  # the killed one may still answer a call or two
                try:
                    status = await asyncio.to_thread(served.status)
                    if status["epoch"] > epoch:
                        break
                except ray.exceptions.RayError:
                    pass
                await asyncio.sleep(0.1)
        assert status["policy"] == "lcf"
    finally:
        await asyncio.to_thread(ray.get, actor.configure.remote(first))
    await served.quiet()
