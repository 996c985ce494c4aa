"""The input of ``/v1/responses`` as the messages of a chat: what was said, what was called, and what came of it.

Calls that stand behind a message of the assistant, or behind each other, are one turn of it, as a chat writes them.
"""

from __future__ import annotations

from typing import Any

from fairserve.api.body_errors import refuse
from fairserve.api.openai_schema import MAX_NAME_CHARS

Json = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
PARTS = ("input_text", "output_text")
"""What is said, and what was answered."""
KINDS = ("message", "function_call", "function_call_output")
MESSAGE_FIELDS = {"type", "role", "content", "id", "status", "phase"}
"""The last three are of an earlier answer that is sent again, and mean nothing here; so below."""
CALL_FIELDS = {"type", "call_id", "name", "arguments", "id", "status", "parsed_arguments"}
OUTPUT_FIELDS = {"type", "call_id", "output", "name", "id", "status"}
PART_FIELDS = {"type", "text", "annotations", "logprobs", "parsed"}
"""``parsed`` and ``parsed_arguments`` are what the openai package adds to an answer that it has parsed."""
MAX_ID_CHARS = 256
"""Of a call's id, and of its function's name: the limit of a chat."""

# What is accepted, for the description. A null counts as left out.
_PART = {
    "type": "object",
    "properties": {"type": {"enum": [*PARTS]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_ID = {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARS}
_MESSAGE = {
    "type": "object",
    "properties": {"type": {"enum": ["message", None]}, "role": {"enum": [*ROLES]}, "content": _TEXT},
    "required": ["role", "content"],
}
_CALL = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call"},
        "call_id": _ID,
        "name": _ID,
        "arguments": {"type": "string", "description": "JSON, as text"},
    },
    "required": ["type", "call_id", "name", "arguments"],
}
_OUTPUT = {
    "type": "object",
    "properties": {"type": {"const": "function_call_output"}, "call_id": _ID, "output": _TEXT},
    "required": ["type", "call_id", "output"],
}
INPUT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"anyOf": [_MESSAGE, _CALL, _OUTPUT]}, "minItems": 1},
    ]
}


def messages_of(value: Any) -> tuple[Json, ...]:
    """The chat's messages that an ``input`` stands for.

    Raises:
        PydanticCustomError: it is no input, holds what is not supported, or answers a call that is not in it.
    """
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value:
        raise refuse("wrong_input", "must be a string or a list of messages")
    messages: list[Json] = []
    call_ids: set[str] = set()
    for i, item in enumerate(value):
        where = f"item {i}"
        if not isinstance(item, dict):
            raise refuse("wrong_item", f"{where} is not an object")
        item = {name: one for name, one in item.items() if one is not None}
        match item.get("type", "message"):
            case "message":
                messages.append(_message(where, item))
            case "function_call":
                call = _call(where, item)
                call_ids.add(call["id"])
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append(_result(where, item, call_ids))
            case kind:
                raise refuse("unsupported_item", f"{where} has type {_shown(kind)}: {_instead(kind)}")
    return tuple(messages)


def _instead(kind: Any) -> str:
    if kind == "item_reference":
        return "answers are not kept here, so send the item itself"
    return f"supported are {', '.join(KINDS)}"


def _message(where: str, item: Json) -> Json:
    role = item.get("role")
    if role not in ROLES:
        raise refuse("wrong_item", f"{where} has role {_shown(role)}: allowed are {', '.join(ROLES)}")
    _check_fields(where, item, MESSAGE_FIELDS)
    return {"role": role, "content": _text(where, item, "content")}


def _call(where: str, item: Json) -> Json:
    _check_fields(where, item, CALL_FIELDS)
    function = {"name": _name(where, item, "name"), "arguments": _string(where, item, "arguments")}
    return {"id": _name(where, item, "call_id"), "type": "function", "function": function}


def _result(where: str, item: Json, call_ids: set[str]) -> Json:
    _check_fields(where, item, OUTPUT_FIELDS)
    call_id = _name(where, item, "call_id")
    if call_id not in call_ids:
        detail = f"{where} answers the call {_shown(call_id)}, and no function_call before it has this call_id"
        raise refuse("wrong_item", f"{detail}: answers are not kept here, so send the call, too")
    return {"role": "tool", "tool_call_id": call_id, "content": _text(where, item, "output")}


def _text(where: str, item: Json, field: str) -> str:
    """A string, or what the parts of a list say, joined by newlines."""
    value = item.get(field)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse("wrong_item", f"{where} has neither a string nor a list of parts in {field!r}")
    return "\n".join(_part(f"part {i} of {where}", part) for i, part in enumerate(value))


def _part(where: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise refuse("wrong_part", f"{where} is not an object")
    kind = part.get("type")
    if kind not in PARTS:
        allowed = " and ".join(map(repr, PARTS))
        raise refuse("unsupported_part", f"{where} has type {_shown(kind)}: only {allowed} are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise refuse("wrong_part", f"{where} has no string in 'text'")
    _check_fields(where, {name: one for name, one in part.items() if one is not None}, PART_FIELDS)
    return text


def _string(where: str, item: Json, field: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise refuse("wrong_item", f"{where} has no string in {field!r}")
    return value


def _name(where: str, item: Json, field: str) -> str:
    value = _string(where, item, field)
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise refuse("wrong_item", f"{where} has {len(value)} characters in {field!r}: 1 to {MAX_ID_CHARS} are allowed")
    return value


def _check_fields(where: str, found: Json, known: set[str]) -> None:
    for name in found:
        if name not in known:
            raise refuse("unknown_field", f"{where} has an unknown field {name[:MAX_NAME_CHARS]!r}")


def _shown(value: Any) -> str:
    return repr(value)[:MAX_NAME_CHARS]
