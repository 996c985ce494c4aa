"""The head node of a Ray cluster dies under load, and comes back: what do callers see?

    python -m benchmarks.head_death [--away 30]

Starts a Redis that keeps Ray's own state (GCS fault tolerance), a head node in a process namespace of its own, which
can be killed whole, and a worker node with replicas, ingresses, a proxy and the counter actor (``counter.resource``).
Clients ask all the time. The head (GCS, Serve's controller, its proxy) is killed, stays away, and is started again.
Needs Linux, root, `redis-server` and `unshare`. Exits 1 when a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import describe_machine
from fairserve.config import FairServeArgs
from fairserve.errors import ConfigError, FairServeError
from fairserve.local import free_port

NUM_CLIENTS = 6
NUM_TOKENS = 32
PLACE = "fairserve_counters"
"""Only the worker node offers it: the counter actor runs there."""
START_S = 180.0
REQUEST_S = 60.0
FINISHED, CUT, LOST = "finished", "connection lost with the head's proxy", "lost"
CUT_WITHIN_S = 15.0
"""A connection that broke so soon after the head was killed broke with its proxy."""


def head_death_args(model: str) -> FairServeArgs:
    """The head offers no CPUs, so that nothing of it runs there."""
    return FairServeArgs.model_validate(
        {
            "model": model,
            "served_model_name": "tiny",
            "num_replicas": 2,
            "num_ingress_replicas": 2,
            "num_cpus_per_replica": 0.5,
            "engine": {"max_num_seqs": 8, "kv_cache_tokens": 4096, "num_threads": 1},
            "counter": {"resource": PLACE},
        }
    )


@dataclass
class Asked:
    """One request. Unix seconds."""

    sent_s: float
    end_s: float = 0.0
    outcome: str = LOST
    detail: str = ""


class RayCluster:
    """Two nodes; ``environment`` is theirs, and that of whoever talks to them."""

    def __init__(self, folder: Path) -> None:
        (folder / "ray").mkdir()
        self._folder = folder
        self._port, self._redis_port = free_port(), free_port()
        self._ray = str(Path(sys.executable).with_name("ray"))
        self.address = ""
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{self._redis_port}",
            "RAY_external_storage_namespace": "head-death",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])),
        }

    def redis(self) -> subprocess.Popen[bytes]:
        command = ["redis-server", "--port", str(self._redis_port), "--bind", "127.0.0.1", "--save", ""]
        return self._start(command, "redis")

    def head(self) -> subprocess.Popen[bytes]:
        """In its own process namespace: it ends as a machine does, all at once, and does not see the other node, which
        it would take for an earlier head."""
        isolate = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        start = ["--head", "--port", str(self._port), "--num-cpus", "0", "--include-dashboard", "false"]
        return self._start([*isolate, self._ray, "start", "--block", *start], "head")

    def worker(self) -> subprocess.Popen[bytes]:
        offers = ["--num-cpus", "4", "--resources", json.dumps({PLACE: 1})]
        return self._start([self._ray, "start", "--block", "--address", self.address, *offers], "worker")

    def wait_for_head(self) -> None:
        """
        Raises:
            ConfigError: it does not come.
        """
        give_up_s = time.monotonic() + START_S
        while True:
            said = (self._folder / "head.log").read_text()
            if "Ray runtime started" in said:
                break
            if time.monotonic() > give_up_s:
                raise ConfigError(f"the head did not start within {START_S:g} s: {said[-1000:]}")
            time.sleep(0.2)
        words = next(line for line in said.splitlines() if "--address=" in line)
        self.address = words.partition("--address=")[2].strip().strip("'").partition("'")[0]

    def run(self, job: str, *words: str) -> str:
        """One of this module's jobs, as a driver of its own, which the head may take with it.

        Raises:
            ConfigError: it failed.
        """
        command = [sys.executable, "-m", "benchmarks.head_death", job, self.address, *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=2 * START_S)
        if done.returncode:
            raise ConfigError(f"{job} failed: {done.stderr[-2000:]}")
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

    def _start(self, command: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Killed, with its group, when the block ends."""
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# -- jobs: each in a process of its own --------------------------------------------------------------------------------


def deploy(address: str, model: str, port: str) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from fairserve.app import application

    ray.init(address=address, log_to_driver=False)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host="127.0.0.1", port=int(port)))
    serve.run(application(head_death_args(model)), name="fairserve", route_prefix="/")


def look(address: str) -> None:
    """Print what the counter actor knows and how Serve is."""
    import ray
    from ray import serve

    ray.init(address=address, log_to_driver=False)
    config = head_death_args("").counter
    status: dict[str, Any] = ray.get(ray.get_actor(config.name, namespace=config.namespace).status.remote(), timeout=30)
    applications = {name: str(one.status.value) for name, one in serve.status().applications.items()}
    output = sum(client["num_output"] for client in status["clients"].values())
    print(json.dumps({"epoch": status["epoch"], "output": output, "applications": applications}))


