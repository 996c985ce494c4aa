"""Every overlay builds, and every object in it is one that its API accepts."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.conftest import K8S, OVERLAYS, Rendered
from tests.k8s.crd_schema import mistakes

KUBERNETES_VERSION = "1.34"
CUSTOM = {"RayService", "PodMonitor", "PrometheusRule"}


def test_every_yaml_file_passes_yamllint() -> None:
    pytest.importorskip("yamllint")
    files = [str(path) for path in K8S.rglob("*.yaml") if "generated" not in path.parts]
    command = [sys.executable, "-m", "yamllint", "--strict", "--config-file", str(K8S / ".yamllint"), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_kubernetes_accepts_every_object_of_its_own(overlay: Rendered) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    core = [document for document in overlay.documents if document["kind"] not in CUSTOM]
    assert {"Namespace", "NetworkPolicy", "Secret"} <= {document["kind"] for document in core}
    for document in core:
        validate(document, KUBERNETES_VERSION, strict=True)


def test_kubernetes_accepts_the_pods_that_the_ray_service_describes(overlay: Rendered) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for pod in overlay.pods.values():
        validate(pod, KUBERNETES_VERSION, strict=True)
        for container in pod["spec"]["containers"]:
            assert container["image"].startswith("fairserve:0.1.0-")


def test_every_custom_resource_fits_its_definition(
    overlay: Rendered, definitions: dict[tuple[str, str], dict[str, Any]]
) -> None:
    custom = [document for document in overlay.documents if document["kind"] in CUSTOM]
    assert custom
    for document in custom:
        assert mistakes(document, definitions[document["apiVersion"], document["kind"]]) == []


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x", "unknown"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 0, "not of type 'string'"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "groupName"), None, "'groupName' is a required"),
        (("spec", "upgradeStrategy"), "NewCluster", "not of type 'object'"),
    ],
)
def test_the_check_against_a_definition_finds_mistakes(
    prod: Rendered,
    definitions: dict[tuple[str, str], dict[str, Any]],
    path: tuple[str | int, ...],
    value: object,
    expected: str,
) -> None:
    document: Any = copy.deepcopy(prod.ray_service)
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    found = mistakes(document, definitions["ray.io/v1", "RayService"])
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_real_api_server_accepts_the_overlay(name: str, kubectl: str, manifests: Path) -> None:
    kubeconfig = os.environ.get("FAIRSERVE_KUBECONFIG")
    if not kubeconfig:
        pytest.skip("FAIRSERVE_KUBECONFIG names no kubeconfig of a cluster with the custom resources")
    namespace = manifests / "base" / "namespace.yaml"  # a dry run refuses what lies in a namespace that is not there
    for what in (
        ["apply", "--server-side", "-f", str(namespace)],
        ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-k", str(manifests / "overlays" / name)],
    ):
        command = [kubectl, "--kubeconfig", kubeconfig, *what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
