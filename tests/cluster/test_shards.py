"""A replica over two processes, each in a bundle of its placement group, on real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from fairserve.config import FairServeArgs
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    return serve_app("shards", num_replicas=1, engine={"tensor_parallel_size": 2, "num_threads": 1})


def shard_pids() -> list[int]:
    mine = psutil.Process().children(recursive=True)
    return [process.pid for process in mine if any("Shard.follow" in word for word in process.cmdline()[:1])]


async def test_two_processes_answer_as_one_and_when_one_dies_the_replica_is_replaced(
    served: Served, serve_app: Callable[..., Served]
) -> None:
    whole = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    ask: dict[str, Any] = {"model": "tiny", "prompt": "two hands", "max_tokens": 20, "temperature": 0}
    texts = []
    for one in (whole, served):
        async with one.client("ann") as client:
            texts.append((await client.with_options(timeout=600).completions.create(**ask)).choices[0].text)
    assert texts[0] == texts[1]
    (pid,) = shard_pids()
    os.kill(pid, signal.SIGKILL)
    async with served.client("ann") as client, asyncio.timeout(300):
        patient = client.with_options(timeout=600, max_retries=50)
        assert (await patient.completions.create(**ask)).choices[0].text == texts[0]
    assert pid not in shard_pids()


def test_ranks_without_room_are_refused() -> None:
    with pytest.raises(ValidationError, match="each of its processes needs num_cpus_per_replica or"):
        FairServeArgs.model_validate({"num_cpus_per_replica": 0, "engine": {"tensor_parallel_size": 2}})
