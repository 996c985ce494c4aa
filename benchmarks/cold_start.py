"""From `serve run` to the first token, and from one replica to two: where the seconds go.

    python -m benchmarks.cold_start [--quick] [--rounds 2] [--out out/cold_start.json]

*start*: ``serve run`` of a file with one replica of the embedded model, in a Ray of its own, until the first token of a
streamed request. The stages follow one another: *process* (Python, imports, until Ray makes its folder), *Ray* (until
its raylet listens), *Serve* (until the HTTP port answers anything), *application* (until /health is 200: the model is
loaded, ingress and replica are up), *first token*.

*scale*: an application of one replica that may have two, idle, then many requests at once: *decided* (until Serve
starts the second replica; ``autoscaling.upscale_delay_s`` is 0.1), *replica up* (until Serve says that it runs),
*first request* (until it runs one, as its report says).

The model computes on one thread, so that a busy replica leaves a second core to one that starts. Caches are warm: the
first round, in which files come from the disk, is run and not counted, and the model is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.machine import describe_machine
from benchmarks.skew import WEIGHTS, Load, keys, secret
from fairserve.config import FairServeArgs

START = ("process", "Ray", "Serve", "application", "first token")
SCALE = ("decided", "replica up", "first request")
POLL_S = 0.02
LONGEST_S = 300.0
SLOTS = 8

Stages = dict[str, float]
"""Seconds of each stage, in order."""


def settings(**values: Any) -> dict[str, Any]:
    engine = {"max_num_seqs": SLOTS, "max_model_len": 512, "kv_cache_tokens": 512 * SLOTS, "num_threads": 1}
    return {"num_replicas": 1, "max_generation_s": 5.0, "engine": engine, "counter": {"store": None}, **values}


def config_file(port: int) -> str:
    """For `serve run`."""
    application = {
        "name": "fairserve",
        "route_prefix": "/",
        "import_path": "fairserve.app:build_app",
        "args": settings(),
    }
    http = {"host": "127.0.0.1", "port": port}
    return yaml.safe_dump({"proxy_location": "EveryNode", "http_options": http, "applications": [application]})


class Watch:
    """Seconds between one stage's end and the next one's."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self._at_s = time.perf_counter()

    def until(self, stage: str, is_over: Callable[[], bool], fails: Callable[[], str | None] = lambda: None) -> None:
        """Look until it is over.

        Raises:
            RuntimeError: ``fails`` says why it never will be, or it takes too long.
        """
        deadline_s = time.perf_counter() + LONGEST_S
        while not is_over():
            if (why := fails()) is not None:
                raise RuntimeError(f"{stage}: {why}")
            if time.perf_counter() > deadline_s:
                raise RuntimeError(f"{stage}: not within {LONGEST_S:.0f} s")
            time.sleep(POLL_S)
        now_s = time.perf_counter()
        self.stages[stage], self._at_s = now_s - self._at_s, now_s


def start() -> Stages:
    """One start of everything."""
    from fairserve.local import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fs-cs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        path = Path(folder, "serve.yaml")
        path.write_text(config_file(port))
        watch = Watch()
        with _command([str(Path(sys.executable).with_name("serve")), "run", str(path)], folder) as process:

            def fails() -> str | None:
                return None if process.poll() is None else f"`serve run` ended with {process.returncode}"

            session = Path(folder, "ray", "session_latest")
            watch.until("process", lambda: session.exists(), fails)
            watch.until("Ray", lambda: (session / "sockets" / "raylet").exists(), fails)
            watch.until("Serve", lambda: answers(url) is not None, fails)
            watch.until("application", lambda: answers(url) == 200, fails)
            watch.until("first token", lambda: has_token(url), fails)
    return watch.stages


