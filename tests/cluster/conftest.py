"""A served tiny model on a real Ray: one deployment per set of arguments, kept for the session."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fairserve.config import FairServeArgs
from tests.tiny_model import save_tiny_model

TINY = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "kv_cache_tokens": 2048,
    "num_threads": 1,
    "pooling": "mean",
}


@dataclass(frozen=True)
class Served:
    """A running application."""

    name: str
    url: str
    args: FairServeArgs

    def counter_actor(self) -> Any:
        from fairserve.cluster.counter_actor import find_counter_actor

        return find_counter_actor(self.args.counter)

    def status(self) -> dict[str, Any]:
        import ray

        return ray.get(self.counter_actor().status.remote(), timeout=30)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Input and output tokens by client that the living replicas told their callers, or would have told those who
        left: of every request that has ended."""
        from ray import serve

        sums: dict[str, tuple[int, int]] = {}
        for told in serve.get_deployment_handle("Model", app_name=self.name).broadcast("usage").results(timeout_s=30):
            for client, usage in told.items():
                num_input, num_output = sums.get(client, (0, 0))
                sums[client] = (num_input + usage.num_input, num_output + usage.num_output)
        return sums

    def client(self, key: str = "anyone") -> Any:
        """An ``openai.AsyncOpenAI`` for one bearer token."""
        import openai

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def num_running(self) -> int:
        """Model replicas that serve."""
        from ray import serve

        model = serve.status().applications[self.name].deployments["Model"]
        return int(model.replica_states.get("RUNNING", 0))

    async def quiet(self) -> dict[str, Any]:
        """Wait until nothing waits, runs or is granted anywhere and all is reported; the status then."""
        last: dict[str, Any] = {}
        async with asyncio.timeout(60):
            while True:
                status = await asyncio.to_thread(self.status)
                # An actor that has just come back knows of no replica until each has reported to it.
                is_whole = len(status["replicas"]) >= await asyncio.to_thread(self.num_running)
                idle = is_whole and not status["waiting"] and not status["leases"]
                if idle and not any(r["running"] or r["waiting"] for r in status["replicas"].values()):
                    if status["clients"] == last.get("clients"):
                        return status
                    last = status
                await asyncio.sleep(0.6)  # longer than a heartbeat: every replica has reported in between


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def http_port(ray_cluster: Any) -> int:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return port


@pytest.fixture(scope="session")
def serve_app(ray_cluster: Any, http_port: int, tiny_model: Path) -> Iterator[Callable[..., Served]]:
    """``serve_app("name", **settings)``: the application of that name, started at the first call."""
    import ray
    from ray import serve

    from fairserve.app import application

    running: dict[str, Served] = {}

    def start(name: str, **settings: Any) -> Served:
        if name not in running:
            engine = TINY | settings.pop("engine", {})
            counter = {"name": f"counters-{name}"} | settings.pop("counter", {})
            args = FairServeArgs.model_validate(
                {
                    "model": str(tiny_model),
                    "served_model_name": "tiny",
                    "num_cpus_per_replica": 0.2,
                    "engine": engine,
                    "counter": counter,
                    "max_generation_s": 60.0,
                    "dispatch": {"replica_dead_s": 10.0},  # so that a test of a dead one is not long
                    **settings,
                }
            )
            serve.run(application(args), name=name, route_prefix=f"/{name}")
            running[name] = Served(name, f"http://127.0.0.1:{http_port}/{name}", args)
        return running[name]

    yield start
    for served in running.values():
        serve.delete(served.name)
        ray.kill(served.counter_actor(), no_restart=True)
