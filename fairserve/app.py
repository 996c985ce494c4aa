"""Entry points for Ray Serve: ``fairserve.app:app`` and ``fairserve.app:build_app``.

::

    serve run fairserve.app:app                          # defaults, or the file that FAIRSERVE_CONFIG names
    serve run fairserve.app:build_app model=NAME         # one setting a word; num_replicas=4 and so on
    serve run deployments/local-cpu.yaml                 # a Serve config file with `args`
"""

# No `from __future__ import annotations` here: Serve reads the builder's annotation to validate `args` into it.

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from fairserve.assembly import policy_of
from fairserve.clock import SystemClock
from fairserve.cluster.backend import HandleBackend
from fairserve.cluster.counter_actor import without_keys
from fairserve.cluster.replica import ModelReplica
from fairserve.cluster.router import FairRouter
from fairserve.cluster.shards import bundles
from fairserve.config import AdminKey, ApiKey, FairServeArgs
from fairserve.settings import read_settings

CONFIG_VARIABLE = "FAIRSERVE_CONFIG"
BACKLOG_POLICY = "fairserve.cluster.autoscaling:BacklogPolicy"
MAX_ONGOING = 100_000
"""Requests Serve lets into one process: the limits that count are the dispatcher's and the engine's."""
HEALTH_S = 2.0
"""Between health checks (Serve's default is 10 s): it replaces a replica after three that fail in a row."""
RELEASE_S = 5.0
"""For giving batches back in a planned stop; a folder that hangs must not hold it up."""
QUIET = LoggingConfig(enable_access_log=False)
"""Serve's access log costs a line per request and hop; the proxy's own stays on."""


class Ingress:
    """The HTTP door: tokenizes, names the client, and asks the replicas of the model through its fair router."""

    async def __init__(self, args_json: str, *models: DeploymentHandle) -> None:  # type: ignore[misc]
        from fairserve.api.admin_service import AdminService
        from fairserve.api.batches.service import BatchService
        from fairserve.api.live_keys import LiveKeys
        from fairserve.api.served_model import ServedModel
        from fairserve.api.service import OpenAIService
        from fairserve.cluster.counter_query import CounterQuery
        from fairserve.cluster.metrics_sink import deployment_metrics
        from fairserve.cluster.tracing import make_tracing
        from fairserve.engine.loading import load_tokenizer

        args = FairServeArgs.model_validate_json(args_json)

        async def served(slot: str, handle: DeploymentHandle) -> ServedModel:
            one = args.of_model(slot)
            tokenizer = await asyncio.to_thread(load_tokenizer, one.model, one.engine)
            metrics = deployment_metrics(one.metrics, one.counter.name)
            backend = HandleBackend(handle, one.api, metrics)
            return ServedModel(one, backend, tokenizer, (await backend.limits()).max_model_len, metrics)

        all_served = [served(slot, handle) for slot, handle in zip(args.slots, models, strict=True)]
        self._service = OpenAIService(args, await asyncio.gather(*all_served), tracer=make_tracing(args.tracing))
        self._batches = BatchService(args.batches, self._service) if args.batches.directory else None
        query = CounterQuery.over_ray(args.counter)
        self._live_keys = LiveKeys(self._service.deployed, query.key_directory, self._service.adopt)
        await self._live_keys.begin()
        self._refreshing = asyncio.create_task(self._live_keys.run())
        self._batching = asyncio.create_task(self._batches.keeper.run()) if self._batches else None
        self._admin = AdminService.from_config(args.api, query, SystemClock(), is_open=lambda: self._service.is_open)

    async def __del__(self) -> None:
        """Serve awaits it in a planned stop, when the last HTTP request is answered."""
        batches = getattr(self, "_batches", None)
        if batches is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELEASE_S):
                    await batches.keeper.release()

    def __serve_build_asgi_app__(self) -> Any:
        from fairserve.api.app import create_app
        from fairserve.observe import dashboard

        app = create_app(
            lambda: self._service,
            admin_provider=lambda: self._admin,
            batches_provider=lambda: self._batches,
            id_from_server=True,
        )
        dashboard.install(app)
        return app


