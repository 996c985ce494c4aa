"""The API straight over one real engine, without Ray: for what only a model can show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fairserve.clock import SystemClock
from fairserve.config import EngineConfig
from fairserve.engine.engine import make_engine
from fairserve.engine.events import StepEvents
from fairserve.engine.loading import load_model
from fairserve.engine.loop import EngineLoop
from fairserve.engine.request import GenerateRequest, RequestOutput
from tests.engine.support import FifoQueue, Ledger


class EngineBackend:
    """``ledger`` has what was charged. Call :meth:`stop` in the end."""

    def __init__(self, model: str, config: EngineConfig) -> None:
        loaded = load_model(model, config)
        self.tokenizer: Any = loaded.tokenizer
        self.ledger = Ledger()
        self._outputs: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[RequestOutput]]] = {}
        engine = make_engine(
            loaded,
            config,
            reserve_output_tokens=None,
            queue=FifoQueue(),
            account=self.ledger,
            clock=SystemClock(),
        )
        self.max_model_len = engine.limits.max_model_len
        self._loop = EngineLoop(engine, self._on_step)
        self._loop.start()

    def _on_step(self, events: StepEvents) -> None:
        for output in events.outputs:
            loop, queue = self._outputs[output.request_id]
            loop.call_soon_threadsafe(queue.put_nowait, output)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._outputs[request.request_id] = (asyncio.get_running_loop(), queue)
        self._loop.submit(request)
        while True:
            output = await queue.get()
            yield output
            if output.finish_reason is not None:
                return

    async def health(self) -> dict[str, Any]:
        return {"ready": True}

    def stop(self) -> None:
        assert self._loop.stop(timeout=60)
