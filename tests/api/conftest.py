"""A service over a scripted backend, and the unmodified ``openai`` client in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from fairserve.api.app import create_app
from fairserve.api.service import OpenAIService
from fairserve.config import ApiConfig, FairServeArgs
from tests.api.scripted import ScriptedBackend, byte_tokenizer

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
    def make(*, tokenizer: Any = tokenizer, environ: Any = None, timeout: Any = asyncio.timeout, **api: Any) -> Any:
        args = FairServeArgs(served_model_name=MODEL, api=ApiConfig(**api))
        return OpenAIService(
            args,
            backend,
            tokenizer,
            CONTEXT,
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
