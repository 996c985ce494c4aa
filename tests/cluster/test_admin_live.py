"""One live service, looked at and changed through every door: the HTTP API, Python, and the command over Ray."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

import fairserve
from fairserve import cli
from fairserve.errors import CounterUnreachable, Unauthenticated
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

ADMIN, ALICE = "admin-secret-of-ops", "alice-secret"
API = {"admin_keys": [{"name": "ops", "key": ADMIN}], "keys": [{"client": "alice", "key": ALICE, "weight": 2.0}]}


@pytest.fixture(scope="module")
def served(serve_app: Callable[..., Served]) -> Served:
    served = serve_app("admin", num_replicas=1, api=API)
    assert complete(served, ALICE).status_code == 200  # now the actor knows alice
    return served


def complete(served: Served, key: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=120)


def until(check: Callable[[], bool], wait_s: float = 30.0) -> None:
    """Look again and again; each look takes a call."""
    end_s = time.monotonic() + wait_s
    while not check():
        assert time.monotonic() < end_s, "it did not come to be in time"
        time.sleep(0.05)


def command(served: Served, *words: str, code: int = 0) -> str:
    """Run ``fairserve`` in a process of its own, over Ray."""
    where = ["--address", ray.get_runtime_context().gcs_address, "--name", served.args.counter.name]
    line = [sys.executable, "-m", "fairserve.cli", *words, *where, "--timeout", "20"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_every_door_tells_the_same(served: Served) -> None:
    by_command = json.loads(command(served, "clients", "show", "alice", "--json"))
    with (
        fairserve.connect(served.url, admin_key=ADMIN) as by_http,
        fairserve.connect(name=served.args.counter.name) as by_ray,
    ):
        found = [view.client("alice").model_dump() for view in (by_http, by_ray)] + [by_command]
        for one in found:
            assert (one["name"], one["weight"], one["num_output"]) == ("alice", 2, 4)
        for door in (by_http, by_ray):
            view = door.overview()
            assert (view.model, len(view.replicas), view.policy) == ("tiny", 1, "vtc")
            assert door.epoch() > 0 and set(door.leases()) == {view.replicas[0].name}
            assert door.history("alice").clients["alice"].service
    assert ray.is_initialized(), "a connection that found Ray connected leaves it so"


def test_the_command_draws_the_service(served: Served) -> None:
    text = command(served, "top", "--once")
    assert "alice" in text and "tokens/s" in text and "live" in text


def test_the_description_knows_where_it_is_mounted(served: Served) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    description = httpx.get(f"{served.url}/admin/v1/openapi.json", headers=headers, timeout=30).json()
    assert description["servers"] == [{"url": f"/{served.name}/admin/v1"}]
    assert httpx.get(f"{served.url}/admin/v1/overview", timeout=30).status_code == 401


def test_a_clients_key_does_not_open_the_admin_api(served: Served) -> None:
    with fairserve.connect(served.url, admin_key=ALICE) as service, pytest.raises(Unauthenticated):
        service.overview()


def test_a_change_by_one_door_shows_by_the_others_and_survives_the_actors_death(served: Served) -> None:
    with fairserve.connect(served.url, admin_key=ADMIN) as service:
        assert json.loads(command(served, "clients", "set-weight", "alice", "5", "--json"))["weight"] == 5
        until(lambda: service.client("alice").weight == 5)
        service.set_limits("alice", requests_per_min=1000)
        who = [entry.who for entry in service.audit()[:2]]
        assert who[0] == "ops" and who[1].startswith("cli:")
        epoch = service.epoch()
        ray.kill(served.counter_actor(), no_restart=False)

        def is_back() -> bool:
            try:
                return service.epoch() != epoch
            except CounterUnreachable:
                return False

        until(is_back)
        until(lambda: service.client("alice").weight == 5)
        assert service.client("alice").requests_per_min == 1000
        assert len(service.audit()) >= 2


def test_a_live_key_opens_the_service_until_it_is_revoked(served: Served) -> None:
    made = json.loads(command(served, "keys", "create", "bob", "--weight", "3", "--json"))
    until(lambda: complete(served, made["secret"]).status_code == 200)
    with fairserve.connect(served.url, admin_key=ADMIN) as service:
        assert service.client("bob").weight == 3
        listed = {(key.client, key.source) for key in tuple(service.keys())}
        assert listed == {("alice", "deployed"), ("bob", "live")}
        service.revoke_key(made["key"]["id"])
    until(lambda: complete(served, made["secret"]).status_code == 401)


def test_a_setting_changed_live_is_in_force(served: Served) -> None:
    with fairserve.connect(served.url, admin_key=ADMIN) as service:
        (setting,) = service.set_settings({"fairness.policy": "fcfs"})
        assert (setting.value, setting.deployed) == ("fcfs", "vtc")
        until(lambda: service.overview().policy == "fcfs")
        service.set_settings({"fairness.policy": None})
        until(lambda: service.overview().policy == "vtc")
    assert complete(served, ALICE).status_code == 200


README = (Path(__file__).parents[2] / "README.md").read_text()
(CONSOLE,) = re.findall(r"^```console\n(.*?)^```", README, flags=re.M | re.S)
(EXAMPLE,) = [code for code in re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S) if "connect(" in code]
SHOWN = [line.split("   #")[0].strip() for line in CONSOLE.splitlines() if line.startswith(("fairserve ", "curl "))]


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_of_the_readme_works(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.setenv("FAIRSERVE_URL", served.url)
    monkeypatch.setenv("FAIRSERVE_ADMIN_KEY", ADMIN)
    if line.startswith("curl "):
        done = subprocess.run(["bash", "-c", f"{line} -sf"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and json.loads(done.stdout), done.stderr
    else:
        assert cli.main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out


def test_the_python_of_the_readme_works(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLE.replace("http://127.0.0.1:8000", served.url).replace("a-long-secret", ADMIN)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "alice" in out and "bound" in out


def test_without_a_counter_actor_the_command_says_so_in_one_line(served: Served) -> None:
    address: Any = ray.get_runtime_context().gcs_address
    line = [sys.executable, "-m", "fairserve.cli", "replicas", "--address", address, "--name", "nobody"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "no counter actor 'nobody'" in done.stderr
