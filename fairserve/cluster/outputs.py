"""Outputs of one request on their way from the engine to a reader that may be slower."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from fairserve.engine.request import RequestOutput, joined


class OutputStream:
    """An async iterator of outputs; what piled up since the last read comes as one. Ends after a finish reason.
    ``saw`` is told each output as it comes."""

    def __init__(self, waited_s: float | None = None, saw: Callable[[RequestOutput], None] | None = None) -> None:
        self._waited_s = waited_s
        self._saw = saw
        self._ready: RequestOutput | None = None
        self._event = asyncio.Event()
        self._is_over = False

    def put(self, output: RequestOutput) -> None:
        if self._saw is not None:
            self._saw(output)
        if self._ready is None:
            self._ready = replace(output, waited_s=self._waited_s)
            self._waited_s = None
        else:
            self._ready = joined((self._ready, output))
        self._event.set()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        await self._event.wait()
        self._event.clear()
        output, self._ready = self._ready, None
        assert output is not None
        self._is_over = output.finish_reason is not None
        return output
