"""The API's backend: the handle of the model replicas, behind the API's own protocol."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Any

from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.errors import FairServeError, ReplicaFailed, unwrapped


class HandleBackend:
    """Sends requests through a Serve ``DeploymentHandle`` whose router is a FairRouter."""

    def __init__(self, handle: Any) -> None:
        self._stream = handle.options(stream=True, method_name="generate")
        self._limits = handle.options(method_name="limits")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestOutput, None]:
        """See ``fairserve.api.service.Backend``. What a replica gives back unserved is sent again, in its old place."""
        first_sent_s = time.time()
        for num_returns in itertools.count():
            response = self._stream.remote(request, num_returns=num_returns, first_sent_s=first_sent_s)
            returned = False
            async with contextlib.aclosing(self._outputs(response)) as outputs:
                async for output in outputs:
                    returned = output.finish_reason == "returned"
                    if not returned:
                        yield output
            if not returned:
                return

    async def _outputs(self, response: Any) -> AsyncGenerator[RequestOutput, None]:
        from ray.exceptions import RayError
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
            finished = True
            raise ReplicaFailed(type(error).__name__) from error
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
