"""A real Prometheus for tests, and a page of metrics made from the table.

The program is ``FAIRSERVE_PROMETHEUS``, or `prometheus` on the PATH; Debian has it in the package `prometheus`.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from fairserve.metric_table import OTHER, Metric

PROGRAM = os.environ.get("FAIRSERVE_PROMETHEUS") or shutil.which("prometheus")
WHY_NOT = "no Prometheus: FAIRSERVE_PROMETHEUS names none, and there is none on the PATH"


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def values(self, expr: str) -> list[float]:
        """Of every series that ``expr`` gives now, NaN left out."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", answer
        found = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [value for value in found if not math.isnan(value)]

    def without_data(self, expressions: Iterable[str]) -> list[str]:
        return [expr for expr in expressions if not self.values(expr)]


def wait_until(holds: Callable[[], bool], limit_s: float) -> bool:
    """Whether it held within ``limit_s``; asks twice a second."""
    deadline_s = time.monotonic() + limit_s
    while not (held := holds()) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    return held


@contextmanager
def prometheus(folder: Path, targets: Iterable[str], interval_s: int = 1) -> Iterator[Prometheus]:
    """Scrapes ``targets`` (host:port) every ``interval_s``; its data lies in ``folder``."""
    assert PROGRAM is not None, WHY_NOT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    every = f"{interval_s}s"
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": list(targets)}]}],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    words = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([PROGRAM, *words], stdout=log, stderr=log)
        try:
            served = Prometheus(f"http://{address}")
            assert wait_until(lambda: _is_ready(served.url), 30), (folder / "prometheus.log").read_text()
            yield served
        finally:
            process.terminate()
            process.wait(timeout=30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


# -- a page made from the table ---------------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, ...]] = {
    "client": ("alice", "bob", OTHER),
    "state": ("live", "stale", "draining"),
    "kind": ("input", "output"),
    "reason": ("timeout", "client_queue_full"),
    "outcome": ("ok", "refused"),
    "source": ("scratch",),
    "replica": ("replica-1", "replica-2"),
    "counters": ("counters",),
}
"""Of every label; others get one of their own name."""


def page(metrics: Iterable[Metric], age: int) -> str:
    """Every series of ``metrics`` in Prometheus's words; counters have grown ``age`` times."""
    lines = []
    for metric in metrics:
        for values in itertools.product(*(VALUES.get(label, (label,)) for label in metric.all_labels)):
            labels = ",".join(f'{name}="{value}"' for name, value in zip(metric.all_labels, values, strict=True))
            lines.extend(_samples(metric, labels, age))
    return "\n".join(lines) + "\n"


def _samples(metric: Metric, labels: str, age: int) -> Iterator[str]:
    if metric.kind != "histogram":
        yield f"{metric.prometheus}{{{labels}}} {age if metric.kind == 'counter' else 1}"
        return
    for index, boundary in enumerate((*map(str, metric.boundaries), "+Inf")):
        yield f'{metric.prometheus}_bucket{{{labels},le="{boundary}"}} {age * (index + 1)}'
    yield f"{metric.prometheus}_sum{{{labels}}} {age}"
    yield f"{metric.prometheus}_count{{{labels}}} {age * (len(metric.boundaries) + 1)}"


@contextmanager
def exporting(metrics: Iterable[Metric]) -> Iterator[str]:
    """A page of ``metrics`` that grows at every look; host:port."""
    rows, looks = tuple(metrics), itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = page(rows, next(looks)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
