"""What callers see when a model replica dies, and what a counter actor still knows after its own death."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

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
    headers: Any = None
    num_chunks: int = 0
    num_output: int = 0
    error: dict[str, Any] | None = None
    is_done: bool = False


async def read(http: httpx.AsyncClient, url: str, seen: Seen) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        seen.status, seen.headers = answer.status_code, answer.headers
        async for line in answer.aiter_lines():
            if seen.status != 200 and line:
                seen.error = json.loads(line)["error"]
            elif line == "data: [DONE]":
                seen.is_done = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                seen.error = event.get("error", seen.error)
                seen.num_output = (event.get("usage") or {}).get("completion_tokens", 0)
                seen.num_chunks += 1


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
        unserved = [seen for seen in streams if seen.status == 503]
        assert len(whole) + len(cut) + len(unserved) == len(streams)
        assert 1 <= len(cut) <= slots
        assert 1 <= len(unserved) <= served.args.dispatch.lookahead
        for seen in (*whole, *cut):
            assert seen.is_done, "no stream just stops"
        for seen in (*cut, *unserved):
            assert seen.error is not None and seen.error["code"] == "replica_failed"
            assert "Traceback" not in json.dumps(seen.error) and "Actor" not in json.dumps(seen.error)
        assert all(int(seen.headers["retry-after"]) >= 1 for seen in unserved)

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
    least, lost = (len(whole) + 1) * NUM_TOKENS, (len(cut) + len(unserved)) * NUM_TOKENS
    assert least < row["num_output"] < least + lost, "what the dead replica reported stays charged"
    assert row["service"] == row["num_input"] + 2 * row["num_output"]
    async with served.client("mourner") as client:
        await asyncio.gather(*(client.completions.create(model="tiny", prompt="x", max_tokens=4) for _ in range(16)))


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
