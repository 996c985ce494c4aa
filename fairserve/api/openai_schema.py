"""What callers may send: the OpenAI request bodies, checked once, here.

Three rules. A field that nobody knows is refused, with the nearest known name. A field that OpenAI knows and
fairserve does not support is accepted at its neutral value and refused otherwise: nothing is silently ignored. A
``null`` means "left out", as OpenAI's own clients use it. ``user``, ``metadata``, ``safety_identifier`` and
``prompt_cache_key`` are labels: accepted, and neither stored nor used, except for three keys of ``metadata``
(:mod:`fairserve.api.labels`) and the ``user`` of a key with ``sub_clients``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from fairserve.api import output_rules
from fairserve.api.body_errors import invalid, refuse
from fairserve.api.tools import CHOICE_SCHEMA, MAX_TOOLS, MODES, NAME_PATTERN, NAMED, Choice, Toolbox, choice_of
from fairserve.engine.request import Grammar, SamplingParams
from fairserve.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512
"""Characters in one stop string; the engine holds back up to that much text."""
MAX_PAIRS = 16
"""Pairs in ``metadata``; this limit and the two of their sizes are OpenAI's."""
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512
MAX_NAME_CHARS = 64
"""Characters of an unknown field's name that an error repeats (and that are compared with the known names)."""
MIN_TEMPERATURE = 0.01
"""Below this a temperature other than 0 acts as this one, as in vLLM."""

Prompt = str | tuple[int, ...]
"""Text to tokenize, or token ids as they are."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
ServiceTier = Literal["auto", "default", "flex", "priority", "scale"]


# What the validators below accept, for the description.
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP = {"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}
_METADATA = {
    "type": "object",
    "maxProperties": MAX_PAIRS,
    "propertyNames": {"maxLength": MAX_KEY_CHARS},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE_CHARS},
}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STRINGS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
PROMPT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _STRINGS,
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
    ]
}


class Body(BaseModel):
    """A JSON object with the three rules above. Types are strict: "0.5" is not a number, 1 is not true."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field known to OpenAI -> the values that ask for nothing."""
    instead: ClassVar[Mapping[str, str]] = {}
    """Of some of these: what to send in its place."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value
            elif name not in cls.unsupported:
                raise cls._unknown(name)
            elif value is not None and not any(
                type(value) is type(neutral) and value == neutral for neutral in cls.unsupported[name]
            ):
                raise refuse("unsupported_field", f"is not supported yet: {cls._hint(name)}", name)
        return kept

    @classmethod
    def _hint(cls, name: str) -> str:
        if name in cls.instead:
            return f"send {cls.instead[name]} instead"
        neutral = [json.dumps(value) for value in cls.unsupported[name] if value not in ("", [], {})]
        return f"leave it out, or send {' or '.join(neutral)}" if neutral else "leave it out"

    @classmethod
    def _unknown(cls, name: Any) -> PydanticCustomError:
        name = str(name)[:MAX_NAME_CHARS]
        near = difflib.get_close_matches(name, [*cls.model_fields, *cls.unsupported], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(cls.model_fields)}"
        return refuse("unknown_field", f"unknown field, {hint}", name)


class StreamOptions(Body):
    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: with ``include_usage``, each chunk tells the usage until then. Load generators count tokens by it."""


class Function(Body):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments, an object. Left out: no arguments."""
    strict: bool | None = None
    """Accepted. The arguments of a call that was asked for (``required``, or by name) follow the schema in any case;
    those of a call that the model chose to make are what it said."""


class Tool(Body):
    type: Literal["function"]
    function: Function

    @property
    def as_told(self) -> dict[str, Any]:
        """What the chat template gets: what the caller said, without ``strict``."""
        return {"type": "function", "function": self.function.model_dump(exclude_unset=True, exclude={"strict"})}


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """JSON, as text."""
    parsed_arguments: Annotated[Any, Field(exclude=True)] = None
    """As ``parsed`` of a message."""


class ToolCall(Body):
    """A call that the assistant made in an earlier turn."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As in streams; not used."""


