"""The whole application over the real counter service and a scripted backend, on a port of this machine: real HTTP,
one event loop in a thread, no Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from fairserve.api.admin_service import AdminService
from fairserve.api.app import create_app
from fairserve.api.batches.service import BatchService
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.clock import SystemClock
from fairserve.cluster.counter_actor import without_keys
from fairserve.cluster.counter_query import CounterQuery
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.config import FairServeArgs
from fairserve.observe import dashboard
from tests.api.fake_counter import FakeTransport
from tests.api.scripted import CHAT_TEMPLATE, ScriptedBackend, byte_tokenizer, words

API_KEY = "fuzz-client-secret"
ADMIN_KEY = "fuzz-admin-secret"
CONTEXT = 200
PATIENCE_S = 60.0


class Server(uvicorn.Server):
    """Tells another thread when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_begun = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_begun.set()


class Served:
    """``url`` of a running application; ``actor`` belongs to its event loop."""

    def __init__(self, store: Path, *, chat_template: str = CHAT_TEMPLATE, context: int = CONTEXT, **api: Any) -> None:
        self.metrics = RecordedMetrics()
        keys = {
            "keys": [{"client": "ann", "key": API_KEY}],
            "admin_keys": [{"name": "ops", "key": ADMIN_KEY}],
        }
        args = FairServeArgs.model_validate(
            {
                "served_model_name": "tiny",
                "counter": {"store": str(store)},
                "api": keys | api,
                "engine": {"pooling": "mean"},
                "batches": {"directory": str(store.with_name("kept"))},
            }
        )
        self.actor = CounterService(without_keys(args).model_dump_json(), metrics=lambda _: self.metrics)
        self.backend = ScriptedBackend(words("Hello", " world"))
        self.service = service = OpenAIService(
            args,
            [ServedModel(args, self.backend, byte_tokenizer(chat_template), context, self.metrics)],
            environ={},
        )
        query = CounterQuery(FakeTransport(self.actor), PATIENCE_S)  # type: ignore[arg-type]
        self.admin = admin = AdminService.from_config(
            args.api, query, SystemClock(), is_open=lambda: service.is_open, environ={}
        )
        self.batches = batches = BatchService(args.batches, service)
        self.app = create_app(lambda: service, admin_provider=lambda: admin, batches_provider=lambda: batches)
        dashboard.install(self.app)
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Served]:
        server = Server(uvicorn.Config(self.app, port=0, lifespan="off", log_config=None, access_log=False))

        async def serve() -> None:
            running = asyncio.create_task(self.batches.keeper.run())
            await server.serve()
            running.cancel()
            await self.batches.keeper.close()
            self.actor.end()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert server.has_begun.wait(PATIENCE_S)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
