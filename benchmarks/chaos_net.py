"""A second Ray node in a network namespace of its own, joined by a cable that can be pulled. Linux, root, iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fairserve.errors import ConfigError

START_S = 120.0


class Cable:
    """Between this machine and the namespace."""

    def __init__(self, near: str) -> None:
        self._near = near

    def pull(self) -> None:
        _ip("link", "set", self._near, "down")

    def plug(self) -> None:
        _ip("link", "set", self._near, "up")


def why_not() -> str | None:
    """Why there can be no namespace here; None when there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (`ip`)"
    name = f"fsp{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` failed: {error.stderr.decode().strip()}"
    return None


@contextlib.contextmanager
def far_node() -> Iterator[tuple[Cable, str]]:
    """A node without CPUs, of the Ray cluster that this process is connected to: the cable to it, and its address.

    Raises:
        ConfigError: it did not join; with the last that it said.
        subprocess.CalledProcessError: the namespace could not be made.
    """
    import ray

    number = os.getpid() % 16_000
    space, near, inside = f"fs{os.getpid()}", f"fsh{os.getpid()}", f"fsn{os.getpid()}"
    net = f"10.213.{number // 64}.{number % 64 * 4}".rsplit(".", 1)
    near_ip, far_ip = f"{net[0]}.{int(net[1]) + 1}", f"{net[0]}.{int(net[1]) + 2}"
    _ip("netns", "add", space)
    node: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryFile() as said:
        try:
            _ip("link", "add", near, "type", "veth", "peer", "name", inside, "netns", space)
            _ip("addr", "add", f"{near_ip}/30", "dev", near)
            _ip("link", "set", near, "up")
            _ip("-n", space, "addr", "add", f"{far_ip}/30", "dev", inside)
            _ip("-n", space, "link", "set", inside, "up")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "route", "add", "default", "via", near_ip)
            address = ray.get_runtime_context().gcs_address
            command = ["ip", "netns", "exec", space, str(Path(sys.executable).with_name("ray")), "start", "--block"]
            command += ["--address", address, "--node-ip-address", far_ip, "--num-cpus", "0"]
            node = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            if not _joins(far_ip, node):
                said.seek(0)
                last = said.read().decode(errors="replace")[-1000:]
                raise ConfigError(f"the second node did not join within {START_S:g} s: {last}")
            yield Cable(near), far_ip
        finally:
            _ip("link", "set", near, "up", check=False)
            if node is not None:
                _end(node)
            _ip("link", "del", near, check=False)
            _ip("netns", "del", space, check=False)


def _joins(address: str, node: subprocess.Popen[bytes]) -> bool:
    import ray

    give_up_s = time.monotonic() + START_S
    while not any(one["Alive"] and one["NodeManagerAddress"] == address for one in ray.nodes()):
        if time.monotonic() > give_up_s or node.poll() is not None:
            return False
        time.sleep(0.2)
    return True


def _end(node: subprocess.Popen[bytes]) -> None:
    if node.poll() is not None:
        return
    os.killpg(node.pid, signal.SIGTERM)
    try:
        node.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)