def build_model(whole: FairServeArgs, slot: str = "") -> serve.Application:
    """The replicas of one model of the service, which the counter actor grants requests to."""
    args = whole.of_model(slot)
    return serve.deployment(
        ModelReplica,
        name=f"Model-{slot}" if slot else "Model",
        health_check_period_s=HEALTH_S,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": args.num_cpus_per_replica, "num_gpus": args.num_gpus_per_replica},
        logging_config=QUIET,
        request_router_config=RequestRouterConfig(
            request_router_class=FairRouter,
            request_router_kwargs={
                "counter": whole.counter.model_dump(),
                "slot": slot,
                "metrics": args.metrics.model_dump(),
                "tracing": args.tracing.model_dump(),
                "prefix_block_tokens": args.dispatch.prefix_block_tokens if policy_of(args.fairness).window > 1 else 0,
            },
        ),
        **how_many(whole, slot),
        **bundles(args),
    ).bind(without_keys(whole).model_dump_json(), slot)


def how_many(whole: FairServeArgs, slot: str = "") -> dict[str, Any]:
    """The options of a model's deployment that say how many replicas there are."""
    args = whole.of_model(slot)
    config = args.autoscaling
    if config is None:
        return {"num_replicas": args.num_replicas}
    policy_kwargs = {
        "counter": whole.counter.model_dump(),
        "target_use": config.target_use,
        "replicas_per_waiting_batch": config.replicas_per_waiting_batch,
        "slot": slot,
    }
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            initial_replicas=min(max(args.num_replicas, config.min_replicas), config.max_replicas),
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            downscale_to_zero_delay_s=config.downscale_to_zero_delay_s,
            policy=AutoscalingPolicy(policy_function=BACKLOG_POLICY, policy_kwargs=policy_kwargs),
        )
    }


def build_ingress(args: FairServeArgs, *models: serve.Application | DeploymentHandle) -> serve.Application:
    """The HTTP ingress in front of ``models``, in the order of ``args.slots``; several ingresses, also of several
    applications, may share them."""
    return serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=args.num_ingress_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=QUIET,
    ).bind(with_hashed_keys(args).model_dump_json(), *models)


class ServedArgs(FairServeArgs):
    """Arguments that come through Serve's config file or command line, which Serve keeps as they are and shows to
    everybody who reaches its status or Ray's dashboard."""

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        groups: dict[str, Sequence[ApiKey | AdminKey]] = {"keys": self.api.keys, "admin_keys": self.api.admin_keys}
        for name, keys in groups.items():
            for index, key in enumerate(keys):
                if key.key is not None:
                    raise ValueError(
                        f"api.{name}.{index} holds a secret in clear, and Serve shows its arguments: give key_sha256 "
                        "(`fairserve keys hash`), or the keys in api.keys_file or the environment; then make a new key"
                    )
        return self


def build_app(args: ServedArgs) -> serve.Application:
    """The whole application. Serve makes ``args`` from what it was given; Python callers take :func:`application`."""
    return application(args)


def application(args: FairServeArgs) -> serve.Application:
    """The same, for settings that Serve never sees: keys in clear are hashed."""
    return build_ingress(args, *(build_model(args, slot) for slot in args.slots))


def with_hashed_keys(args: FairServeArgs) -> FairServeArgs:
    """The same settings with every clear-text key replaced by its digest: Serve stores and shows arguments."""
    hashed = {
        field: tuple(key.model_copy(update={"key": None, "key_sha256": key.digest}) for key in keys)
        for field, keys in (("keys", args.api.keys), ("admin_keys", args.api.admin_keys))
    }
    return args.model_copy(update={"api": args.api.model_copy(update=hashed)})


def args_from_environment() -> FairServeArgs:
    """The settings in the YAML or JSON file that FAIRSERVE_CONFIG names; the defaults without it.

    Raises:
        ConfigError: the file is unreadable, or a setting in it is wrong.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return read_settings(Path(path).expanduser() if path else None)


app = application(args_from_environment())
