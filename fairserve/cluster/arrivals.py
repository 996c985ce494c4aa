"""The ingress's side of the trunks (``multiplex.py``): outputs of all its requests, put in order, each number once.

Plain objects on one event loop; ``open_trunk`` is what a test scripts.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from fairserve.cluster.multiplex import Message, NoTrunk, Own, Part, Piece
from fairserve.engine.request import RequestOutput, Usage, joined
from fairserve.errors import ReplicaFailed

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""After a trunk that broke, until the next one to the same replica. Meanwhile tokens come over the own calls."""

MAX_READY = 64
"""Outputs that wait for a slow reader as they came; beyond, they are joined."""


class Inbox:
    """What arrived for one request, as an async iterator in order.

    Ends after a finish reason, after :meth:`end`, or with the exception of :meth:`fail`; what is ready comes first.
    """

    def __init__(self) -> None:
        self._num = 0
        """Outputs taken: the number of the next one."""
        self._early: dict[int, tuple[int, RequestOutput]] = {}
        """first -> outputs that overtook others."""
        self._ready: deque[RequestOutput] = deque()
        self._failure: Exception | None = None
        self._is_over = False
        self._event = asyncio.Event()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def part(self, part: Part) -> None:
        """From a trunk."""
        if part.first + part.num <= self._num:
            return
        output = RequestOutput(
            part.request_id, part.text, part.token_ids, Usage(*part.usage), part.logprobs, waited_s=part.waited_s
        )
        self._take(part.first, part.num, output)

    def own(self, item: Own | RequestOutput) -> None:
        """From the request's own call. Plain outputs come from a replica that was not told to number them."""
        if isinstance(item, RequestOutput):
            self._take(self._num, 1, item)
            return
        if item.output is None:
            return
        first, num, output = item.first, item.num, item.output
        begin = first - len(item.earlier)
        if begin <= self._num < first:
            output = _with(item.earlier[self._num - begin :], output, item.waited_s if self._num == begin else None)
            first, num = self._num, first + num - self._num
        self._take(first, num, output)

    def end(self) -> None:
        self._is_over = True
        self._event.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._event.set()

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._ready:
            if self._is_over:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            self._event.clear()
            await self._event.wait()
        output = self._ready.popleft()
        self._is_over |= output.finish_reason is not None
        return output

    def _take(self, first: int, num: int, output: RequestOutput) -> None:
        if first > self._num:
            self._early[first] = (num, output)
            return
        if first + num <= self._num:
            return
        assert first == self._num, "outputs are joined only where none of them can have come another way"
        self._put(num, output)
        while self._early and (early := self._early.pop(self._num, None)) is not None:
            self._put(*early)
        if self._early:
            self._early = {first: early for first, early in self._early.items() if first > self._num}

    def _put(self, num: int, output: RequestOutput) -> None:
        self._num += num
        self._ready.append(output)
        if len(self._ready) > MAX_READY:
            self._ready = deque((joined(self._ready),))
        self._event.set()


def _with(earlier: tuple[Piece, ...], output: RequestOutput, waited_s: float | None) -> RequestOutput:
    """``output`` and the pieces before it as one."""
    pieces = [RequestOutput(output.request_id, text, ids, output.usage, probs) for text, ids, probs in earlier]
    return replace(joined((*pieces, output)), waited_s=waited_s)


@dataclass(slots=True)
class _Reader:
    """Of the trunks from one replica, one after another."""

    trunk: int = 0
    """Number of the one that is up, 0 before its first message."""
    is_resting: bool = False
    """One broke; it waits to open another."""
    is_wanted: bool = False
    """The replica asked while it rested."""
    task: asyncio.Task[None] | None = None


class Arrivals:
    """All requests of one ingress. ``open_trunk(replica)`` opens the stream from one replica; closing it ends it, and
    any exception says that it broke, or could not be opened."""

    def __init__(self, open_trunk: Callable[[str], AsyncGenerator[Message, None]]) -> None:
        self._open_trunk = open_trunk
        self._inboxes: dict[str, Inbox] = {}
        self._readers: dict[str, _Reader] = {}

    @property
    def num_open(self) -> tuple[int, int]:
        """Requests, and replicas that a trunk is read from."""
        return len(self._inboxes), len(self._readers)

    def open(self, request_id: str) -> Inbox:
        """For a request that is sent now; :meth:`close` it in the end."""
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def close(self, request_id: str) -> None:
        del self._inboxes[request_id]

    def asked(self, ask: NoTrunk) -> None:
        """A replica wants a trunk. It may have got one since, or have asked before."""
        reader = self._readers.get(ask.replica)
        if reader is not None and reader.is_resting:
            reader.is_wanted = True
        elif reader is None or 0 < reader.trunk <= ask.num_before:  # or it has ended, and the end is on its way
            reader = self._readers[ask.replica] = _Reader()
            # In a context of its own: Serve would cancel the trunk together with the request that came first.
            reader.task = asyncio.get_running_loop().create_task(
                self._keep(ask.replica, reader), context=contextvars.Context()
            )

    async def _keep(self, replica: str, reader: _Reader) -> None:
        try:
            while True:
                try:
                    await self._read(replica, reader)
                    return
                except Exception as error:
                    logger.warning("the trunk from replica %s broke: %r", replica, error)
                was_up = reader.trunk > 0
                reader.trunk, reader.is_resting = 0, True
                await asyncio.sleep(RETRY_S)
                if not self._inboxes or not (was_up or reader.is_wanted):
                    return
                reader.is_resting = reader.is_wanted = False
        finally:
            if self._readers.get(replica) is reader:
                del self._readers[replica]

    async def _read(self, replica: str, reader: _Reader) -> None:
        number = 0
        async with aclosing(self._open_trunk(replica)) as messages:
            async for message in messages:
                if message.number > number:
                    raise ReplicaFailed(f"message {number} of its trunk is lost")
                number = max(number, message.number + 1)
                reader.trunk = message.trunk
                for part in message.parts:
                    inbox = self._inboxes.get(part.request_id)
                    if inbox is not None:
                        inbox.part(part)
