"""Several generations at once, as one stream of what is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from fairserve.engine.request import RequestOutput, failure, joined
from fairserve.errors import ReplicaFailed

MAX_PIECES = 64
"""Outputs of one generation that wait for a slow reader as they came, about 500 bytes each; beyond, they are joined,
which leaves about 50 bytes per token."""
Batch = dict[int, RequestOutput]
"""Index of the generation -> everything it made since the last batch, merged into one output."""


async def merged(streams: Sequence[AsyncIterator[RequestOutput]]) -> AsyncGenerator[Batch, None]:
    """Run all ``streams``; yield whenever at least one has made something. Close it (``aclosing``) in any case.

    One task per stream reads ahead, so a slow reader gets fewer, larger batches and never holds up an engine; what
    waits is bounded by max_tokens. The first stream to fail fails all: what is ready is yielded once more, unless
    nothing has been yielded yet, and then its exception is raised. Leaving, for whatever reason, cancels every
    stream that still runs, and returns when they have ended.

    Raises:
        ReplicaFailed: a stream reported an abort, or ended without a finish reason.
        FairServeError: a stream reported an error, see :func:`fairserve.engine.request.failure`.
        Exception: whatever a stream raised.
    """
    assert streams, "nothing to wait for"
    ready: dict[int, list[RequestOutput]] = {}
    failures: list[Exception] = []
    wake = asyncio.Event()
    num_running = len(streams)

    async def pump(index: int, stream: AsyncIterator[RequestOutput]) -> None:
        nonlocal num_running
        try:
            async for output in _checked(stream):
                outputs = ready.setdefault(index, [])
                outputs.append(output)
                if len(outputs) > MAX_PIECES:
                    outputs[:] = [joined(outputs)]
                wake.set()
        except Exception as error:
            failures.append(error)
        except asyncio.CancelledError:  # by us, when nobody looks at failures any more; or by the cluster
            failures.append(ReplicaFailed("it cancelled the request"))
            raise
        finally:
            num_running -= 1
            wake.set()

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        has_yielded = False
        while True:
            await wake.wait()
            wake.clear()
            if ready and (has_yielded or not failures):
                batch = {index: joined(outputs) for index, outputs in sorted(ready.items())}
                ready.clear()
                has_yielded = True
                yield batch
            if failures:
                raise failures[0]
            if num_running == 0 and not ready:
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _checked(stream: AsyncIterator[RequestOutput]) -> AsyncGenerator[RequestOutput, None]:
    """``stream``, closed in the end, with an exception for every bad ending."""
    is_finished = False
    try:
        async for output in stream:
            if output.finish_reason == "error":
                raise failure(output)
            if output.finish_reason == "abort":
                raise ReplicaFailed("it ended the request with 'abort'")
            is_finished = is_finished or output.finish_reason is not None
            yield output
    finally:
        close = getattr(stream, "aclose", None)  # an AsyncIterator need not have it
        if close is not None:
            await close()
    if not is_finished:
        raise ReplicaFailed("it ended the stream without a finish reason")
