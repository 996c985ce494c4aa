"""Nothing that comes from outside is unpickled, evaluated or executed by us: no module of ours can."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fairserve.errors import ConfigError
from fairserve.settings import read_settings

PACKAGE = Path(__file__).parents[1] / "fairserve"
MODULES = sorted(PACKAGE.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
LOADERS = {
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader", "FullLoader"},
    "torch": {"load", "save", "package"},
    "np": {"load"},
    "numpy": {"load"},
    "ray": {"cloudpickle"},
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(of what, what) of every attribute that is looked up, and ("", what) of every plain call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "", node.func.id


def wrongs(text: str) -> list[str]:
    tree = ast.parse(text)
    found = [name for name in imported(tree) if set(name.split(".")) & UNPICKLERS]
    found += [what for of, what in called(tree) if not of and what in RUN_TEXT]
    return found + [f"{of}.{what}" for of, what in called(tree) if what in LOADERS.get(of, ())]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert wrongs(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import torch\ntorch.load(path)",
        "import yaml\nyaml.load(text, yaml.UnsafeLoader)",
        "eval(text)",
        "from pickle import loads",
    ],
)
def test_the_rule_would_find_one(text: str) -> None:
    assert wrongs(text)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['echo hi']", "model: !!python/name:os.system", "a: !!python/module:os"],
)
def test_a_settings_file_cannot_make_python_objects(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not YAML"):
        read_settings(path)


def test_the_loaders_that_are_used_cannot_either() -> None:
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.getcwd []")


def test_weights_are_read_without_running_what_they_hold() -> None:
    """A .bin or .pt file is a pickle; transformers reads it with torch's restricted unpickler, and is told so."""
    text = (PACKAGE / "engine" / "loading.py").read_text()
    assert "weights_only=True" in text
    assert "trust_remote_code=config.trust_remote_code" in text
