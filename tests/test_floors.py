"""Imports point down only, and the floors that decide are plain code. Each rule is also shown to find a violation."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HANDED_IN = {"asyncio", "time", "datetime", "random", "secrets", "uuid"}
"""What comes in through the door: clock, chance, ids and the event loop."""
MAY_IMPORT = {
    "fairness": {"fairserve.errors", "fairserve.clock", "fairserve.fairness"},
    "dispatch": {"fairserve.errors", "fairserve.clock", "fairserve.fairness", "fairserve.dispatch"},
}
ENGINE = ["engine", "engine.request", "engine.hooks", "engine.events", "engine.embedded"]
TORCH_FREE = ["config", "errors", "settings", "cli", "local", *ENGINE]


def imported(source: str) -> Iterator[str]:
    """The dotted name of every module that ``source`` imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (f"fairserve.{alias.name}" for alias in node.names) if module == "fairserve" else (module,)


def violations(floor: str, source: str) -> list[str]:
    """The imports of ``source`` that its floor forbids."""

    def is_allowed(name: str) -> bool:
        top = name.split(".")[0]
        if top == "fairserve":
            return any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_IMPORT[floor])
        return top in sys.stdlib_module_names and top not in HANDED_IN

    return [name for name in imported(source) if not is_allowed(name)]


FILES = [(floor, path) for floor in MAY_IMPORT for path in sorted((ROOT / "fairserve" / floor).rglob("*.py"))]


@pytest.mark.parametrize(("floor", "path"), FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES])
def test_the_floors_that_decide_import_only_the_standard_library(floor: str, path: Path) -> None:
    assert violations(floor, path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import asyncio",
        "import os, time",
        "from random import Random",
        "import numpy as np",
        "from fairserve import config",
        "from fairserve.engine.request import GenerateRequest",
        "def later():\n    from datetime import datetime",
    ],
)
def test_a_planted_import_is_found(line: str) -> None:
    assert len(violations("dispatch", line)) == 1


def test_fairness_may_not_look_up_to_dispatch() -> None:
    line = "from fairserve.dispatch.ledger import Ledger"
    assert (violations("fairness", line), violations("dispatch", line)) == (["fairserve.dispatch.ledger"], [])


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package that lies in ``folder``, by the contracts in pyproject.toml."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package, to plant a violation in."""
    shutil.copytree(ROOT / "fairserve", tmp_path / "fairserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fairness/__init__.py", "from fairserve.dispatch import messages"),
        ("fairness/__init__.py", "import time"),
        ("dispatch/__init__.py", "import random"),
        ("engine/request.py", "import torch"),
        ("engine/__init__.py", "from fairserve.cluster import __name__ as up"),
        ("config.py", "from fairserve.engine import request"),
    ],
)
def test_a_planted_violation_breaks_a_contract(house: Path, file: str, line: str) -> None:
    planted = house / "fairserve" / file
    planted.write_text(planted.read_text() + "\n" + line + "\n")
    done = lint_imports(house)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize("name", TORCH_FREE)
def test_these_modules_start_without_torch(name: str) -> None:
    if not list((ROOT / "fairserve").glob(name.replace(".", "/") + "*")):
        pytest.skip(f"fairserve.{name} does not exist yet")
    code = f"import sys, fairserve.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