class Message(Body):
    unsupported = {
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }
    instead = {"function_call": "'tool_calls'"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, WithJsonSchema(_CONTENT)] = None
    """Text, or a list of text parts, which are joined by newlines. An assistant that only calls functions has none."""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS), FailFast()] = []
    """Of an assistant."""
    tool_call_id: str | None = None
    """Which call the message of a tool answers."""
    parsed: Annotated[Any, Field(exclude=True)] = None
    """The openai package adds it to an answer that it has parsed, and sends it back. Not used."""
    provider_specific_fields: Annotated[Any, Field(exclude=True)] = None
    """The same of litellm."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise refuse("wrong_field", "is only allowed in messages of the assistant", "tool_calls")
        if self.content is None and not self.tool_calls:
            raise refuse("missing", "Field required", "content")
        if self.role == "tool" and self.tool_call_id is None:
            raise refuse("missing", "is required: it says which call this is the result of", "tool_call_id")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "\n".join(_text_of_part(i, part) for i, part in enumerate(value))


def _text_of_part(index: int, part: Any) -> str:
    place = f"[{index}]"
    if not isinstance(part, dict):
        raise refuse("invalid_type", "is not an object", place)
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        shown = f"is {repr(kind)[:MAX_NAME_CHARS]}: only 'text' parts are supported"
        raise refuse("unsupported_part" if "type" in part else "missing", shown, f"{place}.type")
    if not isinstance(text, str):
        raise refuse("invalid_type" if "text" in part else "missing", "must be a string", f"{place}.text")
    for name in part:
        if name not in ("type", "text"):
            raise refuse("unknown_field", "unknown field, known fields: type, text", f"{place}.{name[:MAX_NAME_CHARS]}")
    return text


class Sampled(Body):
    """What chat and completions share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    """0 and -1: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Choice i of a prompt is drawn with seed + i."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    stop: Annotated[tuple[str, ...], WithJsonSchema(_STOP)] = ()
    """One string or up to 16 of them; the text ends before the first that appears."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128), FailFast()] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """vLLM's: alternatives for each token of the prompt. Not with a stream."""
    response_format: output_rules.ResponseFormat | None = None
    """Text, any JSON object, or what fits a JSON Schema."""
    structured_outputs: output_rules.StructuredOutputs | None = None
    """vLLM's: one of json (a schema), regex, choice, grammar and json_object."""
    guided_json: output_rules.GuidedJson | None = None
    guided_regex: output_rules.GuidedRegex | None = None
    guided_choice: output_rules.GuidedChoice | None = None
    guided_grammar: output_rules.GuidedGrammar | None = None
    """In Lark as llguidance has it, or in GBNF."""
    logit_bias: Annotated[output_rules.LogitBias, Field(json_schema_extra={"default": {}})] = ()
    """Token id, as a string -> what is added to its logit, -100 to 100."""
    allowed_token_ids: output_rules.TokenIds | None = None
    """No others are drawn, the end of the text included."""
    bad_words: output_rules.BadWords = []
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Before so many tokens nothing ends the output."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], WithJsonSchema(_METADATA)] | None = None
    """Up to 16 pairs of strings: keys of up to 64 characters, values of up to 512."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise refuse("invalid_type", "must be an object whose values are strings")
        if len(value) > MAX_PAIRS:
            shown = f"holds {len(value)} pairs, at most {MAX_PAIRS} are allowed"
            raise refuse("object_above_max_properties", shown)
        for key, text in value.items():
            if len(key) > MAX_KEY_CHARS:
                shown = f"has a key of {len(key)} characters, at most {MAX_KEY_CHARS}"
                raise refuse("property_name_above_max_length", shown)
            if not isinstance(text, str):
                raise refuse("invalid_type", "must be a string", key)
            if len(text) > MAX_VALUE_CHARS:
                shown = f"has {len(text)} characters, at most {MAX_VALUE_CHARS}"
                raise refuse("string_above_max_length", shown, key)
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> tuple[str, ...]:
        stop = [value] if isinstance(value, str) else value
        if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
            raise refuse("invalid_type", "must be a string or a list of strings")
        if len(stop) > MAX_STOP_STRINGS:
            shown = f"holds {len(stop)} strings, at most {MAX_STOP_STRINGS} are allowed"
            raise refuse("array_above_max_length", shown)
        if not all(0 < len(one) <= MAX_STOP_CHARS for one in stop):
            raise refuse("wrong_stop", f"every stop string must have 1 to {MAX_STOP_CHARS} characters")
        return tuple(stop)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise refuse("wrong_field", "is only allowed with stream = true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("wrong_field", "is only allowed with stream = false", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Sampled:
        output_rules.only_one(self.grammars)
        return self

    @property
    def grammars(self) -> dict[str, Grammar]:
        """What the output must be, by the field that says so; one at the most."""
        return {name: one for name in output_rules.FIELDS if (one := getattr(self, name)) is not None}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Each chunk tells the usage until then."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def asked_output(self) -> int | None:
        """Output tokens asked for, None when the caller left it open."""
        return self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """Alternatives per token, None when no log probabilities were asked for."""
        raise NotImplementedError

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """Alternatives per token of the prompt, None when no log probabilities of it were asked for."""
        return self.prompt_logprobs

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """The engine's parameters for the ``choice``-th (from 0) sequence of one prompt."""
        seed = self.seed
        if seed is not None:
            seed = (seed + choice + 2**63) % 2**64 - 2**63  # stays a signed 64-bit number
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=max(self.temperature, MIN_TEMPERATURE) if self.temperature > 0 else 0.0,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.asked_logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
            prompt_logprobs=self.asked_prompt_logprobs,
            grammar=next(iter(self.grammars.values()), None),
            logit_bias=self.logit_bias,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            min_tokens=min(self.min_tokens, max_tokens),
        )


