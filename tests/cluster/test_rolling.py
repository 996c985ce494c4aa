"""A new version of everything is rolled out while clients keep asking."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_TOKENS = 60
NUM_CALLERS = 12
"""Of one client; with four slots on each of two replicas some requests always wait."""


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    return serve_app("main", num_replicas=2, num_ingress_replicas=2)


@dataclass
class Load:
    """Callers that ask again as soon as they are answered, every other one for a stream."""

    url: str
    num_whole: int = 0
    failures: list[str] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": "Bearer roller"}
        async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits) as http:
            await asyncio.gather(*(self._repeat(http, streams=i % 2 == 0) for i in range(NUM_CALLERS)))

    async def answers(self, num: int) -> None:
        """Wait for so many more."""
        wanted = self.num_whole + num
        while self.num_whole < wanted:  # noqa: ASYNC110 - it comes from other processes
            await asyncio.sleep(0.1)

    async def _repeat(self, http: httpx.AsyncClient, *, streams: bool) -> None:
        body = {"model": "tiny", "prompt": "roll", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": streams}
        if streams:
            body["stream_options"] = {"include_usage": True}
        while not self.is_over:
            answer = await http.post(f"{self.url}/v1/completions", json=body)
            try:
                last = answer.text.split("data: ")[-2] if streams else answer.text
                assert json.loads(last)["usage"]["completion_tokens"] == NUM_TOKENS
                self.num_whole += 1
            except Exception as error:
                self.failures.append(f"{answer.status_code} {error!r} {answer.text[-300:]}")


def replicas(served: Served) -> set[str]:
    """Names of the processes that Serve has for it, in whatever state: ``Model#...`` and ``Ingress#...``."""
    import ray

    prefix = f"SERVE_REPLICA::{served.name}#"
    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


async def test_a_new_version_is_rolled_out_under_load_and_no_request_fails(served: Served) -> None:
    from ray import serve

    from fairserve.app import build_app

    before = await served.quiet()
    old = await asyncio.to_thread(replicas, served)
    engine = served.args.engine.model_copy(update={"seed": served.args.engine.seed + 1})
    # The seed is a setting that replicas and ingress are built on, and that nothing here depends on.
    new_version = build_app(served.args.model_copy(update={"engine": engine}))
    load = Load(served.url)
    running = asyncio.create_task(load.run())
    states: set[Any] = set()
    try:
        async with asyncio.timeout(480):
            await load.answers(NUM_CALLERS)
            rolling = asyncio.create_task(
                asyncio.to_thread(serve.run, new_version, name=served.name, route_prefix=f"/{served.name}")
            )
            while True:
                status = await asyncio.to_thread(served.status)
                states |= {(f"Model#{name}" in old, room["is_draining"]) for name, room in status["replicas"].items()}
                now = await asyncio.to_thread(replicas, served)
                if rolling.done() and not now & old:
                    break
                await asyncio.sleep(0.1)
            await rolling
            assert len(now) == len(old) == 4
            await load.answers(NUM_CALLERS)  # by the new version
    finally:
        load.is_over = True
        async with asyncio.timeout(120):
            await running
    assert load.failures == []
    assert (True, True) in states and (False, True) not in states, "the old ones drained, and only they"
    after = await served.quiet()
    row = after["clients"]["roller"]
    assert row["num_output"] == load.num_whole * NUM_TOKENS, "nothing was made twice, and nothing for nobody"
    assert row["num_input"] == load.num_whole * len("roll")
    assert after["epoch"] == before["epoch"]
