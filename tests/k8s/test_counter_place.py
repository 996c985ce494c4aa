"""Where the counter actor runs, and where its counters are kept."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from fairserve.cluster.counter_actor import HEAD_NODE_RESOURCE, place_of
from fairserve.cluster.redis_store import ENV_PASSWORD
from fairserve.config import CounterConfig, FairServeArgs
from tests.k8s.conftest import Rendered

HEAD = {HEAD_NODE_RESOURCE: 1.0, "CPU": 8.0}


def test_it_stays_on_the_head_by_default() -> None:
    assert place_of(CounterConfig(), HEAD) == {HEAD_NODE_RESOURCE: 0.001}


def test_it_goes_anywhere_where_there_is_no_head_resource_or_none_is_wanted() -> None:
    assert place_of(CounterConfig(), {"CPU": 8.0}) is None
    assert place_of(CounterConfig(pin_to_head=False), HEAD) is None


@pytest.mark.parametrize("pin_to_head", [True, False])
def test_a_resource_decides_whatever_else_is_said_and_is_waited_for(pin_to_head: bool) -> None:
    config = CounterConfig(resource="fairserve_front", pin_to_head=pin_to_head)
    assert place_of(config, HEAD) == {"fairserve_front": 0.001}


@pytest.mark.parametrize("name", ["", "two words", "9lives", "x" * 64])
def test_a_resource_must_have_a_name_that_ray_takes(name: str) -> None:
    with pytest.raises(ValueError, match="resource"):
        CounterConfig(resource=name)


def test_the_counters_are_kept_in_the_same_redis_as_rays_state_and_in_another_database(prod: Rendered) -> None:
    counter = FairServeArgs.model_validate(prod.args).counter
    ray = prod.cluster["gcsFaultToleranceOptions"]
    assert counter.store is not None
    at = urlsplit(counter.store)
    assert f"{at.hostname}:{at.port}" == ray["redisAddress"] and at.path not in ("", "/", "/0")


def test_the_pods_where_the_counter_actor_runs_know_the_password_and_model_pods_do_not(prod: Rendered) -> None:
    secret = prod.cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    (front,) = prod.pods["front"]["spec"]["containers"]
    assert {"name": ENV_PASSWORD, "valueFrom": secret} in front["env"]
    for container in prod.pods["model"]["spec"]["containers"]:
        assert not any("PASSWORD" in variable["name"] for variable in container.get("env", []))
