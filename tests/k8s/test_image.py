"""The image: linted, pinned, and with what KubeRay needs in it. It is not built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.k8s.conftest import K8S, ROOT, Rendered

DOCKERFILE = K8S / "Dockerfile"


def tool(name: str) -> str:
    """The path of a command, beside this Python or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint_finds_nothing() -> None:
    command = [tool("hadolint"), "--config", str(K8S / ".hadolint.yaml"), str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_checkov_finds_nothing(prod: Rendered, tmp_path: Path) -> None:
    checkov = tool("checkov")  # not in the dev extra: it brings 100 packages
    pods = [*prod.pods.values(), *prod.of("StatefulSet"), *prod.of("Service")]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    for framework, file in (("dockerfile", DOCKERFILE), ("kubernetes", tmp_path / "pods.yaml")):
        command = [checkov, "--config-file", str(K8S / ".checkov.yaml"), "--framework", framework, "-f", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout
        assert "Passed checks" in done.stdout


def test_it_runs_as_the_user_of_the_pods_by_number(overlay: Rendered) -> None:
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    for pod in overlay.pods.values():
        context = pod["spec"]["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_it_has_what_the_operator_starts_and_probes_ray_with() -> None:
    assert re.search(r"install .*bash=\S+ wget=\S+", DOCKERFILE.read_text())


def test_everything_in_it_is_pinned_and_no_registry_is_named() -> None:
    text = DOCKERFILE.read_text()
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(images) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image) for image in images)
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


def test_what_it_copies_is_what_dockerignore_lets_through() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    names = {word for line in copied for word in line.split()}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == let_through
    assert all((ROOT / name).exists() for name in names)
