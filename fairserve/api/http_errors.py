"""Every failure as an OpenAI error object, with the right status and headers, and no internals.

::

    400 InvalidRequest, PromptTooLong      408 BodyTooSlow           500 ModelFailed; what is unexpected (logged)
    401 Unauthenticated                    413 BodyTooLarge          503 ReplicaFailed, CounterUnreachable,
    403 AdminKeyRequired                   415 WrongContentType          ChangeNotKept
    404 UnknownModel, UnknownClient,       429 Refused                   StorageFailed
        UnknownKey, UnknownFile,           431 HeadersTooLarge       504 RequestTimeout
        UnknownBatch, UnknownResponse,
        BatchesOff, no such route
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairserve.api.answer_headers import MONTH_S, of_refusal
from fairserve.errors import (
    AdminKeyRequired,
    BatchesOff,
    BodyTooLarge,
    BodyTooSlow,
    BudgetSpent,
    ChangeNotKept,
    CounterUnreachable,
    FairServeError,
    HeadersTooLarge,
    ModelFailed,
    Refused,
    ReplicaFailed,
    RequestError,
    RequestTimeout,
    StorageFailed,
    Unauthenticated,
    UnknownBatch,
    UnknownClient,
    UnknownFile,
    UnknownKey,
    UnknownModel,
    UnknownResponse,
    WrongContentType,
    unwrapped,
)

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{8,128}")
MAX_FIELDS = 100
"""Header fields of one request."""
MAX_FIELD_BYTES = 32_768
"""Bytes of their names and values together. Ray Serve's proxy has no limit of its own."""
REPLICA_RETRY_S = 1
"""Retry-After when a replica failed: the others go on, so a retry may come at once."""
MAX_RETRY_S = 3600
COUNTER_RETRY_S = 1
"""Retry-After when the counter actor does not answer: a restart takes about a second."""
STORAGE_RETRY_S = 10
"""Retry-After when files cannot be read or written: a full disk or a lost share."""
_REQUEST_ERRORS = {
    Unauthenticated: 401,
    AdminKeyRequired: 403,
    UnknownModel: 404,
    UnknownClient: 404,
    UnknownKey: 404,
    UnknownFile: 404,
    UnknownBatch: 404,
    UnknownResponse: 404,
    BatchesOff: 404,
    BodyTooSlow: 408,
    BodyTooLarge: 413,
    WrongContentType: 415,
    HeadersTooLarge: 431,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One failure as the caller sees it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] | None = None
    """Refusals only: the limit and its numbers."""

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error if self.details is None else error | {"details": self.details}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def describe(error: Exception, request_id: str) -> Problem:
    """What to tell the caller; logs what the caller is not told."""
    error = unwrapped(error)
    match error:
        case RequestError():
            status = _REQUEST_ERRORS.get(type(error), 400)
            headers = {"www-authenticate": "Bearer"} if status == 401 else {}
            return Problem(status, str(error), "invalid_request_error", error.param, error.code, headers)
        case Refused():
            is_quota = isinstance(error, BudgetSpent)
            wait_s = _whole_seconds(error.retry_after_s, MONTH_S if is_quota else MAX_RETRY_S)
            details = error.fields | {"retry_after_s": wait_s}
            wait = {"retry-after": str(wait_s)} | of_refusal(error)
            kind = error.reason if is_quota else "rate_limit_error"  # as OpenAI writes its own
            return Problem(429, str(error), kind, None, error.reason, wait, details)
        case RequestTimeout():
            return Problem(504, str(error), "timeout_error", None, "request_timeout")
        case ReplicaFailed():
            logger.warning("request %s: %s", request_id, error)
            message = f"the replica that served this request failed: try again (request {request_id})"
            wait = {"retry-after": str(REPLICA_RETRY_S)}
            return Problem(503, message, "server_error", None, "replica_failed", wait)
        case ModelFailed():
            logger.warning("request %s: %s", request_id, error)
            message = (
                "the model failed on this request and on no other: it raised an error, or its output was no number; "
                f"sent again unchanged it will most likely fail again (request {request_id})"
            )
            return Problem(500, message, "server_error", None, "model_error", {"x-should-retry": "false"})
        case CounterUnreachable():
            wait = {"retry-after": str(COUNTER_RETRY_S)}
            return Problem(503, str(error), "server_error", None, "counter_unreachable", wait)
        case StorageFailed():
            logger.error("request %s: %s", request_id, error)
            wait = {"retry-after": str(STORAGE_RETRY_S)}
            return Problem(503, str(error), "server_error", None, "storage_failed", wait)
        case ChangeNotKept():
            wait = {"retry-after": str(COUNTER_RETRY_S)}
            return Problem(503, str(error), "server_error", None, "change_not_kept", wait)
        case HTTPException():
            return _of_route(error)
    logger.error("request %s failed", request_id, exc_info=error)
    return Problem(500, f"internal error (request {request_id})", "server_error", None, "internal_error")


def _whole_seconds(wait_s: float, most_s: float) -> int:
    """Retry-After takes whole seconds; too late is polite, too early is a wasted request."""
    return max(1, math.ceil(min(wait_s, most_s))) if wait_s > 0 else 1


def _of_route(error: HTTPException) -> Problem:
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = {404: "no such route; see /v1/models, /v1/chat/completions, /v1/completions, /v1/responses, /health"}.get(
        error.status_code, HTTPStatus(error.status_code).phrase
    )
    return Problem(error.status_code, message, "invalid_request_error", None, code, dict(error.headers or {}))


def request_id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


class Guard:
    """Outermost ASGI layer: an id for every request, and an answer to every exception.

    The id is ours, unguessable, and goes out as ``x-request-id``; with ``id_from_server`` it is the one that the HTTP
    server put into the request and will itself send back (Ray Serve's proxy), so that caller and logs know one id.
    """

    def __init__(self, app: ASGIApp, id_from_server: bool = False) -> None:
        self.app = app
        self._id_from_server = id_from_server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "") if self._id_from_server else ""
        request_id = given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not self._id_from_server:
                    header = (REQUEST_ID_HEADER.encode(), request_id.encode())
                    message["headers"] = [*message.get("headers", []), header]
            await send(message)

        try:
            _check_size(scope["headers"])
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("request %s: the client went away", request_id)
        except Exception as error:
            problem = describe(error, request_id)
            if not started:
                await problem.response()(scope, receive, send_with_id)


def _check_size(fields: Sequence[tuple[bytes, bytes]]) -> None:
    num_bytes = sum(len(name) + len(value) for name, value in fields)
    if len(fields) > MAX_FIELDS or num_bytes > MAX_FIELD_BYTES:
        raise HeadersTooLarge(len(fields), num_bytes, MAX_FIELDS, MAX_FIELD_BYTES)


def install(app: FastAPI, *, id_from_server: bool) -> None:
    """Make ``app`` answer every failure in this shape; ``id_from_server`` as in :class:`Guard`."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return describe(error, request_id_of(request)).response()

    app.add_exception_handler(FairServeError, answer)
    app.add_exception_handler(HTTPException, answer)
    app.add_middleware(Guard, id_from_server=id_from_server)
