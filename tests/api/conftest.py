"""A service over a scripted backend, and the unmodified ``openai`` client in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from fairserve.api.app import create_app
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.config import ApiConfig, EngineConfig, FairServeArgs
from tests.api.scripted import ScriptedBackend, byte_tokenizer
from tests.tiny_model import save_tiny_model

MODEL = "tiny"
CONTEXT = 200
"""Tokens, and bytes too: the tokenizer makes one of each byte."""


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
async def backend() -> AsyncIterator[ScriptedBackend]:
    """Whatever a test did, in the end nothing may still run."""
    backend = ScriptedBackend()
    yield backend
    names = sorted(request.request_id for request in backend.requests)
    assert sorted([*backend.cancelled, *backend.finished]) == names, "a request was left running"


ServiceMaker = Callable[..., OpenAIService]


@pytest.fixture
def make_service(backend: ScriptedBackend, tokenizer: Any) -> ServiceMaker:
    def make(
        *,
        tokenizer: Any = tokenizer,
        environ: Any = None,
        timeout: Any = asyncio.timeout,
        context: int = CONTEXT,
        **api: Any,
    ) -> Any:
        args = FairServeArgs(served_model_name=MODEL, api=ApiConfig(**api))
        return OpenAIService(
            args,
            [ServedModel(args, backend, tokenizer, context)],
            environ=environ or {},
            unix_time_s=lambda: 1_700_000_000.5,
            timeout=timeout,
        )

    return make


@pytest.fixture
def app(make_service: ServiceMaker) -> FastAPI:
    """Open mode."""
    return app_of(make_service())


def app_of(service: OpenAIService) -> FastAPI:
    return create_app(lambda: service)


def http_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fairserve", headers=headers)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with http_of(app, authorization="Bearer alice") as client:
        yield client


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    async with http_of(app) as http:
        yield openai.AsyncOpenAI(api_key="alice", base_url="http://fairserve/v1", http_client=http, max_retries=0)


# -- a real engine behind the API, for what only a model can show ------------------------------------------------------

REAL = EngineConfig(max_num_seqs=8, max_num_batched_tokens=32, kv_cache_tokens=2048, pooling="mean")


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def real_model(real_folder: Path) -> Any:
    """The same model in transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(real_folder, dtype="float32").eval()


@pytest.fixture(scope="session")
def real_engine(real_folder: Path) -> Iterator[Any]:
    from tests.api.engine_backend import EngineBackend

    backend = EngineBackend(str(real_folder), REAL)
    yield backend
    backend.stop()


@pytest.fixture
async def real_client(real_engine: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    args = FairServeArgs(served_model_name=MODEL, engine=REAL)
    service = OpenAIService(
        args, [ServedModel(args, real_engine, real_engine.tokenizer, real_engine.max_model_len)], environ={}
    )
    async with http_of(app_of(service)) as http:
        yield openai.AsyncOpenAI(api_key="alice", base_url="http://fairserve/v1", http_client=http, max_retries=0)
