"""Security, budgets and network: what the manifests promise in their comments."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.conftest import K8S, Rendered
from tests.k8s.test_operator_rules import is_restricted


def all_pods(overlay: Rendered) -> dict[str, dict[str, Any]]:
    """Name -> pod specification and labels, of the Ray pods and of what else runs."""
    pods = {role: {"labels": pod["metadata"]["labels"], "spec": pod["spec"]} for role, pod in overlay.pods.items()}
    for one in overlay.of("StatefulSet"):
        template = one["spec"]["template"]
        pods[one["metadata"]["name"]] = {"labels": template["metadata"]["labels"], "spec": template["spec"]}
    return pods


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    def holds(rule: dict[str, Any]) -> bool:
        if rule["operator"] == "Exists":
            return rule["key"] in labels
        assert rule["operator"] == "In"
        return labels.get(rule["key"]) in rule["values"]

    wanted = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(holds(rule) for rule in selector.get("matchExpressions", []))


def may_reach(overlay: Rendered, source: str, target: str, port: int) -> bool:
    """Whether a pod of ``source`` reaches ``port`` of a pod of ``target``: let out there, and let in here."""
    pods = all_pods(overlay)

    def open_to(side: str, peer_side: str, here: str, peer: str) -> bool:
        for policy in overlay.of("NetworkPolicy"):
            if not matches(policy["spec"]["podSelector"], pods[here]["labels"]):
                continue
            for rule in policy["spec"].get(side, []):
                ports = [entry["port"] for entry in rule.get("ports", [])]
                for one in rule.get(peer_side, [{"podSelector": {}}]):
                    is_peer = "podSelector" in one and "namespaceSelector" not in one
                    if is_peer and matches(one["podSelector"], pods[peer]["labels"]) and (not ports or port in ports):
                        return True
        return False

    return open_to("egress", "to", source, target) and open_to("ingress", "from", target, source)


def test_the_namespace_enforces_restricted_and_every_pod_passes(overlay: Rendered) -> None:
    (namespace,) = overlay.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in all_pods(overlay).items():
        for container in pod["spec"]["containers"]:
            assert is_restricted(pod["spec"]["securityContext"], container["securityContext"]), name
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] >= 10000


def test_every_container_says_what_it_needs_and_what_it_may_take(overlay: Rendered) -> None:
    for pod in all_pods(overlay).values():
        for container in pod["spec"]["containers"]:
            for side in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][side])


def test_our_own_labels_select_the_ray_pods(overlay: Rendered) -> None:
    for role, pod in overlay.pods.items():
        labels = pod["metadata"]["labels"]
        assert (labels["fairserve.dev/service"], labels["fairserve.dev/role"]) == ("fairserve", role)


def test_a_budget_is_an_integer_below_the_least_number_of_pods(overlay: Rendered) -> None:
    for budget in overlay.of("PodDisruptionBudget"):
        spec = budget["spec"]
        assert "maxUnavailable" not in spec
        (role,) = [role for role, pod in overlay.pods.items() if matches(spec["selector"], pod["metadata"]["labels"])]
        assert type(spec["minAvailable"]) is int
        assert 0 < spec["minAvailable"] < overlay.groups[role]["minReplicas"]


def test_production_has_a_budget_for_fronts_and_models(prod: Rendered) -> None:
    assert {budget["metadata"]["name"] for budget in prod.of("PodDisruptionBudget")} == {
        "fairserve-front",
        "fairserve-model",
    }


def test_nothing_is_reachable_unless_a_policy_says_so(overlay: Rendered) -> None:
    policy = overlay.named("NetworkPolicy", "default-deny")["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_ray_pods_reach_one_another(overlay: Rendered) -> None:
    for source in overlay.pods:
        for target in overlay.pods:
            assert may_reach(overlay, source, target, 12345)


def test_only_head_and_fronts_reach_redis_and_only_its_port(prod: Rendered) -> None:
    reaching = {role for role in prod.pods if may_reach(prod, role, "fairserve-redis", 6379)}
    assert reaching == {"head", "front"}
    (rule,) = prod.named("NetworkPolicy", "redis")["spec"]["ingress"]
    let_out = prod.named("NetworkPolicy", "to-redis")["spec"]["podSelector"]
    assert [one["podSelector"] for one in rule["from"]] == [let_out], "let in there exactly who is let out here"
    assert not any(may_reach(prod, role, "fairserve-redis", 22) for role in prod.pods)
    assert not any(may_reach(prod, "fairserve-redis", role, 6379) for role in prod.pods)


def test_the_port_that_runs_any_code_is_open_to_the_operator_alone(overlay: Rendered) -> None:
    openers = [
        policy["metadata"]["name"]
        for policy in overlay.of("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        if any(entry["port"] == 8265 for entry in rule.get("ports", []))
    ]
    assert openers == ["operator"]
    (rule,) = overlay.named("NetworkPolicy", "operator")["spec"]["ingress"]
    (source,) = rule["from"]
    assert set(source) == {"namespaceSelector", "podSelector"}, "both in one entry: the operator's pods, no others"


def test_model_pods_never_see_the_keys(overlay: Rendered) -> None:
    def secrets(role: str) -> set[str]:
        container = overlay.pods[role]["spec"]["containers"][0]
        return {one["secretRef"]["name"] for one in container.get("envFrom", [])}

    assert "fairserve-keys" in secrets("front")
    assert "fairserve-keys" not in secrets("head") | secrets("model")
    required = [
        one["secretRef"]
        for one in overlay.pods["front"]["spec"]["containers"][0]["envFrom"]
        if one["secretRef"]["name"] == "fairserve-keys"
    ]
    assert not required[0].get("optional"), "a forgotten Secret must not open the service"


def test_the_secret_has_the_variables_that_fairserve_reads(overlay: Rendered) -> None:
    from fairserve.api.identity import ENV_KEYS

    assert set(overlay.named("Secret", "fairserve-keys")["data"]) == {ENV_KEYS, "FAIRSERVE_ADMIN_KEYS"}


@pytest.mark.parametrize("example", sorted(K8S.rglob("*.env.example")), ids=lambda path: str(path.relative_to(K8S)))
def test_an_example_of_a_secret_holds_none(example: Any) -> None:
    lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all("REPLACE" in line for line in lines)
    assert "*.env" in (K8S / ".gitignore").read_text().splitlines()


def test_the_head_restarts_without_the_counter_actor(overlay: Rendered) -> None:
    counter = overlay.args["counter"]
    assert (counter["pin_to_head"], counter["resource"]) == (False, "fairserve_front")
    assert "fairserve_front" in overlay.groups["front"]["rayStartParams"]["resources"]
    assert "resources" not in overlay.groups["head"]["rayStartParams"]
    assert overlay.ray_service["spec"]["excludeHeadPodFromServeSvc"] is True
