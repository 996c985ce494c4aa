"""What the README shows is run, or at least exists. A command that nobody tries is a promise that nobody keeps."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [
    line.split("   #")[0].split(" #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
MARKDOWN = [path for path in ROOT.rglob("*.md") if not {".venv", ".git", "out"} & set(path.relative_to(ROOT).parts)]


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"`?make ([a-z]+)", README)) - {"s"}
    assert {"demo", "test", "serve"} <= named
    assert named - {"this", "makes"} <= targets


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_of_ours_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("fairserve ") and "serve --port" not in c])
def test_every_fairserve_command_that_ends_by_itself_works(command: str) -> None:
    words = shlex.split(command)[1:]
    done = subprocess.run([sys.executable, "-m", "fairserve.cli", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_settings_of_the_serve_command_are_valid() -> None:
    from fairserve.settings import read_settings

    (command,) = [c for c in COMMANDS if c.startswith("fairserve serve")]
    assert read_settings(None, [word for word in shlex.split(command) if "=" in word]).engine.max_num_seqs == 8


def test_every_serve_command_names_something_that_exists() -> None:
    import fairserve.app

    commands = [shlex.split(c) for c in COMMANDS if c.startswith("serve ")]
    assert {words[1] for words in commands} == {"run", "build", "deploy"}
    for words in commands:
        if words[2].endswith(".yaml"):
            assert (ROOT / words[2]).exists()
        else:
            assert hasattr(fairserve.app, words[2].removeprefix("fairserve.app:"))


@pytest.fixture
def tiny(serve_app: Callable[..., Any]) -> Any:
    return serve_app("main", num_replicas=2, num_ingress_replicas=2)


def here(text: str, served: Any) -> str:
    """The README's text against the service of this test."""
    return text.replace("http://127.0.0.1:8000", served.url).replace("smollm2-135m-instruct", "tiny")


@pytest.mark.cluster
def test_the_curl_answers(tiny: Any) -> None:
    (command,) = [c for c in COMMANDS if c.startswith("curl ")]
    done = subprocess.run([*shlex.split(here(command, tiny)), "-sf"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '"choices"' in done.stdout


@pytest.mark.cluster
def test_the_openai_example_streams(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for language, block in BLOCKS if language == "python" and "openai" in block]
    exec(compile(here(code, tiny), "README.md", "exec"), {})
    assert capsys.readouterr().out
