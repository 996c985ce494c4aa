"""What the caller of a stream sees when its replica is killed, without and with ``api.retry_on_replica_death``.

Streams once undisturbed, then kills (SIGKILL) the replica in the middle of a stream through a door that does not retry
and through one that does, and prints what came, how soon, and what was charged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from benchmarks.skew import SECOND_DOOR, second_door
from fairserve.config import FairServeArgs
from fairserve.local import free_port, local_cluster, running_app

NUM_TOKENS = 120
KILL_AFTER = 30
"""Events."""
PROMPT = "Tell me about rivers, at length."


@dataclass
class Stream:
    """One stream as its caller saw it. ``times_s``: of its events, since it was sent."""

    text: str = ""
    error: str | None = None
    usage: dict[str, Any] | None = None
    times_s: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False))

    async def read(self, url: str, model: str) -> None:
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        began_s = time.monotonic()
        async with (
            httpx.AsyncClient(headers={"Authorization": "Bearer ann"}, timeout=600) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
        ):
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line and line != "data: [DONE]":
                    self.times_s.append(time.monotonic() - began_s)
                    event = json.loads(line.removeprefix("data: "))
                    self.error = event.get("error", {}).get("code", self.error)
                    self.usage = event.get("usage") or self.usage
                    self.text += "".join(one["delta"].get("content", "") for one in event.get("choices", ()))


async def kill_under(stream: Stream, url: str, args: FairServeArgs, actor: Any) -> dict[str, Any]:
    """Kill the replica that ``stream`` comes from. Seconds are counted from the kill."""
    import ray

    reading = asyncio.create_task(stream.read(url, args.model_name))

    async def replicas() -> dict[str, Any]:
        return dict((await asyncio.to_thread(ray.get, actor.status.remote()))["replicas"])

    async def until(condition: Callable[[dict[str, Any]], bool]) -> float:
        while not condition(await replicas()):  # noqa: ASYNC110 - it comes from other processes
            await asyncio.sleep(0.005)
        return time.monotonic()

    await until(lambda _: len(stream.times_s) >= KILL_AFTER)
    victim = next(name for name, room in (await replicas()).items() if room["running"])
    os.kill(await asyncio.to_thread(pid_of, victim), signal.SIGKILL)
    killed_s = time.monotonic()
    forgotten_s = await until(lambda rooms: victim not in rooms) - killed_s
    await reading
    ended_s = time.monotonic() - killed_s
    replaced_s = await until(lambda rooms: len(rooms) >= args.num_replicas) - killed_s
    return {"forgotten_s": forgotten_s, "ended_s": ended_s, "replaced_s": replaced_s}


def pid_of(replica: str) -> int:
    import ray
    from ray.serve._private.constants import SERVE_NAMESPACE

    names = (one["name"] for one in ray.util.list_named_actors(all_namespaces=True))
    (name,) = (name for name in names if name.endswith(f"#Model#{replica}"))
    return int(ray.get(ray.get_actor(name, namespace=SERVE_NAMESPACE).is_allocated.remote())[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="replica_death", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="kills through each door (default 3)")
    parser.add_argument("--out", type=Path, default=Path("out/replica_death.json"))
    options = parser.parse_args(argv)
    engine = {"max_num_seqs": 4, "max_model_len": 512, "kv_cache_tokens": 2048}
    args = FairServeArgs.model_validate({"num_replicas": 2, "max_generation_s": 5.0, "engine": engine})
    api = args.api.model_copy(update={"retry_on_replica_death": True})
    rows: list[dict[str, Any]] = []
    is_whole = True
    with (
        local_cluster(args, port=free_port(), quiet=True) as cluster,
        running_app(args, quiet=True),
        second_door(args.model_copy(update={"api": api})),
    ):
        import ray

        actor = ray.get_actor(args.counter.name, namespace=args.counter.namespace)
        alone = Stream()
        asyncio.run(alone.read(cluster.url, args.model_name))
        print(f"undisturbed: {alone.longest_gap_s:.2f} s is the longest gap")
        for _ in range(options.rounds):
            for retry, url in ((False, cluster.url), (True, f"{cluster.url}/{SECOND_DOOR}")):
                stream = Stream()
                times = asyncio.run(kill_under(stream, url, args, actor))
                rows.append({"retry": retry, "same_text": stream.text == alone.text, **times, **asdict(stream)})
                is_whole &= (stream.text == alone.text and stream.usage == alone.usage) or not retry
                ending = stream.error or ("the same text" if stream.text == alone.text else "ANOTHER TEXT")
                print(
                    f"retry {retry}: ends with {ending} after {times['ended_s']:.2f} s, longest gap "
                    f"{stream.longest_gap_s:.2f} s; charges returned after {times['forgotten_s']:.2f} s, "
                    f"replaced after {times['replaced_s']:.1f} s",
                    flush=True,
                )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
