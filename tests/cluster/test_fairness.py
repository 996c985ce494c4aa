"""The whole cluster is fair, whichever door a client comes through (the test that other routers fail at, peers.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

KEYS = [
    {"client": "ann", "key": "ann-secret-key", "weight": 4},
    {"client": "bob", "key": "bob-secret-key", "weight": 1},
]
DOORS = ("a", "b")
DEMANDS = {
    "balanced": {"ann": ("a", "b"), "bob": ("a", "b")},
    "skewed": {"ann": ("a",), "bob": ("b",)},
    "swapped": {"ann": ("b",), "bob": ("a",)},
}
IN_FLIGHT = 24
"""Requests each client keeps in flight: far more than the replicas' slots, so that both always wait."""
MEASURED_SERVICE = 20_000


@pytest.fixture(scope="module")
def served(serve_app: Callable[..., Served]) -> Iterator[Served]:
    """Two model replicas behind two HTTP ingresses with separate routers, /fair and /fair-b."""
    from ray import serve

    from fairserve.app import build_ingress

    served = serve_app("fair", num_replicas=2, engine={"max_num_seqs": 2}, api={"keys": KEYS})
    door_b = build_ingress(served.args, serve.get_deployment_handle("Model", app_name="fair"))
    serve.run(door_b, name="fair-b", route_prefix="/fair-b")
    yield served
    serve.delete("fair-b")


class Load:
    """Clients that always have ``IN_FLIGHT`` requests open."""

    def __init__(self, served: Served, demand: dict[str, tuple[str, ...]]) -> None:
        self._urls = {"a": served.url, "b": f"{served.url}-b"}
        self._demand = demand

    async def __aenter__(self) -> None:
        self._http = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None))
        self._tasks = [
            asyncio.create_task(self._repeat(client, doors[i % len(doors)]))
            for client, doors in self._demand.items()
            for i in range(IN_FLIGHT)
        ]

    async def __aexit__(self, *_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def _repeat(self, client: str, door: str) -> None:
        body = {"model": "tiny", "prompt": "x" * 24, "max_tokens": 40, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {client}-secret-key"}
        while True:
            answer = await self._http.post(f"{self._urls[door]}/v1/completions", json=body, headers=headers)
            answer.raise_for_status()


async def measure(served: Served) -> dict[str, float]:
    """Service of both clients over a stretch in which both always wait."""

    async def status_while_both_wait() -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                status = await asyncio.to_thread(served.status)
                clients = status["clients"]
                if all(clients.get(name, {}).get("waiting", 0) > 4 for name in ("ann", "bob")):
                    return status
                await asyncio.sleep(0.1)

    first = await status_while_both_wait()
    while True:
        last = await status_while_both_wait()
        gained = {name: last["clients"][name]["service"] - first["clients"][name]["service"] for name in ("ann", "bob")}
        if sum(gained.values()) > MEASURED_SERVICE:
            return gained
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("name", DEMANDS)
async def test_weights_four_to_one_hold_over_two_ingresses_whatever_the_skew(served: Served, name: str) -> None:
    async with Load(served, DEMANDS[name]):
        gained = await measure(served)
    assert 4 * 0.9 <= gained["ann"] / gained["bob"] <= 4 * 1.1
    status = await served.quiet()
    assert 0 < status["worst_gap"] <= status["bound"]


async def test_the_policy_changes_live_and_fcfs_gives_equal_demand_equal_service(served: Served) -> None:
    """Shows that the test above measures the policy: without it the same load is served 1:1."""
    import ray

    before = await served.quiet()
    fcfs = served.args.model_copy(update={"fairness": served.args.fairness.model_copy(update={"policy": "fcfs"})})
    actor = served.counter_actor()
    await asyncio.to_thread(ray.get, actor.configure.remote(fcfs.model_dump_json()))
    try:
        async with Load(served, DEMANDS["skewed"]):
            gained = await measure(served)
        assert gained["ann"] / gained["bob"] == pytest.approx(1, abs=0.2)
    finally:
        await asyncio.to_thread(ray.get, actor.configure.remote(served.args.model_dump_json()))
    after = await served.quiet()
    assert after["clients"]["ann"]["service"] >= before["clients"]["ann"]["service"] + gained["ann"]
