"""The API's backend: the handle of the model replicas, behind the API's own protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fairserve.cluster.arrivals import Arrivals, Inbox
from fairserve.cluster.continuing import Continuation
from fairserve.cluster.metrics_sink import NO_METRICS, MetricsSink
from fairserve.cluster.multiplex import Message, Own
from fairserve.config import ApiConfig
from fairserve.dispatch.messages import Grant, Standing
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import FairServeError, ReplicaDied, ReplicaFailed, unwrapped
from fairserve.metric_table import RESENT_REQUESTS

logger = logging.getLogger(__name__)


class HandleBackend:
    """Sends requests through a Serve ``DeploymentHandle`` whose router is a FairRouter. ``api`` says what becomes of
    those whose replica dies, and whether outputs may come over trunks (``multiplex.py``)."""

    def __init__(self, handle: Any, api: ApiConfig | None = None, metrics: MetricsSink = NO_METRICS) -> None:
        api = api or ApiConfig()
        self._metrics = metrics
        self._continues = api.retry_on_replica_death
        self._max_deaths = api.max_replica_deaths
        self._stream = handle.options(stream=True, method_name="generate")
        self._trunk = handle.options(stream=True, method_name="trunk")
        self._limits = handle.options(method_name="limits")
        self._name = f"ingress-{uuid.uuid4().hex}" if api.multiplex else None
        self._arrivals = Arrivals(self._open_trunk)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput, None]:
        """See ``fairserve.api.service.Backend``. What a replica gives back unserved, or dies with, is sent again in its
        old place, as far as :class:`Continuation` lets it."""
        first_sent_s = time.time()
        tries = Continuation(request, self._continues, self._max_deaths)
        goes_on = is_first = True
        while goes_on:
            goes_on = False
            told: list[Grant] = []
            response = self._stream.remote(
                tries.request,
                told=told,
                num_returns=tries.num_returns,
                first_sent_s=first_sent_s,
                replaces=tries.replaces,
                ingress=self._name,
            )
            try:
                async with contextlib.aclosing(self._outputs(tries.request.request_id, response)) as outputs:
                    async for output in outputs:
                        if output.finish_reason == "returned":
                            tries.returned()
                            self._metrics.add(RESENT_REQUESTS, reason="returned")
                            goes_on = True
                        elif (seen := tries.took(output)) is not None:
                            if is_first and told and told[-1].standing is not None:
                                seen = replace(seen, standing=Standing(*told[-1].standing))
                            is_first = False
                            yield seen
            except ReplicaDied as error:
                if not tries.died():
                    raise
                logger.warning("request %s is sent to another replica: %s", request.request_id, error)
                is_continued = tries.request.num_generated is not None
                self._metrics.add(RESENT_REQUESTS, reason="continued" if is_continued else "unstarted")
                goes_on = True

    async def _outputs(self, request_id: str, response: Any) -> AsyncGenerator[RequestOutput, None]:
        """Of one try, from its own call and from the trunk."""
        inbox = self._arrivals.open(request_id)
        own = asyncio.create_task(self._read_own(response, inbox))
        finished = False
        try:
            async for output in inbox:
                finished = output.finish_reason is not None
                yield output
            await own  # its end, which says nothing more
        finally:
            self._arrivals.close(request_id)
            own.cancel()
            if not finished and not inbox.has_failed:
                with contextlib.suppress(Exception):  # it failed in this very moment: nothing is left to cancel
                    response.cancel()

    async def _read_own(self, response: Any, inbox: Inbox) -> None:
        try:
            async for item in response:
                inbox.own(item)
                if isinstance(item, Own) and item.no_trunk is not None:
                    self._arrivals.asked(item.no_trunk)
            inbox.end()
        except asyncio.CancelledError:
            inbox.fail(ReplicaFailed("it cancelled the request"))  # unless we did, and nobody reads the inbox any more
            raise
        except Exception as error:
            inbox.fail(_translated(error))

    async def _open_trunk(self, replica: str) -> AsyncGenerator[Message, None]:
        response = self._trunk.remote(self._name, replica=replica)
        is_over = False
        try:
            async for message in response:
                yield message
            is_over = True
        finally:
            if not is_over:
                with contextlib.suppress(Exception):
                    response.cancel()

    async def limits(self) -> Limits:
        """What a replica can hold; waits until one is up."""
        return await self._limits.remote()  # type: ignore[no-any-return]

    async def health(self) -> dict[str, Any]:
        """Ready when a replica answers."""
        await self.limits()
        return {"ready": True}


def _translated(error: Exception) -> Exception:
    """An error of Ray's, of Serve's or of its transport, as one of ours."""
    import grpc
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, FairServeError):
        return unwrapped(error)
    if not isinstance(error, RayError | RayServeException | grpc.RpcError):
        return error
    is_gone = isinstance(error, RayActorError | WorkerCrashedError | NodeDiedError | OutOfMemoryError)
    failed = (ReplicaDied if is_gone else ReplicaFailed)(type(error).__name__)
    failed.__cause__ = error
    return failed
