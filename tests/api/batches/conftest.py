"""A service that keeps files and runs batches, over a scripted backend, in this event loop: time moves when told to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from fairserve.api.app import create_app
from fairserve.api.batches.disk import Disk
from fairserve.api.batches.service import BatchService
from fairserve.clock import VirtualClock
from fairserve.config import BatchesConfig
from tests.api.conftest import MODEL, ServiceMaker, http_of
from tests.api.scripted import ScriptedBackend, settled

DAWN_S = 1_700_000_000.0


def chat_line(custom_id: str, content: str = "hi", **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@dataclass
class Ingress:
    """One ingress process; several of them may share a folder and a clock."""

    app: FastAPI
    batches: BatchService
    clock: VirtualClock
    backend: ScriptedBackend
    waits_s: list[float]
    """What its pauses were asked to wait."""

    def client(self, key: str = "ann") -> openai.AsyncOpenAI:
        """The unmodified client."""
        return openai.AsyncOpenAI(
            api_key=key, base_url="http://fairserve/v1", http_client=http_of(self.app), max_retries=0
        )

    async def look(self, after_s: float = 0.0) -> None:
        self.clock.advance(after_s)
        await self.batches.keeper.look()

    async def work(self) -> None:
        """Take up what there is to do, and do it to its end."""
        await self.look()
        await self.batches.keeper.settled()
        await self.look()

    async def batch(self, *lines: Any, key: str = "ann", **more: Any) -> openai.types.Batch:
        client = self.client(key)
        file = await client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
        wanted = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
        return await client.batches.create(input_file_id=file.id, **wanted)  # type: ignore[arg-type]

    async def results(self, batch: openai.types.Batch, key: str = "ann") -> dict[str, Any]:
        """By custom id; each may be there once."""
        client = self.client(key)
        found: dict[str, Any] = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                for line in (await client.files.content(file_id)).text.splitlines():
                    one = json.loads(line)
                    assert one["custom_id"] not in found, "answered twice"
                    found[one["custom_id"]] = one
        return found


IngressMaker = Callable[..., Ingress]


@pytest.fixture
async def make_ingress(
    make_service: ServiceMaker, backend: ScriptedBackend, tmp_path: Path
) -> AsyncIterator[IngressMaker]:
    clock = VirtualClock()
    made: list[Ingress] = []

    def make(*, disk: Disk | None = None, api: dict[str, Any] | None = None, **settings: Any) -> Ingress:
        config = BatchesConfig.model_validate({"directory": str(tmp_path / "kept")} | settings)
        service = make_service(**(api or {}))
        waits_s: list[float] = []

        async def pause(wait_s: float) -> None:
            waits_s.append(wait_s)
            await settled(1)

        batches = BatchService(
            config, service, clock=clock, unix_time_s=lambda: DAWN_S + clock.now_s(), pause=pause, disk=disk
        )
        app = create_app(lambda: service, batches_provider=lambda: batches)
        made.append(Ingress(app, batches, clock, backend, waits_s))
        return made[-1]

    yield make
    for ingress in made:
        await ingress.batches.keeper.close()


@pytest.fixture
def ingress(make_ingress: IngressMaker) -> Ingress:
    return make_ingress()
