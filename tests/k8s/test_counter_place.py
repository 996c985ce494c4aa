"""Where the counter actor runs, and where its counters are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from fairserve.cluster.counter_actor import HEAD_NODE_RESOURCE, place_of, start_counter_actor
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


class Ray:
    """Just enough of Ray to see from where the actor is created."""

    def __init__(self, offered: dict[str, float]) -> None:
        self.cluster_resources = lambda: offered
        self.created_at: list[Any] = []
        self._place: Any = None

    def remote(self, what: Any) -> Any:
        if isinstance(what, type):
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._create))

        def options(**at: Any) -> Any:
            def call(*arguments: Any) -> Any:
                self._place = at["resources"]
                return what(*arguments)

            return SimpleNamespace(remote=call)

        return SimpleNamespace(options=options)

    def get(self, answer: Any) -> Any:
        return answer

    def _create(self, *_: Any, **__: Any) -> str:
        self.created_at.append(self._place)
        return "actor"

    def get_actor(self, name: str, namespace: str) -> str:
        if not self.created_at:
            raise ValueError(name)
        return "actor"


@pytest.mark.parametrize(
    ("counter", "place"),
    [
        (CounterConfig(), {HEAD_NODE_RESOURCE: 0.001}),
        (CounterConfig(resource="fairserve_front"), {"fairserve_front": 0.001}),
        (CounterConfig(pin_to_head=False), None),
        (CounterConfig(resource="nobody_offers_this"), None),
    ],
)
def test_it_is_created_from_the_node_that_it_is_kept_on_because_ray_restarts_it_from_there(
    counter: CounterConfig, place: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(HEAD | {"fairserve_front": 1.0})
    for name in ("remote", "get", "cluster_resources", "get_actor"):
        monkeypatch.setattr(f"ray.{name}", getattr(ray, name))
    args = FairServeArgs(counter=counter)
    assert [start_counter_actor(args) for _ in range(2)] == ["actor"] * 2
    assert ray.created_at == [place]
