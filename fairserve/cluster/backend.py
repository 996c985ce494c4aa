"""The API's backend: the handle of the model replicas, behind the API's own protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import FairServeError, ReplicaFailed


class HandleBackend:
    """Sends requests through a Serve ``DeploymentHandle`` whose router is a FairRouter."""

    def __init__(self, handle: Any) -> None:
        self._stream = handle.options(stream=True, method_name="generate")
        self._limits = handle.options(method_name="limits")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput, None]:
        """See ``fairserve.api.service.Backend``."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

        response = self._stream.remote(request)
        finished = False
        try:
            async for output in response:
                finished = output.finish_reason is not None
                yield output
        except FairServeError:
            finished = True
            raise
        except (RayError, RayServeException, DeploymentUnavailableError) as error:
            finished = True
            raise ReplicaFailed(_reason(error)) from error
        finally:
            if not finished:
                response.cancel()

    async def limits(self) -> Limits:
        """What a replica can hold; waits until one is up."""
        return await self._limits.remote()  # type: ignore[no-any-return]

    async def health(self) -> dict[str, Any]:
        """Ready when a replica answers."""
        await self.limits()
        return {"ready": True}


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, FairServeError) else type(error).__name__
