"""What callers may send to ``/v1/responses``: text in, text out, as one chat request.

Nothing is kept: ``store`` is accepted and the answer says false, and there is no earlier answer to go on from. Tools
are refused here, in one place. ``text.format`` goes on as the chat's ``response_format``, and what that does not
support is refused there, under this route's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema, field_validator

from fairserve.api.openai_schema import _METADATA, MAX_NAME_CHARS, Body, ChatRequest, Sampled, parse, refuse
from fairserve.errors import InvalidRequest, PromptTooLong

Json = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
PARTS = ("input_text", "output_text")
"""What is said, and what was answered."""
ITEM_FIELDS = {"type", "role", "content", "id", "status", "phase"}
"""Of a message; the last three are of an earlier answer that is sent again, and mean nothing here."""
PART_FIELDS = {"type", "text", "annotations", "logprobs"}
NO_STATE = "answers are not kept here, so there is none to go on from: send the whole conversation in 'input'"
NO_TOOLS = "tools are not supported here yet: leave it out"
OUR_NAMES = {"messages": "input", "response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
"""Field of the chat -> what it is called here."""

# What the validators below accept, for the description.
_PART = {
    "type": "object",
    "properties": {"type": {"enum": [*PARTS]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_ITEM = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": [*ROLES]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
    "required": ["role", "content"],
}
_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "minItems": 1}]}
_NOTHING = {"type": "null"}
_FORMAT = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}


class TextOptions(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: Annotated[Json, WithJsonSchema(_FORMAT)] = Field(default_factory=lambda: {"type": "text"})
    """text, or what the chat's response_format supports, with the fields of ``json_schema`` beside ``type``."""


class ResponsesRequest(Body):
    """The body of ``POST /v1/responses``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # says how tools are called, and there are none
        "prompt": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning": ({},),
        "service_tier": ("auto", "default"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "tool_choice": ("none", "auto"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[tuple[tuple[str, str], ...], WithJsonSchema(_INPUT)]
    """Text, or messages whose content is text or a list of text parts, which are joined by newlines."""
    instructions: str | None = None
    """Goes before the input, as the system's message."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stream: bool = False
    text: TextOptions = TextOptions()
    metadata: Annotated[dict[str, str], WithJsonSchema(_METADATA)] | None = None
    """Up to 16 pairs of strings: keys of up to 64 characters, values of up to 512."""
    user: str | None = None
    safety_identifier: str | None = None
    store: bool = True
    """Accepted; nothing is stored, and the answer says false."""
    previous_response_id: Annotated[str, WithJsonSchema(_NOTHING)] | None = None
    """Only null."""
    tools: Annotated[tuple[Any, ...], WithJsonSchema({"type": "array", "maxItems": 0})] = ()
    """Only an empty list."""

    @field_validator("input", mode="before")
    @classmethod
    def _messages(cls, value: Any) -> tuple[tuple[str, str], ...]:
        """(role, text) of each message."""
        if isinstance(value, str):
            return (("user", value),)
        if not isinstance(value, list) or not value:
            raise refuse("wrong_input", "must be a string or a list of messages")
        return tuple(_message(i, item) for i, item in enumerate(value))

    @field_validator("metadata", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return Sampled._pairs(value)

    @field_validator("previous_response_id", mode="before")
    @classmethod
    def _no_state(cls, value: Any) -> Any:
        raise refuse("unsupported_field", NO_STATE)

    @field_validator("tools", mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value != []:
            raise refuse("unsupported_field", NO_TOOLS)
        return ()

    def as_chat(self) -> ChatRequest:
        """The chat that this asks for.

        Raises:
            InvalidRequest: ``text.format`` is not supported, or something else in it is wrong.
        """
        instructions = [] if self.instructions is None else [("system", self.instructions)]
        chat: Json = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in (*instructions, *self.input)],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "metadata": self.metadata,
            "response_format": _response_format(self.text.format),
        }
        with in_our_words():
            return parse(ChatRequest, json.dumps(chat).encode())


def _response_format(told: Json) -> Json:
    """As a chat says it: what a schema is stands one level deeper there."""
    if told.get("type") != "json_schema":
        return told
    return {"type": "json_schema", "json_schema": {name: value for name, value in told.items() if name != "type"}}


@contextmanager
def in_our_words() -> Iterator[None]:
    """Errors about the chat name the fields of this route.

    Raises:
        InvalidRequest, PromptTooLong: as in the block.
    """
    try:
        yield
    except PromptTooLong as error:
        fields = error.fields
        param = _ours(fields["param"] or "messages")
        raise PromptTooLong(fields["num_prompt"], fields["max_output"], fields["max_context"], param) from None
    except InvalidRequest as error:
        detail = str(error)
        for theirs, ours in OUR_NAMES.items():
            if detail.startswith(theirs):
                detail = ours + detail.removeprefix(theirs)
        raise InvalidRequest(detail, error.param and _ours(error.param), error.code) from None


def _ours(param: str) -> str:
    name, dot, rest = param.partition(".")
    return OUR_NAMES.get(name, name) + dot + rest


def _message(index: int, item: Any) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise refuse("wrong_item", f"item {index} is not an object")
    kind = item.get("type", "message")
    if kind != "message":
        raise refuse("unsupported_item", f"item {index} has type {_shown(kind)}: only messages are supported")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise refuse("wrong_item", f"item {index} has role {_shown(role)}: allowed are {', '.join(ROLES)}")
    _check_fields(f"item {index}", item, ITEM_FIELDS)
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list):
        raise refuse("wrong_item", f"item {index} has neither a string nor a list of parts in 'content'")
    return role, "\n".join(_text(f"part {i} of item {index}", part) for i, part in enumerate(content))


def _text(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise refuse("wrong_part", f"{where} is not an object")
    kind, text = part.get("type"), part.get("text")
    if kind not in PARTS:
        allowed = " and ".join(map(repr, PARTS))
        raise refuse("unsupported_part", f"{where} has type {_shown(kind)}: only {allowed} are supported")
    if not isinstance(text, str):
        raise refuse("wrong_part", f"{where} has no string in 'text'")
    _check_fields(where, part, PART_FIELDS)
    return text


def _check_fields(where: str, found: Json, known: set[str]) -> None:
    for name in found:
        if name not in known:
            raise refuse("unknown_field", f"{where} has an unknown field {name[:MAX_NAME_CHARS]!r}")


def _shown(value: Any) -> str:
    return repr(value)[:MAX_NAME_CHARS]
