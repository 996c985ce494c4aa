"""A load generator for OpenAI's chat API: open loop, streaming, one record per request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.workload import Planned
from fairserve.api.answer_headers import QUEUE_HEADER

Status = Callable[[], Awaitable[dict[str, Any] | None]]
"""Asks the counter actor; None when it does not answer."""
OnEvent = Callable[[str, "Record"], None]
"""Called with "sent", "first" (its first text came) or "ended", and the request's record."""


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are seconds since the start of the run.

    ``first_s`` is None until the first text came, ``finish_s`` until the stream ended. ``num_input`` and
    ``num_output`` are the usage that the server reported with the last chunk, 0 before. ``queue_s`` is the waiting
    time that the server reported, None where it reported none. ``error`` is an HTTP status or an exception; a
    request that was still waiting or running at the end has no error and no ``finish_s``.
    """

    client: str
    submit_s: float
    first_s: float | None = None
    finish_s: float | None = None
    num_input: int = 0
    num_output: int = 0
    queue_s: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send: ``url`` without /v1, ``keys`` by client."""

    url: str
    model: str
    keys: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """What one run left: ``samples`` are the counter actor's answers, each with ``t_s`` since the start."""

    duration_s: float
    records: list[Record]
    samples: list[dict[str, Any]]


async def drive(
    target: Target,
    plan: Sequence[Planned],
    duration_s: float,
    *,
    status: Status | None = None,
    sample_s: float = 0.2,
    on_event: OnEvent | None = None,
    stop_after: int | None = None,
) -> Run:
    """Send ``plan`` and stop after ``duration_s``, hanging up on whatever still waits or runs.

    ``stop_after`` ends the run earlier: once so many requests have ended, or when the whole plan has.
    """
    started = time.monotonic()
    enough = asyncio.Event()
    records: list[Record] = []
    samples: list[dict[str, Any]] = []
    num_ended = 0

    def now_s() -> float:
        return time.monotonic() - started

    def happened(event: str, record: Record) -> None:
        nonlocal num_ended
        num_ended += event == "ended"
        if stop_after is not None and num_ended >= stop_after:
            enough.set()
        if on_event is not None:
            on_event(event, record)

    async def take_sample() -> None:
        if status is not None and (answer := await status()) is not None:
            samples.append({"t_s": now_s(), **answer})

    async def keep_sampling() -> None:
        while True:
            await take_sample()
            await asyncio.sleep(sample_s)

    async def send_all(client: httpx.AsyncClient) -> None:
        async with asyncio.TaskGroup() as group:
            for planned in plan:
                await asyncio.sleep(planned.at_s - now_s())
                record = Record(planned.client, submit_s=now_s())
                records.append(record)
                group.create_task(send(client, target, planned, record, now_s, happened))

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=30)) as client:
        await take_sample()
        work = [asyncio.create_task(send_all(client))]
        work += [asyncio.create_task(keep_sampling())] if status is not None else []
        try:
            await _first_of(enough.wait(), work[0], timeout_s=max(0.0, duration_s - now_s()), stay=stop_after is None)
            duration_s = now_s()
            await take_sample()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
    return Run(duration_s, records, samples)


async def _first_of(enough: Any, sending: asyncio.Task[None], timeout_s: float, stay: bool) -> None:
    """Wait for ``enough`` or the time-out; also for the end of ``sending`` unless the full time is to be stayed."""
    waiting = asyncio.create_task(enough)
    try:
        await asyncio.wait(
            [waiting] if stay else [waiting, sending], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        waiting.cancel()
    if sending.done() and (error := sending.exception()) is not None:
        raise error


async def send(
    client: httpx.AsyncClient,
    target: Target,
    planned: Planned,
    record: Record,
    now_s: Callable[[], float],
    happened: OnEvent,
) -> None:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": planned.prompt}],
        "max_tokens": planned.num_output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {target.keys[planned.client]}"}
    happened("sent", record)
    try:
        async with client.stream("POST", f"{target.url}/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                record.error = f"HTTP {response.status_code}"
                return
            if queue_ms := response.headers.get(QUEUE_HEADER):
                record.queue_s = float(queue_ms) / 1000
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    record.finish_s = now_s()
                elif line.startswith("data: "):
                    _read_chunk(json.loads(line[6:]), record, now_s, happened)
        if record.finish_s is None and record.error is None:
            record.error = "the stream broke off"
    except (httpx.HTTPError, ValueError) as error:
        record.error = type(error).__name__
    finally:
        if record.finish_s is not None or record.error is not None:
            happened("ended", record)


def _read_chunk(chunk: dict[str, Any], record: Record, now_s: Callable[[], float], happened: OnEvent) -> None:
    if "error" in chunk:
        record.error = str(chunk["error"].get("code") or chunk["error"].get("message"))
    if usage := chunk.get("usage"):
        record.num_input, record.num_output = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in chunk.get("choices", ()):
        # A first token may be half a character and carry no text yet, but a last one always says why it ended.
        if record.first_s is None and (choice["delta"].get("content") or choice.get("finish_reason")):
            record.first_s = now_s()
            happened("first", record)
