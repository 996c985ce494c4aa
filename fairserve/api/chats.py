"""What a chat asks for beyond its messages: how they are rendered, which functions may be called and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fairserve import __version__
from fairserve.api.conversation import Conversations, Rendering, no_tools
from fairserve.api.openai_schema import Body, ChatRequest
from fairserve.api.tool_answers import NewParser
from fairserve.api.tool_calls import CallParser
from fairserve.api.tool_formats import FORMATS, Format, format_of
from fairserve.api.tool_grammar import grammar_of, grammar_of_either
from fairserve.api.tools import Toolbox
from fairserve.config import FairServeArgs
from fairserve.engine.request import Grammar, SamplingParams
from fairserve.errors import InvalidRequest

NEUTRAL_EFFORT = "medium"


class Chats:
    """Of one served model."""

    def __init__(self, args: FairServeArgs, tokenizer: Any, conversations: Conversations) -> None:
        self._format = format_of(tokenizer.chat_template, args.api.tool_format)
        self._conversations = conversations
        self._shows_special = self._format is not None and self._format.shows_special(tokenizer)

    def rendering(self, body: ChatRequest) -> Rendering:
        """
        Raises:
            InvalidRequest: the model has no tools, or does not know ``reasoning_effort``.
        """
        toolbox, variables = body.toolbox, dict(body.chat_template_kwargs)
        if toolbox is not None:
            self._known_format()
        if body.reasoning_effort is not None and self._conversations.knows("reasoning_effort"):
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        elif body.reasoning_effort not in (None, NEUTRAL_EFFORT):
            detail = f"reasoning_effort: not supported by this model: leave it out, or send {NEUTRAL_EFFORT!r}"
            raise InvalidRequest(detail, param="reasoning_effort", code="unsupported_value")
        return Rendering(
            tools=() if toolbox is None else tuple(tool.as_told for tool in toolbox.tools),
            variables=variables,
            adds_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            is_continued=body.continue_final_message,
        )

    def shaped(self, body: Body) -> dict[str, Grammar]:
        """What an output must be in which functions have a say, by the field that says so.

        Raises:
            InvalidRequest: the answer must have a form that leaves no room for the calls that are allowed.
        """
        toolbox = body.toolbox if isinstance(body, ChatRequest) else None
        if not isinstance(body, ChatRequest) or toolbox is None:
            return {}
        if toolbox.choice.must_call:
            return {"tools": grammar_of(self._known_format(), toolbox)}
        answer = next(iter(body.grammars.values()), None)
        if answer is None:
            return {}
        either = grammar_of_either(self._known_format(), toolbox, answer)
        if either is None:
            detail = (
                "tools: the answer must have a form of its own, in which nothing can be called: send tool_choice 'none'"
            )
            raise InvalidRequest(detail, param="tools", code="unsupported_parameter")
        return {"tools": either}

    def sampling(self, body: Body, sampling: SamplingParams, shaped: Mapping[str, Grammar]) -> SamplingParams:
        """``sampling``, such that calls can be read and, where one must be made, that it is; ``shaped``: see there."""
        if not isinstance(body, ChatRequest) or body.toolbox is None:
            return sampling
        if self._shows_special:
            sampling = replace(sampling, skip_special_tokens=False)
        return replace(sampling, grammar=shaped.get("tools"))

    def parsers(self, toolbox: Toolbox) -> NewParser:
        """What reads the answers to a request with this toolbox."""
        written, functions, is_parallel = self._known_format(), toolbox.functions, toolbox.is_parallel
        is_begun = toolbox.choice.must_call and not written.has_marker_in_grammar

        def parser(is_piecewise: bool) -> CallParser:
            return CallParser(written, functions, is_parallel=is_parallel, is_piecewise=is_piecewise, is_begun=is_begun)

        return parser

    def _known_format(self) -> Format:
        if self._format is None:
            raise no_tools(f"this model's chat template shows none of the known ways of calling ({', '.join(FORMATS)})")
        return self._format


def fingerprint_of(args: FairServeArgs, adapter: str = "") -> str:
    """``system_fingerprint``, of the model or one of its LoRA adapters: changes with the model, the version, and every
    setting that can change an output."""
    engine = args.engine.model_dump(
        include={"device", "dtype", "attention", "cpu_linear", "tensor_parallel_size", "max_model_len", "seed"}
    )
    told = [__version__, args.model, args.model_name, args.api.tool_format, engine]
    if adapter:
        told.append([adapter, args.engine.adapters[adapter]])
    return f"fp_{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]}"
