"""FairRouter: Ray Serve's door to the counter actor, in the ingress's handle.

Serve pickles this module by value, so it stays thin: everything shared is imported inside methods. It overrides
``_choose_replica_for_request``, the same private hook as Ray's own ``serve/experimental/capacity_queue_router.py``;
``tests/cluster/test_ray_contract.py`` tells when Ray moves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

REPLICA_WAIT_S = 1.0
"""How long a grant waits for its replica to become known here (it may be just starting)."""


class FairRouter(RequestRouter):
    """Waits for a grant, then sends the request to the granted replica; without the counter actor, to the less loaded
    of two random replicas, whose local queue is fair by itself.

    ``request_router_kwargs``: ``counter``, a ``CounterConfig`` as a dict; ``slot``, of the model; ``metrics``, a
    ``MetricsConfig`` as a dict; ``tracing``, a ``TracingConfig`` as one; ``prefix_block_tokens``, 0 where the policy
    does not look at prefixes.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        from fairserve.clock import SystemClock
        from fairserve.cluster.counter_actor import find_counter_actor
        from fairserve.cluster.counter_client import RayTransport, RouterClient
        from fairserve.cluster.metrics_sink import deployment_metrics
        from fairserve.cluster.tracing import make_tracing
        from fairserve.config import CounterConfig, MetricsConfig, TracingConfig
        from fairserve.dispatch.router_book import RouterBook

        config = CounterConfig.model_validate(kwargs["counter"])
        slot: str = kwargs.get("slot", "")
        self._prefix_block_tokens: int = kwargs.get("prefix_block_tokens", 0)
        self._client = RouterClient(
            RouterBook(f"router-{uuid.uuid4().hex}", time.time_ns()),
            RayTransport(lambda: find_counter_actor(config), slot=slot),
            config,
            SystemClock(),
            deployment_metrics(MetricsConfig.model_validate(kwargs.get("metrics", {})), config.of_slot(slot).name),
        )
        self._tracer = make_tracing(TracingConfig.model_validate(kwargs.get("tracing", {})))
        self._random = random.Random()
        self._by_name: dict[str, ReplicaID] = {}
        """Every replica there ever was, so that one that is gone is not waited for."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news. A replica that Serve stops leaves this list while it still finishes what it runs."""
        before = set(self._replicas)
        super().update_replicas(replicas)
        self._by_name |= {replica_id.unique_id: replica_id for replica_id in self._replicas}
        for replica_id in before - set(self._replicas):
            self._client.replica_draining(replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve's news, told for every request that the replica had."""
        if replica_id in self._replicas:
            self._client.replica_gone(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        from dataclasses import replace

        from fairserve.cluster.counter_client import traced_acquire
        from fairserve.dispatch.messages import Submit
        from fairserve.engine.request import GenerateRequest

        if (addressee := pending_request.kwargs.get("replica")) is not None:
            return await self._addressed(addressee)
        await self._wait_for_any_replica()
        request = pending_request.args[0] if pending_request.args else None
        if not isinstance(request, GenerateRequest):
            return self._less_loaded()
        submit = Submit(
            request.request_id,
            request.client,
            request.num_input,
            request.sampling.max_tokens,
            request.weight,
            request.max_waiting,
            application=request.application,
            interaction=request.interaction,
            call_index=request.call_index,
            prefix=self._prefix(request),
            budgets=request.budgets,
        )
        arrived_s = pending_request.kwargs.get("first_sent_s", pending_request.created_at)
        replaces = pending_request.kwargs.get("replaces")
        if replaces and not is_retry:
            self._client.forget(replaces)
        if is_retry or replaces:  # its place is kept
            was_accepted = self._client.was_accepted(replaces or request.request_id)
            submit = replace(submit, is_retry=was_accepted, waited_s=time.time() - arrived_s)
        # For the backend, which is in this process, and not for the replica.
        told = vars(pending_request).setdefault("fairserve_told", pending_request.kwargs.pop("told", None))
        void = vars(pending_request).pop("fairserve_grant", None)
        if void is not None:  # Serve could not hand it to that replica
            self._client.decline(void)
        while True:
            grant = await traced_acquire(self._tracer, request.trace, self._client, submit)
            if grant is None:
                await self._wait_for_any_replica()
                pending_request.kwargs["waited_s"] = None
                return self._less_loaded()
            try:
                replica = await self._find(grant.replica)
            except asyncio.CancelledError:
                self._client.decline(grant, is_unreachable=False)
                raise
            if replica is not None:
                pending_request.fairserve_grant = grant
                self._give_back_if_cancelled(grant)
                pending_request.kwargs["waited_s"] = grant.waited_s
                if told is not None:
                    told.append(grant)
                return replica
            self._client.decline(grant)
            submit = replace(submit, is_retry=True, waited_s=time.time() - arrived_s)

    def _give_back_if_cancelled(self, grant: Any) -> None:
        """Serve's task that asks for a replica also sends the request there. If its caller leaves in between, no
        replica ever confirms the grant, and nobody else would miss it before ``lease_s``."""

        def ended(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                self._client.decline(grant, is_unreachable=False)

        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(ended)

    def _prefix(self, request: Any) -> tuple[int, ...]:
        from fairserve.dispatch.prefixes import prefix_hashes

        if not self._prefix_block_tokens:
            return ()
        return prefix_hashes(request.client, request.prompt_token_ids, self._prefix_block_tokens, request.adapter)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Only reached by Serve's ``choose_replica()``; requests come through ``_choose_replica_for_request``."""
        return [[self._less_loaded()]]

    async def _find(self, name: str) -> RunningReplica | None:
        """The replica, waited for when it is unknown as yet; None for one that left, or that does not come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPLICA_WAIT_S):
                while name not in self._by_name:
                    await self._wait_for_update()
        replica_id = self._by_name.get(name)
        return None if replica_id is None else self._replicas.get(replica_id)

    async def _addressed(self, name: str) -> RunningReplica:
        """The replica that a call names.

        Raises:
            ReplicaFailed: Serve has stopped it, or it never came.
        """
        from fairserve.errors import ReplicaFailed

        replica = await self._find(name)
        if replica is None:
            raise ReplicaFailed(f"replica {name} takes no more calls")
        return replica

    def _less_loaded(self) -> RunningReplica:
        two = self._random.sample(self._replicas_list, min(2, len(self._replicas_list)))
        return min(two, key=lambda replica: self.replica_queue_len_cache.get(replica.replica_id) or 0)

    async def _wait_for_any_replica(self) -> None:
        while not self._replicas:
            await self._wait_for_update()

    async def _wait_for_update(self) -> None:
        self._replicas_updated_event.clear()
        await self._replicas_updated_event.wait()
