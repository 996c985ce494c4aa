"""fairserve on this machine alone: its own Ray, one HTTP port, and nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fairserve.config import FairServeArgs
from fairserve.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve.schema import LoggingConfig

APP = "fairserve"
MAX_TMPDIR = 25
"""Characters of a temporary directory below which Ray's socket paths stay under the system's 107 bytes."""


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """Ray and Serve's HTTP port. ``dashboard_url`` is Ray's dashboard, None where Ray has none to show."""

    url: str
    dashboard_url: str | None


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def local_cluster(
    args: FairServeArgs, host: str = "127.0.0.1", port: int = 8000, *, dashboard: bool = False, quiet: bool = False
) -> Iterator[LocalCluster]:
    """A Ray of its own, in a temporary directory of its own, with Serve's HTTP port open; 10-20 s on two cores.

    Other Rays on the machine are neither used nor disturbed.

    Raises:
        ConfigError: somebody else listens on the port.
    """
    _port_must_be_free(host, port)
    _safe_environment()
    with _ray_tmpdir():
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions

        context = ray.init(
            address="local",
            num_cpus=_num_cpus(args),
            include_dashboard=dashboard,
            log_to_driver=not quiet,
            logging_level=logging.ERROR,
        )
        try:
            logging.getLogger("ray.serve").setLevel(_logs(quiet).log_level)  # this process's own share
            serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=_logs(quiet))
            shown = "127.0.0.1" if host == "0.0.0.0" else host
            dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else None
            yield LocalCluster(f"http://{shown}:{port}", dashboard_url)
        finally:
            ray.shutdown()  # ends every process of this Ray, Serve's and the counter actor's too


@contextlib.contextmanager
def running_app(args: FairServeArgs, *, quiet: bool = False, wait: bool = True) -> Iterator[None]:
    """fairserve in the Ray that this process is connected to, until the block ends.

    With ``wait`` it is gone by then, and another may follow; without, streams that run may run on until Ray ends.
    """
    from ray import serve

    from fairserve.app import application

    try:
        serve.run(application(args), name=APP, route_prefix="/", logging_config=_logs(quiet))
        yield
    finally:
        serve.delete(APP, _blocking=wait)
        forget_counters(args)


def forget_counters(args: FairServeArgs) -> None:
    """Kill the counter actor, which is detached and outlives the application on purpose; no actor, no effect."""
    import ray

    with contextlib.suppress(ValueError):  # no actor of this name
        ray.kill(ray.get_actor(args.counter.name, namespace=args.counter.namespace), no_restart=True)


@contextlib.contextmanager
def local_service(
    args: FairServeArgs, host: str = "127.0.0.1", port: int = 8000, *, dashboard: bool = False, quiet: bool = False
) -> Iterator[LocalCluster]:
    """Ray and fairserve together, until the block ends.

    Raises:
        ConfigError: somebody else listens on the port.
    """
    with (
        local_cluster(args, host, port, dashboard=dashboard, quiet=quiet) as cluster,
        running_app(args, quiet=quiet, wait=False),
    ):
        yield cluster


def _logs(quiet: bool) -> LoggingConfig:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="ERROR" if quiet else "WARNING", enable_access_log=False)


def _num_cpus(args: FairServeArgs) -> int:
    """Logical CPUs for Ray: what the deployments reserve and one to spare, however few the machine has."""
    reserved: float = args.num_ingress_replicas
    for one in (args, *args.more_models):
        reserved += one.num_replicas * one.engine.tensor_parallel_size * one.num_cpus_per_replica
    return max(os.cpu_count() or 1, math.ceil(reserved) + 1)


def _safe_environment() -> None:
    """Settings that Ray reads when it is imported; the user's own win."""
    # Off, Ray's own processes listen on loopback only, on Linux too; the HTTP port listens where it is told to.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: any other process would starve the model


@contextlib.contextmanager
def _ray_tmpdir() -> Iterator[None]:
    """A fresh RAY_TMPDIR, removed afterwards; one that the user chose is left alone."""
    if os.environ.get("RAY_TMPDIR"):
        Path(os.environ["RAY_TMPDIR"], "ray").mkdir(parents=True, exist_ok=True)
        yield
        return
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="fs-", dir=parent if len(parent) <= MAX_TMPDIR else "/tmp")
    Path(folder, "ray").mkdir()
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]
        shutil.rmtree(folder, ignore_errors=True)


def _port_must_be_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
