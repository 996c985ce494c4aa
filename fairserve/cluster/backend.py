"""The API's backend: the handle of the model replicas, behind the API's own protocol."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fairserve.cluster.continuing import Continuation
from fairserve.config import ApiConfig
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import FairServeError, ReplicaDied, ReplicaFailed, unwrapped

logger = logging.getLogger(__name__)


class HandleBackend:
    """Sends requests through a Serve ``DeploymentHandle`` whose router is a FairRouter. ``api`` says what becomes of
    those whose replica dies."""

    def __init__(self, handle: Any, api: ApiConfig | None = None) -> None:
        api = api or ApiConfig()
        self._continues = api.retry_on_replica_death
        self._max_deaths = api.max_replica_deaths
        self._stream = handle.options(stream=True, method_name="generate")
        self._limits = handle.options(method_name="limits")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput, None]:
        """See ``fairserve.api.service.Backend``. What a replica gives back unserved, or dies with, is sent again in its
        old place, as far as :class:`Continuation` lets it."""
        first_sent_s = time.time()
        tries = Continuation(request, self._continues, self._max_deaths)
        goes_on = True
        while goes_on:
            goes_on = False
            response = self._stream.remote(
                tries.request, num_returns=tries.num_returns, first_sent_s=first_sent_s, replaces=tries.replaces
            )
            try:
                async with contextlib.aclosing(self._outputs(response)) as outputs:
                    async for output in outputs:
                        if output.finish_reason == "returned":
                            tries.returned()
                            goes_on = True
                        elif (seen := tries.took(output)) is not None:
                            yield seen
            except ReplicaDied as error:
                if not tries.died():
                    raise
                logger.warning("request %s is sent to another replica: %s", request.request_id, error)
                goes_on = True

    async def _outputs(self, response: Any) -> AsyncGenerator[RequestOutput, None]:
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError
        from ray.serve.exceptions import RayServeException

        finished = False
        try:
            async for output in response:
                finished = output.finish_reason is not None
                yield output
        except FairServeError as error:
            finished = True
            raise unwrapped(error) from None
        except (RayError, RayServeException) as error:
            if not finished:  # else it had said its last word
                finished = True
                is_gone = isinstance(error, RayActorError | WorkerCrashedError | NodeDiedError | OutOfMemoryError)
                raise (ReplicaDied if is_gone else ReplicaFailed)(type(error).__name__) from error
        finally:
            if not finished:
                with contextlib.suppress(Exception):  # it failed in this very moment: nothing is left to cancel
                    response.cancel()

    async def limits(self) -> Limits:
        """What a replica can hold; waits until one is up."""
        return await self._limits.remote()  # type: ignore[no-any-return]

    async def health(self) -> dict[str, Any]:
        """Ready when a replica answers."""
        await self.limits()
        return {"ready": True}
