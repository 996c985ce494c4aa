"""The description of the OpenAI routes, served as /openapi.json; the admin API has its own below /admin/v1.

Bodies of requests are read by :func:`fairserve.api.openai_schema.parse`, not by FastAPI, so they are described here.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from fairserve import __version__
from fairserve.api.admin import ErrorBody
from fairserve.api.batches.bodies import BatchRequest, ExpiresAfter
from fairserve.api.embeddings import EmbeddingRequest
from fairserve.api.openai_schema import (
    Body,
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    Function,
    Message,
    StreamOptions,
    Tool,
    ToolCall,
)
from fairserve.api.responses_schema import ReasoningOptions, ResponsesRequest, TextOptions
from fairserve.api.responses_tools import FunctionTool
from fairserve.api.tokenizing import DetokenizeRequest, TokenizeRequest

REF = "#/components/schemas/{model}"
DESCRIPTION = """OpenAI's chat, responses, completions and embeddings, fair among clients. Unknown fields are refused;
fields of OpenAI's that are not supported are accepted at the values that ask for nothing."""
BODIES: tuple[type[Body], ...] = (
    BatchRequest,
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ExpiresAfter,
    Function,
    FunctionTool,
    Message,
    ReasoningOptions,
    ResponsesRequest,
    StreamOptions,
    TextOptions,
    TokenizeRequest,
    Tool,
    ToolCall,
)
KEY = "apiKey"
Json = dict[str, Any]
Finish = Literal["stop", "length", "abort", "tool_calls"] | None


class Answered(BaseModel):
    """More fields may come: answers grow as OpenAI's do."""

    model_config = ConfigDict(extra="allow")


class Usage(Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionMade(Answered):
    name: str
    arguments: str


class CallMade(Answered):
    id: str
    type: Literal["function"]
    function: FunctionMade


class ChatMessage(Answered):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CallMade] = []


class ChatChoice(Answered):
    index: int
    message: ChatMessage
    finish_reason: Finish


class TextChoice(Answered):
    index: int
    text: str
    finish_reason: Finish


class ChatCompletion(Answered):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Completion(Answered):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class PromptUsage(Answered):
    prompt_tokens: int
    total_tokens: int


class Embedding(Answered):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Answered):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Tokenized(Answered):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answered):
    prompt: str


class Responses(Answered):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    output: list[Answered]
    usage: Answered


class Model(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(Answered):
    ready: bool
    model: str
    mode: Literal["open", "keyed"]


ERRORS: dict[int | str, Json] = {"default": {"model": ErrorBody, "description": "The request is wrong, or was refused"}}
HEALTH: dict[int | str, Json] = {
    200: {"model": Health, "description": "Ready"},
    503: {"model": Health, "description": "Not ready"},
}


def answered(kind: type[BaseModel], *, is_generation: bool = False) -> dict[int | str, Json]:
    """The ``responses`` of a route."""
    streamed: Json = {"content": {"text/event-stream": {"schema": {"type": "string"}}}} if is_generation else {}
    return ERRORS | {200: {"model": kind, "description": "As at OpenAI", **streamed}}


def takes(kind: type[Body]) -> Json:
    """The ``openapi_extra`` of a route whose body is a ``kind``."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> None:
    """Let ``app`` describe itself; made when it is first asked for."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> Json:
    document = get_openapi(title=app.title, version=__version__, description=DESCRIPTION, routes=app.routes)
    _, found = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for kind in BODIES:
        schemas[kind.__name__] = _as_read(kind, found["$defs"][kind.__name__])
    text = "A client's API key; without any key the service is open, and this names the client"
    components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer", "description": text}}
    for path, operations in document["paths"].items():
        for operation in operations.values() if path != "/health" else ():
            operation["security"] = [{KEY: []}, {}]
    return document


def _as_read(kind: type[Body], schema: Json) -> Json:
    """``null`` means left out, and what is not supported may ask for nothing."""
    required, null = schema.get("required", []), {"type": "null"}
    properties = {
        name: one if name in required or null in one.get("anyOf", ()) else {"anyOf": [_without_null(one), null]}
        for name, one in schema["properties"].items()
    }
    neutral = {name: {"enum": [*values, None]} for name, values in kind.unsupported.items()}
    return schema | {"properties": properties | neutral}


def _without_null(schema: Json) -> Json:
    return {word: value for word, value in schema.items() if (word, value) != ("default", None)}
