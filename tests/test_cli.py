"""The command line: what it prints, what it refuses, and its exit codes (0 done, 1 failed, 2 wrong command)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fairserve.local
from fairserve import cli
from fairserve.config import ApiKey, FairServeArgs
from fairserve.errors import ConfigError, ModelError
from fairserve.local import LocalCluster
from fairserve.settings import documented_yaml, read_settings

Capture = pytest.CaptureFixture[str]


def test_the_printed_configuration_is_the_default_one() -> None:
    assert FairServeArgs.model_validate(yaml.safe_load(documented_yaml())) == FairServeArgs()


def test_every_printed_setting_stands_under_its_documentation() -> None:
    lines = documented_yaml().splitlines()
    for before, line in itertools.pairwise(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("# "), line


def test_the_schema_names_every_setting(capsys: Capture) -> None:
    assert cli.main(["config", "--schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(FairServeArgs.model_fields)


def test_a_good_file_is_called_valid(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "good.yaml"
    file.write_text("num_replicas: 3\nfairness: {policy: fcfs}\n")
    assert cli.main(["config", str(file)]) == 0
    assert "is valid: 3 replicas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_replica: 3", "did you mean 'num_replicas'?"),
        ("engine: {max_num_seqs: 0}", "engine.max_num_seqs: Input should be greater than 0"),
        (
            "fairness: {policy: best}",
            "fairness.policy: Input should be "
            "'vtc', 'wsc', 'drr', 'dlpm', 'd2lpm', 'lcf', 'fcfs', 'rpm' or 'round_robin'",
        ),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "is not YAML"),
        ("applications: []", "0 fairserve applications"),
    ],
)
def test_a_wrong_file_gives_one_line_that_names_the_setting(
    tmp_path: Path, capsys: Capture, text: str, message: str
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert cli.main(["config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_is_said_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["config", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_settings_of_a_serve_config_file_are_its_args(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    application = {"name": "a", "import_path": "fairserve.app:build_app", "args": {"num_replicas": 4}}
    file.write_text(yaml.safe_dump({"applications": [{"import_path": "other:app"}, application]}))
    assert read_settings(file).num_replicas == 4


def test_words_are_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("engine: {max_num_seqs: 4, block_size: 8}\n")
    args = read_settings(file, ["engine.max_num_seqs=9", "engine.max_model_len=null", "model=some/model"])
    assert (args.engine.max_num_seqs, args.engine.block_size, args.model) == (9, 8, "some/model")


@pytest.mark.parametrize("word", ["num_replicas", "=3", "model.name=x", "engine.max_num_seqs=many"])
def test_a_word_that_is_not_a_setting_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        read_settings(None, ["model=x", word])


def test_a_hashed_secret_is_its_sha256(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("correct horse\n"))
    assert cli.main(["keys", "hash"]) == 0
    assert capsys.readouterr().out.strip() == hashlib.sha256(b"correct horse").hexdigest()


def test_a_short_secret_is_refused_without_printing_it(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    assert cli.main(["keys", "hash"]) == 2
    assert "short" not in "".join(capsys.readouterr())


def test_a_new_key_prints_an_entry_for_the_file_and_the_secret_elsewhere(capsys: Capture) -> None:
    assert cli.main(["keys", "new", "alice", "--weight", "4"]) == 0
    captured = capsys.readouterr()
    secret = captured.err.split()[-1]
    (entry,) = yaml.safe_load(captured.out)
    assert secret not in captured.out
    assert ApiKey.model_validate(entry).weight == 4
    assert entry["key_sha256"] == hashlib.sha256(secret.encode()).hexdigest()


def test_a_new_key_may_be_for_a_client_in_a_team(capsys: Capture) -> None:
    assert cli.main(["keys", "new", "acme/research/ann"]) == 0
    (entry,) = yaml.safe_load(capsys.readouterr().out)
    assert ApiKey.model_validate(entry).client == "acme/research/ann"


@pytest.mark.parametrize(
    "words",
    [["two words"], ["a/b/c/d"], ["acme//ann"], ["acme/"], ["bob", "--weight", "-1"], ["bob", "--weight", "nan"]],
)
def test_a_wrong_client_or_weight_makes_no_key(words: list[str], capsys: Capture) -> None:
    assert cli.main(["keys", "new", *words]) == 2
    assert capsys.readouterr().out == ""


def test_pulling_prints_the_folder_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(cli, "ensure_embedded", lambda name, **_: Path("/models") / name)
    assert cli.main(["models", "pull"]) == 0
    assert capsys.readouterr().out == "/models/smollm2-135m-instruct\n"


def test_a_model_that_cannot_be_had_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(name: str, **_: Any) -> Path:
        raise ModelError(name, "no network")

    monkeypatch.setattr(cli, "ensure_embedded", fail)
    assert cli.main(["models", "pull", "x"]) == 1
    assert capsys.readouterr().err == "fairserve: model 'x': no network\n"


def test_the_list_says_what_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FAIRSERVE_CACHE", str(tmp_path))
    assert cli.main(["models", "list"]) == 0
    assert "not fetched yet" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nope"], ["serve", "--port", "high"], ["keys"]])
def test_a_wrong_command_exits_2_with_one_line(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for Ray: notes what is started and stopped, and ends the command as `kill` would."""
    notes: list[str] = []

    @contextlib.contextmanager
    def fake(args: FairServeArgs, host: str, port: int, **_: Any) -> Iterator[LocalCluster]:
        notes.append(f"start {args.model} on {host}:{port}")
        yield LocalCluster(f"http://{host}:{port}", None)
        notes.append("stop")

    monkeypatch.setattr(fairserve.local, "local_service", fake)
    monkeypatch.setattr(signal, "pause", lambda: os.kill(os.getpid(), signal.SIGTERM))
    return notes


def test_serve_prints_a_ready_curl_and_stops_when_told(started: list[str], capsys: Capture) -> None:
    assert cli.main(["serve", "--port", "8123", "model=a/tiny", "num_replicas=1"]) == 0
    assert started == ["start a/tiny on 127.0.0.1:8123", "stop"]
    printed = capsys.readouterr().out
    assert "curl http://127.0.0.1:8123/v1/chat/completions" in printed
    assert "OPEN" in printed


def test_serve_with_a_wrong_setting_starts_nothing(started: list[str], capsys: Capture) -> None:
    assert cli.main(["serve", "num_replica=1"]) == 2
    assert started == []
    assert "did you mean 'num_replicas'?" in capsys.readouterr().err


def test_with_keys_the_curl_shows_none_of_them_and_nothing_says_open() -> None:
    keys = ({"client": "alice", "key": "alice-secret"},)
    text = cli.welcome(FairServeArgs.model_validate({"api": {"keys": keys}}), "http://h:1", None)
    assert "Bearer $FAIRSERVE_KEY" in text and "alice-secret" not in text
    assert "OPEN" not in text


def test_with_keys_in_the_environment_nothing_says_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRSERVE_API_KEYS", '[{"client": "ann", "key": "ann-secret"}]')
    text = cli.welcome(FairServeArgs(), "http://h:1", None)
    assert "Bearer $FAIRSERVE_KEY" in text
    assert "OPEN" not in text


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on"):
            fairserve.local._port_must_be_free("127.0.0.1", taken.getsockname()[1])


def test_the_command_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fairserve.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("fairserve ")