# -- the run -----------------------------------------------------------------------------------------------------------


async def ask(http: httpx.AsyncClient, url: str, client: str) -> Asked:
    one = Asked(time.time())
    body = {"model": "tiny", "prompt": "the head of the river", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {client}"}
    try:
        answer = await http.post(f"{url}/v1/completions", json=body, headers=headers)
        made = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else 0
        one.outcome = FINISHED if made == NUM_TOKENS else LOST
        one.detail = "" if made == NUM_TOKENS else f"{answer.status_code} {answer.text[:120]}"
    except httpx.HTTPError as error:
        one.detail = repr(error)[:120]
    one.end_s = time.time()
    return one


async def load(url: str, records: list[Asked]) -> None:
    async def client(name: str) -> None:
        while True:
            records.append(await ask(http, url, name))

    async with httpx.AsyncClient(timeout=REQUEST_S) as http, asyncio.TaskGroup() as group:
        for i in range(NUM_CLIENTS):
            group.create_task(client(f"client-{i}"))


async def storm(cluster: RayCluster, head: subprocess.Popen[bytes], url: str, options: Any) -> dict[str, Any]:
    records: list[Asked] = []
    before = json.loads(await asyncio.to_thread(cluster.run, "look"))
    loading = asyncio.create_task(load(url, records))
    await asyncio.sleep(options.calm)
    began_s = time.time()
    await asyncio.to_thread(kill, head)
    killed_s = time.time()
    print(f"the head is gone, for {options.away:g} s", flush=True)
    await asyncio.sleep(options.away)
    back = await asyncio.to_thread(cluster.head)
    try:
        await asyncio.to_thread(cluster.wait_for_head)
        back_s = time.time()
        print("the head is back", flush=True)
        await asyncio.sleep(options.calm)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        after = json.loads(await asyncio.to_thread(cluster.run, "look"))
    finally:
        await asyncio.to_thread(kill, back)
    for one in records:
        broke = one.outcome == LOST and ("Protocol" in one.detail or "Read" in one.detail or "Connect" in one.detail)
        if broke and killed_s - REQUEST_S < one.sent_s < killed_s + 1 and one.end_s < killed_s + CUT_WITHIN_S:
            one.outcome = CUT
    without = [one for one in records if one.outcome == FINISHED and killed_s < one.end_s < back_s]
    calm = [one for one in records if one.outcome == FINISHED and one.end_s < began_s]
    return {
        "outcomes": dict(Counter(one.outcome for one in records)),
        "per_s_before": round(len(calm) / options.calm, 2),
        "per_s_without_head": round(len(without) / (back_s - killed_s), 2),
        "longest_s": round(max(one.end_s - one.sent_s for one in records), 2),
        "away_s": round(back_s - killed_s, 1),
        "same_epoch": before["epoch"] == after["epoch"],
        "output_told": NUM_TOKENS * sum(one.outcome == FINISHED for one in records),
        "output_charged": after["output"] - before["output"],
        "applications": after["applications"],
        "slowest": [
            {"seconds": round(one.end_s - one.sent_s, 2), "after_kill_s": round(one.sent_s - killed_s, 2)}
            for one in sorted(records, key=lambda one: one.sent_s - one.end_s)[:10]
        ],
        "lost": [asdict(one) | {"after_kill_s": one.sent_s - killed_s} for one in records if one.outcome == LOST][:20],
    }


def why_not() -> str | None:
    """Why this cannot run here; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it needs Linux and root, for process namespaces"
    missing = [name for name in ("redis-server", "unshare") if shutil.which(name) is None]
    return f"it needs {' and '.join(missing)}" if missing else None


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    jobs: dict[str, Callable[..., None]] = {"deploy": deploy, "look": look}
    if words and words[0] in jobs:
        jobs[words[0]](*words[1:])
        return 0
    parser = argparse.ArgumentParser(prog="head_death", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--away", type=float, default=30.0, help="seconds before the head is started again (default 30)"
    )
    parser.add_argument("--calm", type=float, default=20.0, help="seconds of load before and after (default 20)")
    parser.add_argument("--out", type=Path, default=Path("out/head_death.json"))
    options = parser.parse_args(words)
    if (reason := why_not()) is not None:
        print(f"head_death: {reason}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="fs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            from tests.tiny_model import save_tiny_model

            cluster, port = RayCluster(Path(folder)), free_port()
            model = str(save_tiny_model(Path(folder) / "tiny"))
            with ending(cluster.redis()), ending(cluster.head()) as head:
                cluster.wait_for_head()
                with ending(cluster.worker()):
                    cluster.run("deploy", model, str(port))
                    figures = asyncio.run(storm(cluster, head, f"http://127.0.0.1:{port}", options))
    except FairServeError as error:
        print(f"head_death: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": describe_machine(), "figures": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return int(LOST in figures["outcomes"])


if __name__ == "__main__":
    sys.exit(main())
