"""Calls that must be made, by a real model at temperature 1: whatever it draws, they parse and follow their schemas.

The embedded model was trained on no tools and its template has none, so its tokenizer gets templates that do."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.config import EngineConfig, FairServeArgs
from tests.api import tool_kit
from tests.api.conftest import MODEL, app_of, http_of
from tests.api.engine_backend import EngineBackend

pytestmark = pytest.mark.model

CONFIG = EngineConfig(device="cpu", max_num_seqs=32, kv_cache_tokens=32 * 512, max_model_len=1024)
PLAN = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
        "rain": {"type": ["boolean", "null"]},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {
        "stop": {
            "type": "object",
            "properties": {"at": {"type": "integer", "minimum": 0, "maximum": 23}},
            "required": ["at"],
            "additionalProperties": False,
        }
    },
}
CODE = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}},
    "required": ["code"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {"plan": PLAN, "find-code": CODE, "time": {"type": "object", "maxProperties": 0}}
TOOLS = [
    {"type": "function", "function": {"name": "plan", "description": "Plan a trip.", "parameters": PLAN}},
    {"type": "function", "function": {"name": "find-code", "parameters": CODE}},
    {"type": "function", "function": {"name": "time"}},
]
TEMPLATES = {"hermes": tool_kit.HERMES, "pythonic": tool_kit.PYTHONIC, "qwen3_coder": tool_kit.QWEN3_CODER}
ASK: list[Any] = [{"role": "user", "content": "Three days in Oslo, please."}]


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Iterator[EngineBackend]:
    backend = EngineBackend(str(embedded_model), CONFIG)
    yield backend
    backend.stop()


@pytest.fixture
def service(engine: EngineBackend, embedded_model: Path, tmp_path: Path, form: str) -> OpenAIService:
    from transformers import AutoTokenizer

    folder = tmp_path / form
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[form])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = FairServeArgs(served_model_name=MODEL, engine=CONFIG)
    return OpenAIService(args, [ServedModel(args, engine, tokenizer, engine.max_model_len)], environ={})


async def whole(client: openai.AsyncOpenAI, **asked: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Finish reason, text, and each call's name and arguments."""
    choice = (await client.chat.completions.create(**asked)).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.finish_reason, choice.message.content or "", calls


async def streamed(client: openai.AsyncOpenAI, **asked: Any) -> tuple[str, str, list[tuple[str, str]]]:
    text, finish, calls = "", "", []
    async for chunk in await client.chat.completions.create(stream=True, **asked):
        (choice,) = chunk.choices
        finish = choice.finish_reason or finish
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = name, arguments + (call.function.arguments or "")
    return finish, text, calls


@pytest.mark.parametrize("form", sorted(TEMPLATES))
async def test_whatever_a_model_draws_a_forced_call_parses_and_follows_its_schema(service: OpenAIService) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS, "temperature": 1.0, "max_tokens": 200}
    named = {"type": "function", "function": {"name": "plan"}}
    async with http_of(app_of(service)) as http:
        client = openai.AsyncOpenAI(
            api_key="alice", base_url="http://fairserve/v1", http_client=http, max_retries=0, timeout=600
        )
        runs = {
            (how.__name__, choice is named, seed): how(
                client, seed=seed, tool_choice=choice, parallel_tool_calls=False, **asked
            )
            for how in (whole, streamed)
            for choice in ("required", named)
            for seed in range(2)
        }
        found = dict(zip(runs, await asyncio.gather(*runs.values()), strict=True))
    for (how, is_named, seed), (finish, text, calls) in found.items():
        assert (finish, text, len(calls)) == ("tool_calls", "", 1), (how, is_named, seed)
        ((name, arguments),) = calls
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert name == "plan" or not is_named
        assert found["whole", is_named, seed] == found["streamed", is_named, seed]
    assert len({calls[0] for _, _, calls in found.values()}) > 1  # seeds differ, and so do calls
