"""A flood of callers who hang up: nothing of them stays, in no process."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 300
"""``benchmarks.overload`` sends 2,000."""
AT_ONCE = 30


async def test_a_flood_of_aborts_leaves_nothing_waiting_nothing_running_and_all_of_the_kv_cache(
    serve_app: Callable[..., Served],
) -> None:
    from ray import serve

    served = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    await served.quiet()
    rng, turns = random.Random(7), asyncio.Semaphore(AT_ONCE)

    async def ask_and_hang_up(http: httpx.AsyncClient, i: int) -> None:
        body: dict[str, Any] = {"model": "tiny", "prompt": "p" * 40, "max_tokens": 400, "ignore_eos": True}
        headers = {"Authorization": f"Bearer aborter-{i % 50}"}
        async with turns:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0, 0.5)):
                    await http.post(f"{served.url}/v1/completions", json=body | {"stream": i % 2 == 0}, headers=headers)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None)) as http:
        await asyncio.gather(*(ask_and_hang_up(http, i) for i in range(NUM_REQUESTS)))
    after = await served.quiet()

    assert (after["waiting"], after["leases"]) == (0, 0)
    for name, replica in after["replicas"].items():
        assert (replica["running"], replica["waiting"], replica["granted_unconfirmed"]) == (0, 0, 0)
        assert replica["free_kv_tokens"] == replica["kv_capacity_tokens"], name
    model = serve.get_deployment_handle("Model", app_name=served.name)
    loads = await asyncio.to_thread(lambda: model.broadcast("load").results(timeout_s=30))
    assert list(loads) == [(0, 0)] * len(loads)
    usage = await asyncio.to_thread(served.usage)
    for client, row in after["clients"].items():
        if client.startswith("aborter-"):
            assert usage.get(client, (0, 0)) == (row["num_input"], row["num_output"]), "what was made stays charged"
