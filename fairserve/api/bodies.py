"""Reading a request body that may be too large, never-ending or not JSON at all."""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.requests import Request

from fairserve.api.openai_schema import B, parse
from fairserve.errors import BodyTooLarge, BodyTooSlow, WrongContentType


class Limits(Protocol):
    """How large a body may be, and how long in coming."""

    max_body_bytes: int
    read_timeout_s: float


async def read_body(kind: type[B], request: Request, limits: Limits) -> B:
    """The body of a request as a ``kind``. Call it when the caller is known: strangers get no parsing.

    Raises:
        InvalidRequest: see :func:`parse`.
        Exception: as :func:`read_json`.
    """
    return parse(kind, await read_json(request, limits.max_body_bytes, limits.read_timeout_s))


async def read_json(request: Request, max_bytes: int, limit_s: float) -> bytes:
    """The raw body of a request that says it is JSON.

    The content type is required, not guessed: a web page can make a browser post ``text/plain`` to a service on
    localhost without asking, but not ``application/json``.

    Raises:
        WrongContentType: the body is not declared as uncompressed JSON.
        BodyTooLarge: by its Content-Length, or by counting what arrives.
        BodyTooSlow: it was not there as a whole after ``limit_s`` seconds.
        starlette.requests.ClientDisconnect: the client went away.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise WrongContentType(f"send 'Content-Type: application/json', not {content_type[:64]!r}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise WrongContentType(f"send the body uncompressed, not with 'Content-Encoding: {encoding[:64]}'")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise BodyTooLarge(max_bytes)
    try:
        async with asyncio.timeout(limit_s):
            return await _read(request, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(limit_s) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
    return bytes(body)
