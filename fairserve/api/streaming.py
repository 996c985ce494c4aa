"""Sending an answer: as server-sent events or whole, watched for a caller who leaves.

Nothing is sent before the first output is there, so that a refusal is a proper 429. After the first byte the status
is out, and a failure becomes an event of its own, followed by ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fairserve.api.answer_headers import AnswerHeaders
from fairserve.api.answers import Answer
from fairserve.api.http_errors import Problem, describe
from fairserve.api.merging import Batch
from fairserve.engine.request import RequestOutput, joined

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
MARK = "\0text\0"
"""Stands for a token's text. Nothing else in an event can hold it: NUL is in no name."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Batches = AsyncGenerator[Batch, None]
Deadline = AbstractAsyncContextManager[Any]
"""Raises RequestTimeout inside its block when the time is over."""


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""What JSON may hold as it is and `str.splitlines` breaks lines at: so do clients that read events by lines of text,
such as httpx's ``aiter_lines``, although the standard names CR and LF alone."""


def _to_json(data: Any) -> str:
    text = _encode(data)
    return text if text.isascii() else text.translate(LINE_BREAKS)


def event(data: Any) -> bytes:
    return f"data: {_to_json(data)}\n\n".encode()


class Framing(Protocol):
    """What a stream consists of."""

    def of(self, batch: Batch) -> bytes:
        """Of outputs that are ready together; empty when there is nothing to say."""
        ...

    def end(self, last: Batch) -> bytes:
        """After them all; ``last`` holds each choice's last output."""
        ...

    def failed(self, problem: Problem) -> bytes:
        """After an error instead."""
        ...


class Whole(Protocol):
    def whole(self, outputs: Mapping[int, RequestOutput]) -> dict[str, Any]:
        """The complete answer; ``outputs`` holds everything that was generated, by choice."""
        ...


class Events:
    """The outputs of one answer as events. All but the text of a plain token's event is made once for each choice."""

    def __init__(self, answer: Answer, include_usage: bool = False) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._frames: dict[int, tuple[str, str]] = {}
        """Of each choice that has begun: what stands before and after the text."""

    def of(self, batch: Batch) -> bytes:
        return b"".join([self.of_choice(index, output) for index, output in batch.items()])

    def end(self, last: Batch) -> bytes:
        return (event(self._answer.usage_chunk(last)) if self._include_usage else b"") + DONE

    def failed(self, problem: Problem) -> bytes:
        return event(problem.body()) + DONE

    def of_choice(self, index: int, output: RequestOutput) -> bytes:
        """Empty when there is nothing to say."""
        if output.finish_reason is not None and output.text and not self._answer.has_plain_text:
            # As at OpenAI, calls never come with their finish reason: the openai package would not end the last one.
            made, ending = replace(output, finish_reason=None), replace(output, text="", token_ids=(), logprobs=())
            return self.of_choice(index, made) + self.of_choice(index, ending)
        counts = self._answer.usage_in_chunks
        is_plain = self._answer.has_plain_text and not (output.logprobs or output.finish_reason or counts)
        if is_plain and (frame := self._frames.get(index)) is not None:
            return f"{frame[0]}{_to_json(output.text)}{frame[1]}".encode() if output.text else b""
        chunk = self._answer.chunk(index, output)
        if counts and chunk is not None:
            chunk["usage"] = self._answer.usage({index: output})
        if is_plain and chunk is not None:
            marked = self._answer.chunk(index, replace(output, text=MARK))  # no longer the first of its choice
            before, mark, after = f"data: {_to_json(marked)}\n\n".partition(_to_json(MARK))
            if mark:
                self._frames[index] = before, after
        return b"" if chunk is None else event(chunk)


async def whole(answer: Whole, batches: Batches, deadline: Deadline, headers: AnswerHeaders) -> JSONResponse:
    """Everything in one JSON body.

    Raises:
        Exception: whatever ended ``batches``, or RequestTimeout.
    """
    parts: dict[int, list[RequestOutput]] = {}
    async with deadline, aclosing(batches):
        async for batch in batches:
            headers.saw(batch)
            for index, output in batch.items():
                parts.setdefault(index, []).append(output)
    outputs = {index: joined(some) for index, some in parts.items()}
    return JSONResponse(answer.whole(outputs), headers=headers.whole(outputs))


async def stream(
    events: Framing,
    batches: Batches,
    deadline: Deadline,
    headers: AnswerHeaders,
    *,
    request_id: str,
    keep_alive_s: float | None,
    send: Send,
) -> None:
    """Send events as outputs come; everything that is ready at the same time goes out in one write.

    Raises:
        Exception: whatever ended ``batches``, if nothing was sent yet.
    """
    last: dict[int, RequestOutput] = {}
    pulse: Pulse | None = None
    try:
        async with deadline, aclosing(batches):
            async for batch in batches:
                if pulse is None:
                    headers.saw(batch)
                    await send(_start(headers.first(batch)))
                    pulse = Pulse(send, keep_alive_s)
                last |= batch
                if data := events.of(batch):
                    await pulse.send(data)
    except ClientDisconnect:
        raise
    except Exception as error:
        if pulse is None:
            raise
        end = events.failed(describe(error, request_id))
    else:
        end = events.end(last)
    finally:
        if pulse is not None:
            await pulse.stop()
    await send(_body(end, more=False))


class Pulse:
    """Sends a stream's events, and comments where it is silent."""

    def __init__(self, send: Send, every_s: float | None) -> None:
        self._send = send
        self._is_silent = True
        self._beating = None if every_s is None else asyncio.create_task(self._beat(every_s))

    async def send(self, data: bytes) -> None:
        self._is_silent = False
        await self._send(_body(data))

    async def stop(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            if self._is_silent:
                with suppress(ClientDisconnect):  # whoever reads the caller's side ends the stream
                    await self._send(_body(COMMENT))
            self._is_silent = True


def _start(more: dict[str, str]) -> Message:
    headers = Response(headers=STREAM_HEADERS | more, media_type="text/event-stream").raw_headers
    return {"type": "http.response.start", "status": 200, "headers": [h for h in headers if h[0] != b"content-length"]}


def _body(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class WatchedResponse(Response):
    """A response made by ``respond``, which is cancelled as soon as the caller goes away."""

    def __init__(self, respond: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_leave(message: Message) -> None:
            try:
                await send(message)
            except OSError as error:  # how ASGI servers say that the connection is gone
                raise ClientDisconnect() from error

        work = asyncio.ensure_future(self._respond(scope, receive, send_or_leave))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The caller has left, or we are cancelled ourselves (Ray Serve does so on a disconnect), or all is done.
            is_done = work.done()
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if not is_done:
            raise ClientDisconnect()
        work.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
