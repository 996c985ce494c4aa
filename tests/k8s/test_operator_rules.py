"""What KubeRay refuses, or silently gets wrong, and no schema says: it shows as an event, minutes after apply."""

from __future__ import annotations

import json
import re
import shlex

from tests.k8s.conftest import ROOT, Rendered

MAX_NAME = 47
"""KubeRay adds a suffix for every cluster of the service, and names of services are limited."""


def test_the_service_has_a_name_that_the_operator_can_lengthen(overlay: Rendered) -> None:
    name = overlay.ray_service["metadata"]["name"]
    assert len(name) <= MAX_NAME
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_the_ray_version_is_the_one_in_the_image(overlay: Rendered) -> None:
    assert f"ray=={overlay.cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_every_group_has_bounds_with_its_replicas_between_them(overlay: Rendered) -> None:
    for group in overlay.cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_ray_start_parameters_are_strings_and_are_not_set_twice(overlay: Rendered) -> None:
    for group in overlay.groups.values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert not group.get("resources"), "KubeRay refuses `resources` beside rayStartParams"
        assert "labels" not in group["rayStartParams"]


def test_the_custom_resource_of_the_fronts_reads_alike_in_bash_and_in_the_autoscaler(overlay: Rendered) -> None:
    value = overlay.groups["front"]["rayStartParams"]["resources"]
    (word,) = shlex.split(value)
    assert json.loads(word) == {"fairserve_front": 1}
    assert json.loads(value[1:-1].replace("\\", "")) == {"fairserve_front": 1}


def test_no_pod_has_a_restart_policy_which_autoscaler_version_2_refuses(overlay: Rendered) -> None:
    assert not any("restartPolicy" in pod["spec"] for pod in overlay.pods.values())


def test_an_autoscaling_head_has_a_token_for_the_api_server_and_a_sidecar_that_restricted_admits(
    overlay: Rendered,
) -> None:
    head = overlay.pods["head"]["spec"]
    if not overlay.cluster.get("enableInTreeAutoscaling"):
        assert head["automountServiceAccountToken"] is False
        assert "autoscalerOptions" not in overlay.cluster
        return
    assert "automountServiceAccountToken" not in head
    options = overlay.cluster["autoscalerOptions"]
    assert options["version"] == "v2"
    assert is_restricted(head["securityContext"], options["securityContext"])
    assert not any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in head["containers"][0].get("env", []))


def test_an_incremental_upgrade_comes_with_an_autoscaler_and_sane_steps(overlay: Rendered) -> None:
    strategy = overlay.ray_service["spec"]["upgradeStrategy"]
    if strategy["type"] == "NewCluster":
        return
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert overlay.cluster["enableInTreeAutoscaling"] is True
    options = strategy["clusterUpgradeOptions"]
    assert options["gatewayClassName"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0


def test_fault_tolerance_is_set_in_one_place_only(overlay: Rendered) -> None:
    head = overlay.groups["head"]
    names = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", [])}
    assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
    assert not {"redis-password", "redis-username"} & set(head["rayStartParams"])
    annotations = overlay.ray_service["metadata"]["annotations"]
    assert not any("ft-enabled" in name or "external-storage" in name for name in annotations)


def test_ray_asks_for_a_token_with_a_name_that_every_cluster_of_the_service_shares(overlay: Rendered) -> None:
    assert overlay.cluster["authOptions"] == {"mode": "token", "secretName": "fairserve-ray-token"}
    assert set(overlay.named("Secret", "fairserve-ray-token")["data"]) == {"auth_token"}


def test_no_alpha_feature_is_used(overlay: Rendered) -> None:
    assert not {"networkPolicy", "tlsOptions", "historyServerOptions"} & set(overlay.cluster)
    assert "backend" not in overlay.cluster.get("gcsFaultToleranceOptions", {})


def test_ports_have_the_names_that_the_operator_and_prometheus_look_for(overlay: Rendered) -> None:
    expected = {
        "head": {"gcs-server": 6379, "dashboard": 8265, "serve": 8000, "metrics": 8080, "as-metrics": 44217},
        "front": {"serve": 8000, "metrics": 8080},
        "model": {"serve": 8000, "metrics": 8080},
    }
    for role, pod in overlay.pods.items():
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert all(len(name) <= 15 for name in ports)
        assert expected[role].items() <= ports.items()


def test_probes_are_left_to_the_operator(overlay: Rendered) -> None:
    for pod in overlay.pods.values():
        for container in pod["spec"]["containers"]:
            assert not {"readinessProbe", "livenessProbe", "startupProbe"} & set(container)


def is_restricted(pod: dict[str, object], container: dict[str, object]) -> bool:
    """Whether PodSecurity's level "restricted" admits a container with these two security contexts."""
    both = pod | container
    return (
        both.get("runAsNonRoot") is True
        and both.get("seccompProfile") == {"type": "RuntimeDefault"}
        and container.get("allowPrivilegeEscalation") is False
        and container.get("capabilities") == {"drop": ["ALL"]}
    )
