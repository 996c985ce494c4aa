"""A conversation as the text that the model's own chat template makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2
from pydantic_core import from_json

from fairserve.api.openai_schema import Message
from fairserve.errors import InvalidRequest

Json = dict[str, Any]
RESERVED = frozenset({"messages", "conversation", "chat_template", "tools", "kwargs"})
"""Variables of a template that ``chat_template_kwargs`` cannot set, beside the renderer's own parameters."""


class Templated(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: list[Json], *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a conversation is rendered: the assistant's turn follows, unless one of the two last says otherwise."""

    tools: tuple[Json, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More of what the template may ask for."""
    adds_prompt: bool = True
    """The head of the assistant's turn stands at the end."""
    is_continued: bool = False
    """The last message stays open, to be continued."""

    @property
    def num_chars(self) -> int:
        return len(str(self.tools)) + len(str(self.variables))


PLAIN = Rendering()


class Conversations:
    """Renders for one tokenizer."""

    def __init__(self, tokenizer: Templated) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.chat_template)
        self._shows_tools = False
        """A prompt with tools was seen to differ from the same without."""
        own = inspect.signature(tokenizer.apply_chat_template).parameters if tokenizer.chat_template else {}
        self._reserved = RESERVED | frozenset(own)

    def knows(self, variable: str) -> bool:
        """The template speaks of it."""
        return variable in self._template

    def render(self, messages: Sequence[Message], how: Rendering = PLAIN) -> str:
        """
        Raises:
            InvalidRequest: the template refuses this conversation, has no place for tools, or
                ``chat_template_kwargs`` names what is not the caller's.
        """
        if taken := sorted(self._reserved & how.variables.keys()):
            detail = f"chat_template_kwargs: {taken[0]!r} is not a variable that a request may set"
            raise InvalidRequest(detail, param=f"chat_template_kwargs.{taken[0]}", code="chat_template")
        turns = [self._turn(message) for message in messages]
        text = self._rendered(turns, how)
        if how.tools and not self._shows_tools:
            self._shows_tools = text != self._rendered(turns, how, tools=())
            if not self._shows_tools:
                raise no_tools("this model's chat template has no place for tools")
        return text

    def _rendered(self, turns: list[Json], how: Rendering, tools: Sequence[Json] | None = None) -> str:
        offered = list(how.tools if tools is None else tools)
        more = dict(how.variables) | ({"tools": offered} if offered else {})
        if how.is_continued:
            more["continue_final_message"] = True
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=how.adds_prompt and not how.is_continued, **more
            )
        except jinja2.TemplateError as error:
            said = str(error)
        except Exception as error:  # a template computes with what the caller sent, and fails like any program
            said = f"it fails on them with {type(error).__name__}: {error}"
        else:
            assert isinstance(text, str)
            return text
        detail = f"messages: this model's chat template refuses them: {said[:200]}"
        raise InvalidRequest(detail, param="messages", code="chat_template")

    def _turn(self, message: Message) -> Json:
        turn = message.model_dump(exclude_none=True, exclude={"tool_calls"})
        if message.role == "developer" and not self.knows("developer"):
            turn["role"] = "system"  # OpenAI's newer name of the same role
        if message.tool_calls:
            turn |= {"content": message.content or "", "tool_calls": [_call(one) for one in message.tool_calls]}
        return turn


def no_tools(why: str) -> InvalidRequest:
    detail = f"tools: {why}, so tools are not supported with it"
    return InvalidRequest(detail, param="tools", code="unsupported_parameter")


def _call(call: Any) -> Json:
    """Templates write arguments as JSON themselves, so they get the object; text that is none they get as it is."""
    text = call.function.arguments
    try:
        arguments = from_json(text, allow_inf_nan=False)
    except ValueError:
        arguments = text
    function = {"name": call.function.name, "arguments": arguments if isinstance(arguments, dict) else text}
    return {"id": call.id, "type": "function", "function": function}
