"""What a caller may ask of the output itself: OpenAI's ``response_format`` and ``logit_bias``, and vLLM's
``structured_outputs``, ``guided_json`` and its kin, ``allowed_token_ids``, ``bad_words`` and ``min_tokens``.

All ways to ask for a form become one :class:`~fairserve.engine.request.Grammar`, and a request may use one of them.
Whether a grammar compiles shows here, before the request waits for anything.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field, PlainValidator, WithJsonSchema

from fairserve.api.body_errors import refuse as _refuse
from fairserve.engine import grammar as grammars
from fairserve.engine.request import Grammar
from fairserve.errors import InvalidRequest

MAX_BIASES = 1_024
MAX_BIAS = 100.0
MAX_NAME_CHARS = 64
MAX_TOKEN_IDS = 4_096
"""In ``allowed_token_ids``."""
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 64
MAX_GBNF_CHARS = 8_192
"""Of a grammar in GBNF, which is translated into Lark here."""
Json = dict[str, Any]
Words = tuple[tuple[int, ...], ...]


def _text_of(schema: Any, field: str) -> str:
    """A JSON Schema as text, with its properties in their order."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict):
        raise _refuse("wrong_schema", "must be a JSON Schema: an object", field)
    try:
        return json.dumps(schema, separators=(",", ":"))
    except ValueError as error:
        raise _refuse("wrong_schema", f"cannot be read: {error}", field) from None


def _members(value: Any, known: Sequence[str], field: str = "") -> Json:
    """An object with these members and no others; a null counts as left out."""
    if not isinstance(value, dict):
        raise _refuse("wrong_format", "must be an object", field)
    for name in value:
        if name not in known:
            shown = f"unknown field {name[:MAX_NAME_CHARS]!r}, known fields: {', '.join(known)}"
            raise _refuse("unknown_field", shown, f"{field}.{name[:MAX_NAME_CHARS]}".removeprefix("."))
    return {name: one for name, one in value.items() if one is not None}


def _string(value: Json, name: str, field: str) -> str:
    if not isinstance(value.get(name, ""), str):
        raise _refuse("wrong_format", "must be a string", f"{field}{name}")
    return str(value.get(name, ""))


