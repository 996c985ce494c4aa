"""What callers may send to ``/v1/responses``: text and calls of functions, in and out, as one chat request.

Nothing is kept: ``store`` is accepted and the answer says false, and there is no earlier answer to go on from. Fields
go on as those of a chat, and what that does not support is refused there, under this route's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, WithJsonSchema, field_validator, model_validator

from fairserve.api.body_errors import refuse
from fairserve.api.openai_schema import _METADATA, _STOP, Body, ChatRequest, Effort, Sampled, ServiceTier, parse
from fairserve.api.responses_input import INPUT, messages_of
from fairserve.api.responses_tools import CHOICE_SCHEMA, FunctionTool, ToolChoice, check_kinds, choice_of
from fairserve.api.tools import MAX_TOOLS
from fairserve.errors import InvalidRequest, PromptTooLong

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""OpenAI's list. All but the first are parts of items that no answer from here has, so they ask for nothing."""
NO_STATE = "answers are not kept here, so there is none to go on from: send the whole conversation in 'input'"
OUR_NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
"""Field of the chat -> what it is called here."""

# What the validators below accept, for the description.
_NOTHING = {"type": "null"}
_FORMAT = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}


class TextOptions(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: Annotated[Json, WithJsonSchema(_FORMAT)] = Field(default_factory=lambda: {"type": "text"})
    """text, or what the chat's response_format supports, with the fields of ``json_schema`` beside ``type``."""


class ReasoningOptions(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context": ("auto", "current_turn"),
        "generate_summary": ("auto",),
        "mode": ("standard",),
        "summary": ("auto",),  # the most that there is, and there is none
    }

    effort: Effort | None = None
    """As ``reasoning_effort`` of a chat."""


class ResponsesRequest(Body):
    """The body of ``POST /v1/responses``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }
    instead: ClassVar[Mapping[str, str]] = {
        "conversation": "the whole conversation in 'input'",
        "prompt": "what it says in 'instructions' and 'input'",
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[tuple[Json, ...], WithJsonSchema(INPUT)]
    """Text, or messages whose content is text or a list of text parts, which are joined by newlines; between them calls
    of functions, and what came of them."""
    instructions: str | None = None
    """Goes before the input, as the system's message."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    ignore_eos: bool = False
    """As in a chat; vLLM's, for load generators, who want an output of a known length."""
    stop: Annotated[Any, WithJsonSchema(_STOP)] = None
    """As in a chat; vLLM's."""
    stream: bool = False
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    include: Annotated[list[Includable], FailFast()] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Alternatives of each token; needs ``message.output_text.logprobs`` in ``include``."""
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS), FailFast()] = Field(default_factory=list)
    tool_choice: Annotated[ToolChoice, WithJsonSchema(CHOICE_SCHEMA), Field(json_schema_extra={"default": "auto"})] = (
        ToolChoice()
    )
    """none, auto, required, one function by name, or some of them: the model hears of no others then."""
    parallel_tool_calls: bool = True
    """False: only the first call of an answer is told."""
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Limits calls of tools that the service runs, and there are none."""
    service_tier: ServiceTier | None = None
    """As in a chat."""
    metadata: Annotated[dict[str, str], WithJsonSchema(_METADATA)] | None = None
    """Up to 16 pairs of strings: keys of up to 64 characters, values of up to 512."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """A label, as in a chat."""
    store: bool = True
    """Accepted; nothing is stored, and the answer says false."""
    previous_response_id: Annotated[str, WithJsonSchema(_NOTHING)] | None = None
    """Only null."""

    @field_validator("input", mode="before")
    @classmethod
    def _messages(cls, value: Any) -> tuple[Json, ...]:
        return messages_of(value)

    @field_validator("metadata", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return Sampled._pairs(value)

    @field_validator("previous_response_id", mode="before")
    @classmethod
    def _no_state(cls, value: Any) -> Any:
        raise refuse("previous_response_not_found", NO_STATE)  # OpenAI's code: who knows it sends everything again

    @field_validator("tools", mode="before")
    @classmethod
    def _functions(cls, value: Any) -> Any:
        check_kinds(value)
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> ToolChoice:
        return choice_of(value)

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponsesRequest:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise refuse("wrong_field", f"is only allowed with {LOGPROBS!r} in 'include'", "top_logprobs")
        names = {tool.name for tool in self.tools}
        if unknown := sorted((self.tool_choice.allowed or frozenset()) - names):
            shown = f"allows {unknown[0][:64]!r}, which is none of the functions: {', '.join(sorted(names))[:500]}"
            raise refuse("wrong_tool_choice", shown, "tool_choice")
        return self

    def as_chat(self) -> ChatRequest:
        """The chat that this asks for.

        Raises:
            InvalidRequest: ``text.format`` is not supported, or something else in it is wrong.
        """
        return self._chat

    @cached_property
    def _chat(self) -> ChatRequest:
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        allowed = self.tool_choice.allowed
        wants_logprobs = LOGPROBS in self.include
        chat: Json = {
            "model": self.model,
            "messages": [*instructions, *self.input],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "ignore_eos": self.ignore_eos,
            "stop": self.stop,
            "stream": self.stream,
            "logprobs": wants_logprobs,
            "top_logprobs": self.top_logprobs if wants_logprobs else None,
            "tools": [tool.of_chat for tool in self.tools if allowed is None or tool.name in allowed],
            "tool_choice": self.tool_choice.of_chat,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort,
            "service_tier": self.service_tier,
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
        theirs = next((one for one in OUR_NAMES if detail.startswith(one)), None)
        if theirs is not None:
            told, colon, rest = detail.partition(":")
            detail = _ours(told) + colon + rest
        raise InvalidRequest(detail, error.param and _ours(error.param), error.code) from None


def _ours(param: str) -> str:
    for theirs, ours in OUR_NAMES.items():
        if param == theirs or param.startswith((theirs + ".", theirs + "[")):
            # Places in the conversation are others than those in the input.
            return ours if ours == "input" else ours + param.removeprefix(theirs)
    return param