class ChatRequest(Sampled):
    """The body of ``POST /v1/chat/completions``."""

    unsupported = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "moderation": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "store": (False,),
    }
    instead = {"functions": "'tools'", "function_call": "'tool_choice'"}

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """A label; what begins alike is found in the prefix cache without it."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()] = []
    tool_choice: Annotated[Choice | None, WithJsonSchema(CHOICE_SCHEMA)] = None
    """none, auto (which it is when it is left out), required, or one function by name."""
    parallel_tool_calls: bool = True
    """False: only the first call of an answer is told."""
    reasoning_effort: Effort | None = None
    """Told to a chat template that knows the word; any other model takes its neutral value, medium, alone."""
    service_tier: ServiceTier | None = None
    """What the key may not ask for is served as ``default``; the answer says which was used."""
    continue_final_message: bool = False
    """Continue the last message, of an assistant, instead of answering it."""
    add_generation_prompt: bool | None = None
    """False: the assistant's turn is not begun. Left out: it is, unless the last message is continued."""
    chat_template_kwargs: Annotated[dict[str, bool | int | float | str], Field(max_length=MAX_PAIRS)] = {}
    """Variables of the chat template, such as enable_thinking: up to 16 booleans, numbers and strings."""

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Choice:
        choice = choice_of(value)
        if choice is None:
            raise refuse("wrong_tool_choice", f"must be one of {', '.join(MODES)}, or {NAMED}")
        return choice

    @model_validator(mode="after")
    def _turns_agree(self) -> ChatRequest:
        choice, names = self.tool_choice or Choice(), [tool.function.name for tool in self.tools]
        if choice.must_call and not self.tools:
            raise refuse("wrong_tool_choice", "asks for a call, and there are no tools", "tool_choice")
        if len(set(names)) < len(names):
            raise refuse("wrong_tools", "must not name two functions alike", "tools")
        if choice.name and choice.name not in names:
            raise refuse("wrong_tool_choice", f"names none of the functions: {', '.join(names)[:500]}", "tool_choice")
        if self.continue_final_message and self.add_generation_prompt:
            raise refuse("wrong_field", "cannot be true with continue_final_message", "add_generation_prompt")
        if self.continue_final_message and (self.messages[-1].role != "assistant" or self.messages[-1].tool_calls):
            raise refuse("wrong_field", "needs a last message with text of the assistant", "continue_final_message")
        return self

    @property
    def toolbox(self) -> Toolbox | None:
        """What the model may call; None: nothing."""
        choice = self.tool_choice or Choice()
        if not self.tools or choice.mode == "none":
            return None
        return Toolbox(tuple(self.tools), choice, self.parallel_tool_calls)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("wrong_field", "is only allowed with logprobs = true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refuse("wrong_field", "differs from max_tokens: give one of the two", "max_completion_tokens")
        return self

    @property
    def asked_output(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """The body of ``POST /v1/completions``."""

    unsupported = {"suffix": ("",)}

    prompt: Annotated[tuple[Prompt, ...], WithJsonSchema(PROMPT)]
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 only with echo: the prompt is scored, and nothing follows it."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    """The text begins with the prompt, and logprobs with those of the prompt's tokens."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Only at its neutral value: equal to n."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> tuple[Prompt, ...]:
        return prompts_of(value)

    @model_validator(mode="after")
    def _no_ranking(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise refuse("unsupported_field", "is not supported yet: leave it out", "best_of")
        return self

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise refuse("wrong_field", "0 is only allowed with echo = true", "max_tokens")
        return self

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def asked_prompt_logprobs(self) -> int | None:
        asked = [num for num in (self.prompt_logprobs, self.logprobs if self.echo else None) if num is not None]
        return max(asked, default=None)


def prompts_of(value: Any) -> tuple[Prompt, ...]:
    """One or several prompts, as OpenAI writes them.

    Raises:
        PydanticCustomError: they are written in another way.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _are_token_ids(value):
            return (tuple(value),)
        if all(isinstance(one, list) and _are_token_ids(one) for one in value):
            return tuple(tuple(one) for one in value)
    raise refuse("wrong_prompt", "must be a string or token ids (integers from 0), or a list of such prompts")


def _are_token_ids(values: list[Any]) -> bool:
    return all(type(one) is int and one >= 0 for one in values)  # bool is an int, and no token


B = TypeVar("B", bound=Body)


def parse(model: type[B], raw: bytes) -> B:
    """Read one request body.

    Raises:
        InvalidRequest: not JSON (``NaN``, invalid UTF-8 and nesting beyond 200 levels included), or not a ``model``.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the request body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error) from None
