"""Trunks through Serve: the real router, streams and cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.conftest import Served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_TOKENS = 80
AT_ONCE = 6


async def num_trunks(served: Served) -> int:
    from ray import serve

    model = serve.get_deployment_handle("Model", app_name=served.name)
    return sum(await asyncio.to_thread(lambda: model.broadcast("num_trunks").results(timeout_s=60)))


async def num_ongoing(served: Served) -> int:
    """Requests that Serve counts in the model replicas."""
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    mine = [ray.get_actor(name, namespace=SERVE_NAMESPACE) for name in names if f"{served.name}#Model#" in name]
    counts = await asyncio.to_thread(ray.get, [one.get_num_ongoing_requests.remote() for one in mine], timeout=60)
    return sum(counts)


async def test_streams_side_by_side_share_trunks_and_say_what_each_would_alone(
    serve_app: Callable[..., Served],
) -> None:
    served = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    async with served.client("sharer") as client:
        client = client.with_options(timeout=600)

        async def ask(seed: int, leave_after: int = NUM_TOKENS) -> tuple[str, int]:
            """What it says, and its usage's tokens; 0 for a stream that is left after so many events."""
            request: dict[str, Any] = {"model": "tiny", "prompt": f"share {seed}", "max_tokens": NUM_TOKENS}
            request |= {"seed": seed, "extra_body": {"ignore_eos": True}, "stream": True}
            text, num, events = "", 0, 0
            stream = await client.completions.create(**request, stream_options={"include_usage": True})
            async with stream:
                async for chunk in stream:
                    text += "".join(choice.text for choice in chunk.choices)
                    num = chunk.usage.completion_tokens if chunk.usage else 0
                    events += 1
                    if events == leave_after:
                        return text, 0
            return text, num

        before = await num_trunks(served)
        alone = [await ask(seed) for seed in range(AT_ONCE)]
        leaving = [ask(100 + i, leave_after=3) for i in range(2)]
        together = await asyncio.gather(*(ask(seed) for seed in range(AT_ONCE)), *leaving)
        assert together[:AT_ONCE] == alone
        assert all(num == NUM_TOKENS for _, num in alone)
        assert await num_trunks(served) > before, "nothing was shared, and this test shows nothing"
    await served.quiet()
    async with asyncio.timeout(60):
        while await num_ongoing(served):  # noqa: ASYNC110 - a trunk is one; it ends, in another process, when idle
            await asyncio.sleep(0.1)
