"""Reading a request body that may be too large, never-ending or not JSON at all."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from fairserve.errors import BodyTooLarge, BodyTooSlow, WrongContentType


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