def _response_format(value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_schema":
        inner = _members(value, ("type", "json_schema")).get("json_schema")
        schema = _members(inner, ("name", "description", "schema", "strict"), "json_schema")
        if not 0 < len(_string(schema, "name", "json_schema.")) <= MAX_NAME_CHARS:
            raise _refuse("wrong_format", f"must have 1 to {MAX_NAME_CHARS} characters", "json_schema.name")
        _string(schema, "description", "json_schema.")
        if not isinstance(schema.get("strict", True), bool):
            raise _refuse("wrong_format", "must be true or false", "json_schema.strict")
        if "schema" not in schema:
            return Grammar("json_object")
        if isinstance(schema["schema"], str):
            raise _refuse("wrong_schema", "must be a JSON Schema: an object", "json_schema.schema")
        return Grammar("json_schema", _text_of(schema["schema"], "json_schema.schema"))
    if kind in ("text", "json_object"):
        _members(value, ("type",))
        return Grammar("json_object") if kind == "json_object" else None
    shown = "must be an object whose type is 'text', 'json_object' or 'json_schema'"
    raise _refuse("wrong_format", shown, "type" if isinstance(value, dict) else "")


def _regex(value: Any, field: str = "") -> Grammar:
    if not isinstance(value, str):
        raise _refuse("wrong_regex", "must be a string: a regular expression", field)
    return Grammar("regex", value)


def _choice(value: Any, field: str = "") -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise _refuse("wrong_choice", "must be a list of strings, with one at least", field)
    return Grammar("choice", json.dumps(value))


def _lark(value: Any, field: str = "") -> Grammar:
    if not isinstance(value, str):
        raise _refuse("wrong_grammar", "must be a string: a grammar in Lark or GBNF", field)
    if grammars.is_lark(value):
        return Grammar("lark", value)
    if len(value) > MAX_GBNF_CHARS:
        shown = f"has {len(value)} characters, at most {MAX_GBNF_CHARS} are allowed in GBNF: send it in Lark"
        raise _refuse("wrong_grammar", shown, field)
    try:
        return Grammar("lark", grammars.lark_of_gbnf(value))
    except InvalidRequest as error:
        raise _refuse("wrong_grammar", str(error), field) from None


def _json(value: Any, field: str = "") -> Grammar:
    return Grammar("json_schema", _text_of(value, field))


def _structured(value: Any) -> Grammar:
    given = _members(value, ("json", "regex", "choice", "grammar", "json_object"))
    if len(given) != 1:
        shown = f"holds {len(given)} of json, regex, choice, grammar and json_object: give one of them"
        raise _refuse("wrong_format", shown)
    ((name, one),) = given.items()
    if name == "json_object":
        if one is not True:
            raise _refuse("wrong_format", "must be true, or left out", name)
        return Grammar("json_object")
    return {"json": _json, "regex": _regex, "choice": _choice, "grammar": _lark}[name](one, name)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise _refuse("wrong_bias", "must be an object: token ids as strings, and what is added to their logits")
    if len(value) > MAX_BIASES:
        raise _refuse("wrong_bias", f"holds {len(value)} token ids, at most {MAX_BIASES} are allowed")
    biases = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise _refuse("wrong_bias", f"holds {key[:MAX_NAME_CHARS]!r}, which is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _refuse("wrong_bias", f"must be a number from {-MAX_BIAS:g} to {MAX_BIAS:g}", key)
        biases.append((int(key), float(bias)))
    return tuple(biases)


_SCHEMA = {"type": "object"}
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_JSON = {"anyOf": [_SCHEMA, {"type": "string"}]}


def _an(**properties: Any) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _or_null(one: Json) -> Json:
    return {"anyOf": [one, {"type": "null"}]}


_RESPONSE_FORMAT = {
    "anyOf": [
        _an(type={"enum": ["text", "json_object"]}) | {"required": ["type"]},
        _an(
            type={"const": "json_schema"},
            json_schema=_an(
                name={"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS},
                description=_or_null({"type": "string"}),
                schema=_or_null(_SCHEMA),
                strict=_or_null({"type": "boolean"}),
            )
            | {"required": ["name"]},
        )
        | {"required": ["type", "json_schema"]},
    ]
}
_STRUCTURED = {
    "anyOf": [
        _an(**{name: one}) | {"required": [name]}
        for name, one in {
            "json": _JSON,
            "regex": {"type": "string"},
            "choice": _STRINGS,
            "grammar": {"type": "string"},
            "json_object": {"const": True},
        }.items()
    ]
}
_BIASES = {
    "type": "object",
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}

ResponseFormat = Annotated[Grammar | None, PlainValidator(_response_format), WithJsonSchema(_RESPONSE_FORMAT)]
StructuredOutputs = Annotated[Grammar, PlainValidator(_structured), WithJsonSchema(_STRUCTURED)]
GuidedJson = Annotated[Grammar, PlainValidator(_json), WithJsonSchema(_JSON)]
GuidedRegex = Annotated[Grammar, PlainValidator(_regex), WithJsonSchema({"type": "string"})]
GuidedChoice = Annotated[Grammar, PlainValidator(_choice), WithJsonSchema(_STRINGS)]
GuidedGrammar = Annotated[Grammar, PlainValidator(_lark), WithJsonSchema({"type": "string"})]
LogitBias = Annotated[tuple[tuple[int, float], ...], PlainValidator(_logit_bias), WithJsonSchema(_BIASES)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]], Field(max_length=MAX_BAD_WORDS)
]
FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Of a body: each asks for one form of the output."""


class Ruled(Protocol):
    """The part of a request's body that is used here."""

    @property
    def logit_bias(self) -> tuple[tuple[int, float], ...]: ...

    @property
    def allowed_token_ids(self) -> list[int] | None: ...

    @property
    def grammars(self) -> Mapping[str, Grammar]: ...


def only_one(asked: Mapping[str, Grammar]) -> None:
    """
    Raises:
        PydanticCustomError: more than one field asks for a form.
    """
    if len(asked) > 1:
        first, second, *_ = asked
        raise _refuse("wrong_format", f"cannot be given together with {first}: give one of them", second)


async def check(body: Ruled, num_tokens: int, shaped: Mapping[str, Grammar]) -> None:
    """Whether it can be done; ``num_tokens``: the size of the vocabulary; ``shaped``: more grammars, by field.

    Raises:
        InvalidRequest: a token id is unknown, or the grammar does not compile.
    """
    named = {"logit_bias": [token for token, _ in body.logit_bias], "allowed_token_ids": body.allowed_token_ids or []}
    for field, token_ids in named.items():
        if token_ids and max(token_ids) >= num_tokens:
            detail = f"{field}: token ids must be below {num_tokens}, the size of the vocabulary, not {max(token_ids)}"
            raise InvalidRequest(detail[:200], param=field)
    for field, grammar in {**body.grammars, **shaped}.items():
        try:
            if not grammars.is_checked(grammar):
                await asyncio.get_running_loop().run_in_executor(grammars.COMPILING, grammars.check, grammar)
            grammars.check(grammar)
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error}", param=field, code=error.code) from None


class Encoder(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


def bad_words(tokenizer: Encoder, words: Sequence[str]) -> Words:
    """Each word as tokens, as it begins a text and as it follows a space where that is one token more or another."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(tokenizer.encode(word, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        found |= {plain: None}
        if len(spaced) == len(plain) and spaced[:1] != plain[:1]:  # else the space is a token of its own
            found |= {spaced: None}
    return tuple(one for one in found if one)
