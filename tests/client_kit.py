"""A connection to a counter actor that plays: without Ray and without a socket, by both doors."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from fairserve.client import Connection
from fairserve.client_doors import HttpDoor
from fairserve.cluster.changes import KeyWanted, new_key
from fairserve.cluster.counter_query import typed
from fairserve.views import KeyView, NewKey
from tests.api.admin_kit import ADMIN, House
from tests.api.fake_counter import FakeCounter


class FakeDoor:
    """As RayDoor, on a FakeCounter."""

    def __init__(self, counter: FakeCounter, who: str = "python:me") -> None:
        self.counter = counter
        self.who = who
        self.is_closed = False

    def ask(self, method: str, **arguments: Any) -> Any:
        return asyncio.run(getattr(self.counter, method)(**arguments))

    def change(self, method: str, **arguments: Any) -> Any:
        return self.ask(method, **arguments, who=self.who)

    def create_key(self, wanted: KeyWanted) -> NewKey:
        secret, entry = new_key(wanted)
        return NewKey(secret=secret, key=typed(KeyView, self.change("add_key", entry=entry.model_dump(mode="json"))))

    def close(self) -> None:
        self.is_closed = True


class AsgiBridge(httpx.BaseTransport):
    """Lets a blocking client call an ASGI application of this process."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answer() -> httpx.Response:
            sent = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
            got = await httpx.ASGITransport(self._app).handle_async_request(sent)
            return httpx.Response(got.status_code, headers=got.headers, content=await got.aread())

        return asyncio.run(answer())


def over_http(house: House, key: str | None = ADMIN) -> Connection:
    return Connection(HttpDoor("http://fairserve/", key, 5.0, AsgiBridge(house.app)))
