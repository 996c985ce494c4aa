"""Two models in one application on a real Ray: each has replicas, a router and counters of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Served
from tests.cluster.test_metrics_live import PATIENCE_S, scrape

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def served(serve_app: Callable[..., Served], tiny_model: Any) -> Served:
    engine = {"max_num_seqs": 4, "kv_cache_tokens": 2048, "num_threads": 1, "max_model_len": 64}
    other = {
        "model": str(tiny_model),
        "served_model_name": "org/other",
        "num_replicas": 1,
        "num_cpus_per_replica": 0.2,
        "price": 2.0,
        "engine": engine,
    }
    keys = {"admin_keys": [{"name": "ops", "key": "ops-secret-123"}]}
    return serve_app("models", num_replicas=1, more_models=[other], across_models=True, api=keys)


async def test_each_model_answers_and_counts_and_both_are_told_apart(served: Served) -> None:
    async with served.client("ann") as openai:
        client = openai.with_options(timeout=600)
        listed = {model.id: model.max_model_len async for model in client.models.list()}
        assert listed["org/other"] == 64 < listed["tiny"]
        for name in listed:
            answers = await asyncio.gather(
                *(client.completions.create(model=name, prompt="abc", max_tokens=8) for _ in range(3))
            )
            assert {answer.model for answer in answers} == {name}
    admin = {"authorization": "Bearer ops-secret-123"}
    async with httpx.AsyncClient(base_url=f"{served.url}/admin/v1", headers=admin, timeout=600) as http:

        async def overview(name: str) -> dict[str, Any]:
            return (await http.get("/overview", params={"model": name})).json()

        # 3 requests of 3 input and 8 output tokens each, and what the other model served by the ratio of prices.
        of_each = 3 * (3 + 2 * 8.0)
        wanted = {"tiny": (24, of_each + 2.0 * of_each), "org/other": (24, of_each + 0.5 * of_each)}
        counted: dict[str, Any] = {}
        async with asyncio.timeout(PATIENCE_S):
            while counted != wanted:
                views = {name: await overview(name) for name in listed}
                rows = {name: view["clients"] for name, view in views.items() if view["clients"]}
                counted = {name: (row["num_output"], row["service"]) for name, (row, *_) in rows.items()}
                await asyncio.sleep(0.5)
        replicas = {one["name"] for view in views.values() for one in view["replicas"]}
        assert len(replicas) == 2 == sum(len(view["replicas"]) for view in views.values()), "each has one of its own"
    async with asyncio.timeout(PATIENCE_S):
        for counters in ("counters-models", "counters-models.org-other"):
            while True:
                series = await asyncio.to_thread(scrape, counters)
                served_tokens = sum(value for _, value in series.get("ray_fairserve_client_tokens_total", []))
                if served_tokens and any(value for _, value in series.get("ray_fairserve_engine_tokens_total", [])):
                    break
                await asyncio.sleep(1)
