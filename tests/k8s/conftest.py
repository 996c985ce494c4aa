"""The overlays as kubectl renders them, from a copy in which every example of a secret stands in for the secret."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir() if path.is_dir())
INCREMENTAL = "gpu-prod with incremental-upgrade"
BATCHES = "gpu-prod with batches"
RENDERED = [*OVERLAYS, INCREMENTAL, BATCHES]


class Loader(yaml.CSafeLoader):
    """Refuses a key that stands twice in one mapping."""


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), f"a key stands twice: {names}"
    return dict(pairs)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


@dataclass(frozen=True)
class Rendered:
    """What `kubectl apply -k` of one overlay would send."""

    text: str
    documents: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] == kind]

    def named(self, kind: str, name: str) -> dict[str, Any]:
        return next(document for document in self.of(kind) if document["metadata"]["name"] == name)

    @property
    def ray_service(self) -> dict[str, Any]:
        (service,) = self.of("RayService")
        return service

    @property
    def cluster(self) -> dict[str, Any]:
        cluster: dict[str, Any] = self.ray_service["spec"]["rayClusterConfig"]
        return cluster

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Role -> its group in the RayService."""
        return {"head": self.cluster["headGroupSpec"]} | {
            group["groupName"]: group for group in self.cluster["workerGroupSpecs"]
        }

    @property
    def pods(self) -> dict[str, dict[str, Any]]:
        """Role -> a Pod made from the group's template, as the operator makes it less what the operator adds."""
        return {
            role: {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"fairserve-{role}", "namespace": "fairserve", **group["template"]["metadata"]},
                "spec": group["template"]["spec"],
            }
            for role, group in self.groups.items()
        }

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.load(self.ray_service["spec"]["serveConfigV2"], Loader)
        return config

    @property
    def args(self) -> dict[str, Any]:
        (application,) = self.serve_config["applications"]
        args: dict[str, Any] = application["args"]
        return args


@pytest.fixture(scope="session")
def kubectl() -> str:
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not installed: the overlays cannot be rendered")
    return found


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of k8s/ that can be built: with secrets, and with overlays that the repository does not carry."""
    copy = tmp_path_factory.mktemp("manifests") / "k8s"
    shutil.copytree(K8S, copy, ignore=shutil.ignore_patterns("*.env"))
    for example in copy.rglob("*.env.example"):
        shutil.copy(example, example.with_suffix(""))
    for name in (INCREMENTAL, BATCHES):
        overlay = copy / "overlays" / name
        overlay.mkdir()
        base, component = name.split(" with ")
        made = {"resources": [f"../{base}"], "components": [f"../../components/{component}"]}
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(made))
    return copy


@pytest.fixture(scope="session")
def render(kubectl: str, manifests: Path) -> Callable[[str], Rendered]:
    """Name of an overlay -> what it renders to; each is rendered once."""
    known: dict[str, Rendered] = {}

    def rendered(overlay: str) -> Rendered:
        if overlay not in known:
            command = [kubectl, "kustomize", str(manifests / "overlays" / overlay)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            documents = [document for document in yaml.load_all(done.stdout, Loader) if document]
            known[overlay] = Rendered(done.stdout, documents)
        return known[overlay]

    return rendered


@pytest.fixture(params=RENDERED)
def overlay(request: pytest.FixtureRequest, render: Callable[[str], Rendered]) -> Rendered:
    return render(request.param)


@pytest.fixture
def prod(render: Callable[[str], Rendered]) -> Rendered:
    return render("gpu-prod")


@pytest.fixture(scope="session")
def definitions() -> dict[tuple[str, str], dict[str, Any]]:
    """The schemas of the custom resources."""
    from tests.k8s.crd_schema import load_definitions

    folder = Path(os.environ.get("FAIRSERVE_CRDS") or ROOT.parent / "shared" / "crds")
    if not folder.is_dir():
        pytest.skip(f"no custom resource definitions in {folder}: FAIRSERVE_CRDS names their folder")
    return load_definitions(folder)
