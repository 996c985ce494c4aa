"""What all tests share. A test that does not say ``cluster`` cannot start Ray."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from fairserve.clock import VirtualClock

# Read by Ray and by huggingface_hub when they are imported, so set before any test module is.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_worker_niceness", "0")

# A background job of a shell ignores Ctrl-C, and would hand that on to the commands that tests start and end so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast a loaded machine is must not decide a test.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _no_ray_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ray.init`` raises in every test without the ``cluster`` mark; ray itself is not imported for it."""
    if request.node.get_closest_marker("cluster") is not None or (ray := sys.modules.get("ray")) is None:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a unit test tried to start Ray: mark it with @pytest.mark.cluster, or take Ray out")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray for all ``cluster`` tests, in a temporary directory of its own; starting one takes 10-20 s."""
    import ray
    from ray import serve

    # Unix socket paths may have 107 bytes, so not below pytest's own long temporary path.
    with tempfile.TemporaryDirectory(prefix="fs-ray-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = folder
        try:
            yield ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
        finally:
            serve.shutdown()
            ray.shutdown()
            os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of the embedded model; for tests with the ``model`` mark."""
    from fairserve.engine.embedded import ensure_embedded

    return ensure_embedded()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
