"""The Serve config in each RayService: the file that `serve run` takes, and one that fits the pods it runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fairserve.config import FairServeArgs
from tests.k8s.conftest import BATCHES, INCREMENTAL, K8S, OVERLAYS, Rendered


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_ray_service_holds_the_file_word_for_word(name: str, render: Callable[[str], Rendered]) -> None:
    text = (K8S / "overlays" / name / "serve_config.yaml").read_text()
    assert render(name).ray_service["spec"]["serveConfigV2"] == text
    assert not any(document["metadata"]["name"] == "serve-config" for document in render(name).documents)


def test_serve_and_fairserve_accept_it(overlay: Rendered) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(overlay.serve_config)
    (application,) = overlay.serve_config["applications"]
    assert application["import_path"] == "fairserve.app:build_app"
    FairServeArgs.model_validate(application["args"])
    assert overlay.serve_config["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_it_holds_no_keys(overlay: Rendered) -> None:
    assert "api" not in overlay.args or not overlay.args["api"].get("keys")


def test_each_model_pod_holds_exactly_one_replica(overlay: Rendered) -> None:
    args = FairServeArgs.model_validate(overlay.args)
    limits = overlay.pods["model"]["spec"]["containers"][0]["resources"]["limits"]
    num_gpus = int(limits.get("nvidia.com/gpu", 0))
    fits_cpus = int(limits["cpu"]) // args.num_cpus_per_replica
    fits = min(fits_cpus, num_gpus // args.num_gpus_per_replica) if args.num_gpus_per_replica else fits_cpus
    assert fits == 1
    assert overlay.groups["front"]["rayStartParams"]["num-cpus"] == "0", "else a replica could land there"


def test_there_are_as_many_pods_as_replicas(overlay: Rendered) -> None:
    args = FairServeArgs.model_validate(overlay.args)
    model = overlay.groups["model"]
    assert model["replicas"] == args.num_replicas
    if args.autoscaling is None:
        assert "enableInTreeAutoscaling" not in overlay.cluster
    else:
        assert overlay.cluster["enableInTreeAutoscaling"] is True
        assert model["minReplicas"] <= args.autoscaling.min_replicas
        assert args.autoscaling.max_replicas <= model["maxReplicas"]


def test_every_front_pod_gets_an_ingress_replica_for_a_worker_without_one_never_becomes_ready(
    overlay: Rendered,
) -> None:
    args = FairServeArgs.model_validate(overlay.args)
    front = overlay.groups["front"]
    assert args.num_ingress_replicas == front["replicas"]
    assert front["minReplicas"] == front["maxReplicas"], "the autoscaler must not take the counter actor's next home"
    options = ingress(overlay)
    assert options["ray_actor_options"] == {"num_cpus": 0, "resources": {"fairserve_front": 0.1}}
    if args.num_ingress_replicas > 1:
        assert options["max_replicas_per_node"] == 1


def ingress(overlay: Rendered) -> dict[str, Any]:
    (application,) = overlay.serve_config["applications"]
    (options,) = [one for one in application["deployments"] if one["name"] == "Ingress"]
    return dict(options)


def test_an_old_cluster_outlives_its_longest_answer(overlay: Rendered) -> None:
    longest_s = FairServeArgs.model_validate(overlay.args).drain_s
    assert overlay.ray_service["spec"]["rayClusterDeletionDelaySeconds"] > longest_s


def test_the_incremental_upgrade_changes_nothing_else(render: Callable[[str], Rendered]) -> None:
    with_it, without = render(INCREMENTAL).ray_service["spec"], render("gpu-prod").ray_service["spec"]
    assert with_it | {"upgradeStrategy": None} == without | {"upgradeStrategy": None}


def test_batches_are_kept_on_a_volume_that_all_fronts_share_and_nobody_else_sees(
    render: Callable[[str], Rendered],
) -> None:
    rendered = render(BATCHES)
    (claim,) = [one for one in rendered.of("PersistentVolumeClaim") if one["metadata"]["name"] == "fairserve-batches"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for role, pod in rendered.pods.items():
        claims = [
            one["persistentVolumeClaim"]["claimName"]
            for one in pod["spec"]["volumes"]
            if "persistentVolumeClaim" in one
        ]
        mounts = {one["name"]: one["mountPath"] for one in pod["spec"]["containers"][0]["volumeMounts"]}
        assert (claims, mounts.get("batches")) == (
            (["fairserve-batches"], "/var/lib/fairserve") if role == "front" else ([], None)
        )
