"""What fairserve needs of Ray Serve beyond its public API. When one fails: read the router again."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.cluster


def test_ray_is_the_minor_that_the_router_was_written_for() -> None:
    import ray

    assert ray.__version__.startswith("2.60.")


def test_the_router_hook_has_the_signature_that_we_override() -> None:
    from ray.serve.experimental.capacity_queue_router import CapacityQueueRouter
    from ray.serve.request_router import RequestRouter

    from fairserve.cluster.router import FairRouter

    name = "_choose_replica_for_request"
    theirs = inspect.signature(getattr(RequestRouter, name))
    assert list(theirs.parameters) == ["self", "pending_request", "is_retry"]
    assert theirs.parameters.keys() == inspect.signature(getattr(FairRouter, name)).parameters.keys()
    assert name in vars(CapacityQueueRouter), "Ray's own router no longer overrides the same hook"


def test_serve_asks_the_hook_for_every_request_and_sends_to_its_answer() -> None:
    from ray.serve._private.router import AsyncioRouter

    source = inspect.getsource(AsyncioRouter._route_and_send_request_once)
    assert "await self._active_request_router._choose_replica_for_request(" in source, "not in the task that sends"
    assert "replica.try_send_request(pr" in source


def test_serve_tells_its_routers_of_replicas_that_died_and_leaves_out_those_that_it_stops() -> None:
    from ray.serve._private.common import ReplicaState
    from ray.serve._private.deployment_state import DeploymentState
    from ray.serve._private.router import AsyncioRouter
    from ray.serve.request_router import RequestRouter

    assert ".on_replica_actor_died(replica_id)" in inspect.getsource(AsyncioRouter._handle_actor_died_error)
    assert list(inspect.signature(RequestRouter.on_replica_actor_died).parameters) == ["self", "replica_id"]
    assert list(inspect.signature(RequestRouter.update_replicas).parameters) == ["self", "replicas"]
    assert ReplicaState.STOPPING not in DeploymentState._BROADCAST_STATES


def test_the_router_has_the_attributes_that_we_read() -> None:
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

    source = inspect.getsource(RequestRouter.__init__)
    for name in ("_replicas", "_replicas_list"):
        assert f"self.{name}:" in source
    assert isinstance(inspect.getattr_static(RequestRouter, "_replicas_updated_event"), property)
    assert {"args", "kwargs", "created_at"} <= set(PendingRequest.__dataclass_fields__)
    assert "unique_id" in ReplicaID.__dataclass_fields__
