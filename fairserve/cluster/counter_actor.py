"""The counter actor: :class:`~fairserve.cluster.counter_service.CounterService` as a named, detached, restartable Ray
actor."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.keeper import ClusterMemory, id_memory, live_memory, ray_session_folder
from fairserve.cluster.metrics_sink import actor_metrics
from fairserve.config import ApiConfig, CounterConfig, FairServeArgs

logger = logging.getLogger(__name__)

MAX_CONCURRENCY = 10_000
"""Calls the actor may hold at once: two per router and one per replica. Ray's default of 1,000 deadlocks when it is
reached, because a report then waits behind the polls that wait for it."""
HEAD_NODE_RESOURCE = "node:__internal_head__"


def end_this_actor() -> None:
    """End the actor this runs in, for good: no restart."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def was_this_actor_restarted() -> bool:
    import ray

    try:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
    except Exception:
        logger.exception("Ray does not tell whether this actor was restarted")
        return False


def place_of(config: CounterConfig, offered: Mapping[str, float]) -> dict[str, float] | None:
    """The custom resources that keep the actor on its node; ``offered`` is what the cluster has by now."""
    if config.resource is not None:
        return {config.resource: 0.001}
    if config.pin_to_head and HEAD_NODE_RESOURCE in offered:
        return {HEAD_NODE_RESOURCE: 0.001}
    return None


def start_counter_actor(args: FairServeArgs) -> Any:
    """The handle of the counter actor of these settings; creates it when it is not there. Blocks on Ray.

    It is created from the node that it is kept on. To restart an actor, Ray asks the node of its *creator* for a worker
    first: created by a replica of another node, it would not come back as long as that one is cut off.
    """
    import ray

    config = args.counter
    with contextlib.suppress(ValueError):
        return find_counter_actor(config)
    offered = ray.cluster_resources()
    place = place_of(config, offered)
    if place is None:
        return _create(args, None)
    if not place.keys() <= offered.keys():
        logger.warning("no node offers %r (counter.resource) yet: the counter actor waits for one", config.resource)
        return _create(args, place)
    at_place = {"num_cpus": 0, "resources": place, "scheduling_strategy": "DEFAULT"}
    ray.get(ray.remote(_create).options(**at_place).remote(args, place))
    return find_counter_actor(config)


def _create(args: FairServeArgs, place: dict[str, float] | None) -> Any:
    """Plain, named and detached, restarted for ever, its calls never retried by Ray (a retry would run twice); Serve's
    ``deployment_actors`` would restart it empty on every roll-out."""
    import ray

    config = args.counter
    return (
        ray.remote(CounterService)
        .options(
            name=config.name,
            namespace=config.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENCY,
            num_cpus=0,
            resources=place,
            scheduling_strategy="DEFAULT",  # not in the placement group of the replica that happens to start it
        )
        .remote(
            without_keys(args).model_dump_json(),
            on_idle=end_this_actor,
            memory=ClusterMemory(),
            live_memory=live_memory(config),
            id_memory=id_memory(config),
            session_folder=ray_session_folder,
            metrics=partial(actor_metrics, args.metrics),
            was_restarted=was_this_actor_restarted,
        )
    )


def without_keys(args: FairServeArgs) -> FairServeArgs:
    """The same settings without the API section, which holds secrets: only the ingress needs it."""
    return args.model_copy(update={"api": ApiConfig()})


def find_counter_actor(config: CounterConfig) -> Any:
    """The handle of the running counter actor.

    Raises:
        ValueError: there is none of that name.
    """
    import ray

    return ray.get_actor(config.name, namespace=config.namespace)
