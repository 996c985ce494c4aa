"""`fairserve serve`, started as a person starts it: it answers OpenAI's client, stops when told, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from fairserve import local


def processes_that_mention(text: str) -> list[str]:
    """Command lines of running processes that contain ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [command for command in found if text in command]


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A temporary directory with a short name: Ray puts sockets below it, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.cluster
@pytest.mark.model
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_serve_answers_and_ctrl_c_leaves_nothing_behind(embedded_model: Path, tmp: Path, free_port: int) -> None:
    settings = ["num_replicas=1", "engine.max_num_seqs=2", "engine.max_model_len=256", "engine.kv_cache_tokens=512"]
    command = [sys.executable, "-m", "fairserve.cli", "serve", "--port", str(free_port), *settings]
    environment = {**os.environ, "TMPDIR": str(tmp)}
    environment.pop("RAY_TMPDIR", None)  # of the Ray that other tests share
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as one:
        assert one.stdout is not None
        printed = []
        for line in one.stdout:
            printed.append(line)
            if "Ctrl-C stops it" in line:
                break
        assert one.poll() is None, "".join(printed)
        assert processes_that_mention(str(tmp))

        with openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="demo-key") as client:
            chat = [{"role": "user", "content": "What is the capital of France?"}]
            answer = client.chat.completions.create(
                model="smollm2-135m-instruct", messages=chat, max_tokens=12, temperature=0
            )
        one.send_signal(signal.SIGINT)
        one.stdout.read()
    assert "Paris" in str(answer.choices[0].message.content)
    assert one.returncode == 0
    assert processes_that_mention(str(tmp)) == []
    assert list(tmp.glob("fs-*")) == []  # what else lies there is torch's


def test_a_long_temporary_path_is_not_used_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 10)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with local._ray_tmpdir():
        folder = Path(os.environ["RAY_TMPDIR"])
        assert (folder / "ray").is_dir()
        assert len(str(folder)) < local.MAX_TMPDIR + 12
    assert not folder.exists()
    assert "RAY_TMPDIR" not in os.environ


def test_a_temporary_directory_that_the_user_chose_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "mine"))
    with local._ray_tmpdir():
        pass
    assert (tmp_path / "mine" / "ray").is_dir()


def test_rays_own_processes_are_told_to_listen_on_loopback_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.setenv(variable, "1")  # put back afterwards, whatever the function does
    local._safe_environment()
    assert os.environ[variable] == "1"
    monkeypatch.delenv(variable)
    local._safe_environment()
    assert os.environ[variable] == "0"
