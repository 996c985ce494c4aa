"""The commands that the README and deployments/README.md name, run as a person would, on a Ray of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from fairserve.config import FairServeArgs, key_digest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deployments").glob("*.yaml"))
SERVE = Path(sys.executable).with_name("serve")
START_S = 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_deployment_file_holds_valid_settings_and_is_in_the_table(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(path.read_text())
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        FairServeArgs.model_validate(application["args"])
        assert application["import_path"] == "fairserve.app:build_app"
    assert f"`{path.name}`" in (ROOT / "deployments" / "README.md").read_text()


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command with a Ray directory of its own; ended by Ctrl-C, and its log shown when it fails."""
    with tempfile.TemporaryDirectory(prefix="fs-cmd-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        log = Path(folder) / "log"
        env = os.environ | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)} | environment
        env.pop("RAY_ADDRESS", None)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield process
            process.send_signal(signal.SIGINT)
            process.wait(180)  # Serve lets its replicas finish, on whatever machine
        except BaseException:
            print(log.read_text()[-4000:])
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)


def wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the command ended"
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)  # another process comes up: nothing to wait on but the clock
    raise AssertionError(f"{url} did not come up in {START_S} s")


def complete(url: str, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "hi", "max_tokens": 4}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@pytest.mark.cluster
@pytest.mark.model
def test_serve_run_of_the_local_file_answers_and_ends_at_ctrl_c(tmp_path: Path, free_port: int) -> None:
    config = yaml.safe_load((ROOT / "deployments" / "local-cpu.yaml").read_text())
    config["http_options"]["port"] = free_port
    config["applications"][0]["args"]["counter"]["store"] = str(tmp_path / "counters.sqlite")
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port}"
    with running(str(SERVE), "run", str(path)) as process:
        wait_until_up(url, process)
        answer = complete(url, "smollm2-135m-instruct")
    assert answer.json()["usage"]["completion_tokens"] <= 4
    assert (tmp_path / "counters.sqlite").exists()
    assert process.returncode == 0


@pytest.mark.cluster
def test_serve_deploy_of_a_file_works_on_a_running_cluster(tmp_path: Path, tiny_model: Path, free_port: int) -> None:
    config = yaml.safe_load((ROOT / "deployments" / "local-cpu.yaml").read_text())
    config["http_options"]["port"] = free_port
    args = config["applications"][0]["args"]
    args |= {"model": str(tiny_model), "served_model_name": "tiny", "num_replicas": 1}
    args["engine"]["max_model_len"] = 256
    args["counter"]["store"] = None
    path = tmp_path / "deploy.yaml"
    path.write_text(yaml.safe_dump(config))
    ports = {name: str(unused_port()) for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    options = [f"--{name}={port}" for name, port in ports.items()]
    head = [str(SERVE.with_name("ray")), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
    with running(*head, *options, RAY_AUTH_MODE="disabled") as process:
        deadline = time.monotonic() + START_S
        while True:
            command = [str(SERVE), "deploy", "-a", dashboard, str(path)]
            if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
                break
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.5)  # another process comes up
        url = f"http://127.0.0.1:{free_port}"
        wait_until_up(url, process)
        assert complete(url, "tiny").status_code == 200


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_one_word_settings_of_serve_run_become_their_types() -> None:
    """``serve run fairserve.app:build_app model=NAME num_replicas=3`` hands the builder strings."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from fairserve.app import build_app

    app = call_user_app_builder_with_args_if_necessary(build_app, {"model": "some/model", "num_replicas": "3"})
    assert app._bound_deployment.name == "Ingress"


@pytest.mark.cluster
def test_serve_build_writes_a_file_for_the_default_application(tmp_path: Path) -> None:
    out = tmp_path / "built.yaml"
    with tempfile.TemporaryDirectory(prefix="fs-cmd-", ignore_cleanup_errors=True) as folder:
        env = os.environ | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        subprocess.run([SERVE, "build", "fairserve.app:app", "-o", out], check=True, cwd=ROOT, env=env)
    built = yaml.safe_load(out.read_text())
    deployments = {d["name"]: d for d in built["applications"][0]["deployments"]}
    assert deployments.keys() == {"Model", "Ingress"}
    assert deployments["Model"]["request_router_config"]["request_router_class"].endswith("FairRouter")


def test_clear_keys_never_reach_serves_arguments() -> None:
    from fairserve.app import with_hashed_keys

    api = {
        "keys": [{"client": "ann", "key": "very-secret-key"}],
        "admin_keys": [{"name": "root", "key": "very-secret-admin"}],
    }
    hashed = with_hashed_keys(FairServeArgs.model_validate({"api": api}))
    assert "very-secret" not in hashed.model_dump_json()
    assert hashed.api.admin_keys[0].digest == key_digest("very-secret-admin")


@pytest.mark.parametrize("name", ["keys", "admin_keys"])
def test_a_secret_in_clear_in_what_serve_shows_is_refused_and_not_told(name: str) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from fairserve.app import build_app

    entry = {"client" if name == "keys" else "name": "ann", "key": "very-secret-key"}
    with pytest.raises(ValueError, match=rf"api\.{name}\.0 holds a secret in clear.*key_sha256") as raised:
        call_user_app_builder_with_args_if_necessary(build_app, {"api": {name: [entry]}})
    assert "very-secret" not in str(raised.value) and "very-secret" not in repr(raised.value)
    hashed = {**entry, "key_sha256": key_digest("very-secret-key")}
    del hashed["key"]
    assert call_user_app_builder_with_args_if_necessary(build_app, {"api": {name: [hashed]}})