@contextmanager
def _command(command: Sequence[str], folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """Ended by Ctrl-C; what it said is shown when something fails."""
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
    environment.pop("RAY_ADDRESS", None)
    log = Path(folder, "log")
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> int | None:
    """The status of /health; None where nobody listens."""
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code
    except httpx.HTTPError:
        return None


def has_token(url: str) -> bool:
    """Whether a streamed request got its first text; the rest is not waited for."""
    body = {
        "model": FairServeArgs().model_name,
        "prompt": "tell me",
        "max_tokens": 8,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LONGEST_S) as response:
        return any(line.startswith("data: {") for line in response.iter_lines())


def scale(url: str, args: FairServeArgs) -> Stages:
    """From one replica to two, of the application that runs in this Ray and has just begun."""
    import ray
    from ray import serve

    from fairserve.cluster.counter_actor import find_counter_actor
    from fairserve.local import APP

    actor = find_counter_actor(args.counter)

    def states() -> dict[str, int]:
        return {
            str(state): num
            for state, num in serve.status().applications[APP].deployments["Model"].replica_states.items()
        }

    def num_busy() -> int:
        rooms = ray.get(actor.status.remote(), timeout=30)["replicas"].values()
        return sum(room["running"] > 0 for room in rooms)

    asked = {"a": url}
    load = Load(
        asked, args.model_name, dict.fromkeys(WEIGHTS, ("a",)), prompt="tell me", max_tokens=48, in_flight=2 * SLOTS
    )
    Watch().until("one token", lambda: has_answer(url, args))

    async def measure() -> Stages:
        watch = Watch()
        async with load:
            await asyncio.to_thread(watch.until, "decided", lambda: sum(states().values()) > 1)
            await asyncio.to_thread(watch.until, "replica up", lambda: states().get("RUNNING", 0) > 1)
            await asyncio.to_thread(watch.until, "first request", lambda: num_busy() > 1)
        return watch.stages

    return asyncio.run(measure())


def has_answer(url: str, args: FairServeArgs) -> bool:
    body = {"model": args.model_name, "prompt": "tell me", "max_tokens": 2}
    headers = {"Authorization": f"Bearer {secret('ann')}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=LONGEST_S).status_code == 200


def scale_rounds(num: int) -> list[Stages]:
    """Each round has a fresh application, all in one Ray."""
    from fairserve.local import free_port, local_cluster, running_app

    scaling = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0.1}
    args = FairServeArgs.model_validate(settings(autoscaling=scaling, api={"keys": keys()}))
    rounds = []
    with local_cluster(args, port=free_port(), quiet=True) as cluster:
        for _ in range(num):
            with running_app(args, quiet=True):
                rounds.append(scale(cluster.url, args))
            told(rounds[-1])
    return rounds


def told(stages: Stages) -> None:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    print(f"{sum(stages.values()):.1f} s: {parts}", file=sys.stderr, flush=True)


def table(title: str, rounds: Sequence[Stages]) -> str:
    """A line per stage: median, least and most of the rounds."""
    lines = [title]
    stages = {name: [one[name] for one in rounds] for name in rounds[0]} | {
        "in all": [sum(one.values()) for one in rounds]
    }
    for name, values in stages.items():
        lines.append(f"{name:>14}  {statistics.median(values):6.1f} s  ({min(values):.1f}-{max(values):.1f})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cold_start", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="that count, of each kind (default 2)")
    parser.add_argument("--quick", action="store_true", help="one round, caches as they are: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/cold_start.json"))
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("nothing to run: at least one round")
    num_cold = 0 if options.quick else 1
    from fairserve.engine.embedded import ensure_embedded

    ensure_embedded()
    starts = []
    for i in range(num_cold + (1 if options.quick else options.rounds)):
        stages = start()
        told(stages)
        starts += [stages] if i >= num_cold else []
    scales = scale_rounds(1 if options.quick else options.rounds)
    print(table("from `serve run` to the first token", starts))
    print(table("from the load of many requests to the first on a second replica", scales))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": describe_machine(), "start": starts, "scale": scales}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
