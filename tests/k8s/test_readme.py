"""k8s/README.md names what there is."""

from __future__ import annotations

import re

from tests.k8s.conftest import K8S, OVERLAYS, ROOT, Rendered

README = (K8S / "README.md").read_text()


def test_every_folder_that_a_command_applies_exists() -> None:
    folders = re.findall(r"-k (\S+)", README)
    assert folders
    assert all((ROOT / folder / "kustomization.yaml").is_file() for folder in folders)


def test_every_overlay_and_component_is_listed() -> None:
    for name in [*OVERLAYS, *(path.name for path in (K8S / "components").iterdir())]:
        assert re.search(rf"[`\s]{re.escape(name)}[`\s]", README), name


def test_the_services_and_secrets_in_its_commands_are_those_of_the_manifests(prod: Rendered) -> None:
    name = prod.ray_service["metadata"]["name"]
    assert set(re.findall(r"(?<!ray)service/([a-z-]+)", README)) == {f"{name}-serve-svc", f"{name}-head-svc"}
    assert "rayservice/fairserve" in README


def test_the_operator_is_pinned_and_lives_where_the_network_policies_look_for_it() -> None:
    text = (K8S / "operator" / "kustomization.yaml").read_text()
    assert "?ref=v1.7.0" in text
    assert "namespace: kuberay-system" in text
    assert "KubeRay 1.7.0" in README


def test_no_line_is_longer_than_120_characters_outside_tables() -> None:
    assert [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")] == []
