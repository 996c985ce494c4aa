"""A handle that calls a ReplicaCore in the same loop, with faults on the trunks. No Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fairserve.cluster.multiplex import Message
from fairserve.cluster.replica import ReplicaCore
from fairserve.engine.request import GenerateRequest
from fairserve.errors import ReplicaFailed

Fault = Callable[[AsyncIterator[Message]], AsyncIterator[Message]]


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


class Call:
    """What Serve answers to a streaming call: the other side runs ahead, items are pickled on their way."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run())

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        item = await self._arrived.get()
        if isinstance(item, Exception):
            raise item
        return pickle.loads(item)

    def cancel(self) -> None:
        self._task.cancel()

    def die(self) -> None:
        """With its replica."""
        self._task.cancel()
        self._arrived.put_nowait(died())

    async def _run(self) -> None:
        try:
            async with aclosing(self._items) as items:
                async for item in items:
                    self._arrived.put_nowait(pickle.dumps(item))
            self._arrived.put_nowait(StopAsyncIteration())
        except Exception as error:
            self._arrived.put_nowait(error)


class Handle:
    """Of one replica, which it finds as long as it lives."""

    def __init__(self, core: ReplicaCore, fault: Fault | None = None) -> None:
        self.core = core
        self.fault = fault
        self.is_dead = False
        self.calls: dict[str, list[Call]] = {"generate": [], "trunk": []}

    def options(self, method_name: str, **_: Any) -> Method:
        return Method(self, method_name)

    def die(self) -> None:
        self.is_dead = True
        for call in (*self.calls["generate"], *self.calls["trunk"]):
            call.die()


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, first: Any, **values: Any) -> Call:
        call = Call(self._generate(first, **values) if self._name == "generate" else self._trunk(first, **values))
        self._handle.calls[self._name].append(call)
        return call

    async def _generate(
        self,
        request: GenerateRequest,
        *,
        num_returns: int,
        first_sent_s: float,
        replaces: str | None,
        ingress: str | None,
        told: list[Any],
    ) -> AsyncIterator[Any]:
        if self._handle.is_dead:
            raise died()
        async with aclosing(self._handle.core.generate(request, 0.1, num_returns, ingress)) as items:  # type: ignore[type-var]
            async for item in items:
                yield item

    async def _trunk(self, ingress: str, *, replica: str) -> AsyncIterator[Message]:
        if self._handle.is_dead:
            raise ReplicaFailed("it takes no more calls")
        messages: Any = self._handle.core.trunk(ingress)
        async with aclosing(messages):
            async for message in self._handle.fault(messages) if self._handle.fault else messages:
                yield message
