"""One line of a batch, through the same service as an HTTP request: the same checks, the same fair queue."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace

from starlette.datastructures import Headers

from fairserve.api import streaming
from fairserve.api.batches.lines import ENDPOINTS, Answered, Line
from fairserve.api.generating import making
from fairserve.api.http_errors import describe
from fairserve.api.identity import Client
from fairserve.api.openai_schema import parse
from fairserve.api.service import OpenAIService
from fairserve.config import BATCH_MARK
from fairserve.errors import CounterUnreachable, InvalidRequest, Refused, ReplicaFailed, unwrapped

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 512
"""Lines of all batches that wait or run in one ingress process at a time; the batches take turns for more."""
MAX_FAILURES = 5
"""Replicas that may fail under one line."""
MAX_WAIT_S = 60.0
"""Between two tries, whatever a refusal says."""


def batch_client(owner: Client, weight: float) -> Client:
    """As whom an owner's batches run: beside the owner, and with so much of its weight.

    Beside and not below it: ``ann/batch`` would make ``ann`` a group next to the client ``ann``, with a share of its
    own that no weight of a batch could lower, and no client may stand above another. A sibling is compared with the
    owner wherever the owner stands: ``acme/ann+batch`` takes from what ``acme`` has. No key, no gateway and no caller
    of an open service can name it, because a segment of a name holds no +.
    """
    return replace(owner, name=owner.name + BATCH_MARK, weight=owner.weight * weight, service_tiers=(), has_users=False)


class Asking:
    """Asks until there is an answer. 429 is waited out: whoever asks has time. What a replica dies with is sent again.

    Args:
        service: checks, tokenizes and generates.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        service: OpenAIService,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._service = service
        self._pause = pause
        self._turns = asyncio.Semaphore(max_in_flight)

    async def __call__(self, endpoint: str, line: Line, client: Client) -> Answered:
        """The answer, which may be an error. Raises nothing but CancelledError."""
        request_id = f"req_{secrets.token_hex(16)}"
        num_failures = 0
        while True:
            try:
                async with self._turns:
                    return Answered(200, request_id, await self._once(endpoint, line, client))
            except Exception as error:
                cause = unwrapped(error)
                num_failures += isinstance(cause, ReplicaFailed)
                if (wait_s := _wait_s(cause, num_failures)) is None:
                    problem = describe(cause, request_id)
                    return Answered(problem.status, request_id, json.dumps(problem.body()).encode())
            await self._pause(min(wait_s, MAX_WAIT_S))

    async def _once(self, endpoint: str, line: Line, client: Client) -> bytes:
        service = self._service
        body = parse(ENDPOINTS[endpoint], line.body)
        if body.stream:
            raise InvalidRequest("stream: a batch has no streams, leave it out", param="stream")
        made = await making(service, body, client, Headers())
        # No deadline of its own: it may wait for as long as its batch's window is open.
        response = await streaming.whole(made.answer, made.outputs, made.meter.watching(nullcontext()), made.headers)
        return bytes(response.body)


def _wait_s(error: Exception, num_failures: int) -> float | None:
    """Seconds until the next try, None where another would end like this one."""
    if isinstance(error, Refused):
        return error.retry_after_s
    if isinstance(error, CounterUnreachable):
        return 1.0
    if isinstance(error, ReplicaFailed) and num_failures < MAX_FAILURES:
        return float(2 ** (num_failures - 1))
    return None
