"""Weights 4:1 over two HTTP ingresses: is the cluster fair whichever door a client comes through?

Two clients, ann (weight 4) and bob (weight 1), each with far more requests in flight than the replicas have slots.
Demand is balanced (both use both doors), skewed (ann comes through one door, bob through the other) and swapped. Two
independent routers with counters of their own serve a skewed demand 1:1 (ai-dynamo/dynamo issue 15187);
one authority serves it 4:1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from fairserve.config import FairServeArgs
from fairserve.local import APP, free_port, local_cluster, running_app

WEIGHTS = {"ann": 4.0, "bob": 1.0}
DEMANDS: dict[str, dict[str, tuple[str, ...]]] = {
    "balanced": {"ann": ("a", "b"), "bob": ("a", "b")},
    "skewed": {"ann": ("a",), "bob": ("b",)},
    "swapped": {"ann": ("b",), "bob": ("a",)},
}
IN_FLIGHT = 24
"""Requests each client keeps in flight, so that both always wait."""
SECOND_DOOR = "door-b"

Status = Callable[[], dict[str, Any]]


def keys() -> list[dict[str, Any]]:
    """The configuration of the two clients."""
    return [{"client": name, "key": secret(name), "weight": weight} for name, weight in WEIGHTS.items()]


def secret(client: str) -> str:
    return f"{client}-secret-key"


@contextmanager
def second_door(args: FairServeArgs, app: str = APP, name: str = SECOND_DOOR) -> Iterator[None]:
    """A second HTTP ingress, an application of its own at /<name>, in front of the model replicas of ``app``."""
    from ray import serve

    from fairserve.app import build_ingress

    model = serve.get_deployment_handle("Model", app_name=app)
    serve.run(build_ingress(args, model), name=name, route_prefix=f"/{name}")
    try:
        yield
    finally:
        serve.delete(name)


class Load:
    """Clients that always have ``in_flight`` requests open, over the doors that ``demand`` names. ``urls`` by door."""

    def __init__(
        self,
        urls: dict[str, str],
        model: str,
        demand: dict[str, tuple[str, ...]],
        *,
        prompt: str,
        max_tokens: int,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self._urls = urls
        self._in_flight = in_flight
        self._demand = demand
        self._body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}

    async def __aenter__(self) -> None:
        self._http = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))
        self._tasks = [
            asyncio.create_task(self._repeat(client, doors[i % len(doors)]))
            for client, doors in self._demand.items()
            for i in range(self._in_flight)
        ]

    async def __aexit__(self, *_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def _repeat(self, client: str, door: str) -> None:
        headers = {"Authorization": f"Bearer {secret(client)}"}
        while True:
            answer = await self._http.post(f"{self._urls[door]}/v1/completions", json=self._body, headers=headers)
            answer.raise_for_status()


async def measure(status: Status, *, min_service: float = 0.0, min_s: float = 0.0) -> dict[str, float]:
    """Service of both clients over a stretch in which both always wait: at least so much, and at least so long."""
    first = await _while_both_wait(status)
    began = time.monotonic()
    while True:
        await asyncio.sleep(0.1)
        last = await _while_both_wait(status)
        gained = {name: last[name]["service"] - first[name]["service"] for name in WEIGHTS}
        if sum(gained.values()) >= min_service and time.monotonic() - began >= min_s:
            return gained


async def _while_both_wait(status: Status) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            clients: dict[str, Any] = (await asyncio.to_thread(status))["clients"]
            if all(clients.get(name, {}).get("waiting", 0) > 4 for name in WEIGHTS):
                return clients
            await asyncio.sleep(0.1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="skew", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each measurement (default 60)")
    parser.add_argument("--policies", default="vtc,fcfs", help="policies to measure (default vtc,fcfs)")
    parser.add_argument("--out", type=Path, default=Path("out/skew.json"))
    options = parser.parse_args(argv)
    args = FairServeArgs.model_validate(
        {
            "num_replicas": 2,
            "max_generation_s": 5.0,
            "engine": {"max_num_seqs": 4, "max_model_len": 512, "kv_cache_tokens": 2048},
            "api": {"keys": keys()},
        }
    )
    rows = []
    with local_cluster(args, port=free_port(), quiet=True) as cluster:
        import ray

        urls = {"a": cluster.url, "b": f"{cluster.url}/{SECOND_DOOR}"}
        for policy in options.policies.split(","):
            fairness = args.fairness.model_copy(update={"policy": policy})
            with running_app(args.model_copy(update={"fairness": fairness}), quiet=True), second_door(args):
                actor = ray.get_actor(args.counter.name, namespace=args.counter.namespace)

                def status(actor: Any = actor) -> dict[str, Any]:
                    return dict(ray.get(actor.status.remote(), timeout=30))

                for name, demand in DEMANDS.items():
                    load = Load(urls, args.model_name, demand, prompt="tell me about rivers and", max_tokens=16)
                    rows.append({"policy": policy, "demand": name} | asyncio.run(_one(load, status, options.seconds)))
                    print("{policy:5} {demand:9} ann:bob {ann:8,.0f} : {bob:8,.0f} = {ratio:.2f}".format(**rows[-1]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    return 0 if all(abs(row["ratio"] - 4) <= 0.4 for row in rows if row["policy"] == "vtc") else 1


async def _one(load: Load, status: Status, seconds: float) -> dict[str, Any]:
    async with load:
        gained = await measure(status, min_s=seconds)
    return {**gained, "ratio": gained["ann"] / gained["bob"]}


if __name__ == "__main__":
    sys.exit(main())
