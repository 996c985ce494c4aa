"""The whole cluster is fair, whichever door a client comes through (the test that other routers fail at, peers.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from benchmarks import skew
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

MEASURED_SERVICE = 15_000


@pytest.fixture(scope="module")
def served(serve_app: Callable[..., Served]) -> Iterator[Served]:
    """Two model replicas behind two HTTP ingresses with separate routers, /fair and /door-b."""
    served = serve_app("fair", num_replicas=2, engine={"max_num_seqs": 2}, api={"keys": skew.keys()})
    with skew.second_door(served.args, app="fair"):
        yield served


def load(served: Served, demand: str) -> skew.Load:
    root = served.url.removesuffix(f"/{served.name}")
    urls = {"a": served.url, "b": f"{root}/{skew.SECOND_DOOR}"}
    return skew.Load(urls, "tiny", skew.DEMANDS[demand], prompt="x" * 24, max_tokens=40)


async def measure(served: Served) -> dict[str, float]:
    return await skew.measure(served.status, min_service=MEASURED_SERVICE)


@pytest.mark.parametrize("name", skew.DEMANDS)
async def test_weights_four_to_one_hold_over_two_ingresses_whatever_the_skew(served: Served, name: str) -> None:
    async with load(served, name):
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
        async with load(served, "skewed"):
            gained = await measure(served)
        assert gained["ann"] / gained["bob"] == pytest.approx(1, abs=0.3)
    finally:
        await asyncio.to_thread(ray.get, actor.configure.remote(served.args.model_dump_json()))
    after = await served.quiet()
    assert after["clients"]["ann"]["service"] >= before["clients"]["ann"]["service"] + gained["ann"]
