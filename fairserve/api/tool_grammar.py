"""The grammar of an answer that must call a function, or may in place of an answer of a given form; calls are written
as the model writes them."""

from __future__ import annotations

import json
from typing import Any

from fairserve.api.openai_schema import Function
from fairserve.api.tool_formats import Format
from fairserve.api.tools import Toolbox
from fairserve.engine.request import Grammar

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
Json = dict[str, Any]


def grammar_of(written: Format, toolbox: Toolbox) -> Grammar:
    """What the whole output must be: calls of these functions and nothing else, one where only one is told."""
    functions = [tool.function for tool in toolbox.tools if tool.function.name in toolbox.names]
    is_list = bool(written.opening)
    place = "#/items" if is_list else "#"
    if len(functions) == 1:
        call = _call(functions[0], written.key, place)
    else:
        call = {"anyOf": [_call(one, written.key, f"{place}/anyOf/{i}") for i, one in enumerate(functions)]}
    is_one = not toolbox.is_parallel or bool(toolbox.choice.name)
    if written.has_marker_in_grammar:
        more = "" if is_one else ' ("\\n" call)*'
        begin, end = json.dumps(written.marker + "\n"), json.dumps("\n" + written.end)
        return Grammar("lark", f"start: call{more}\ncall: {begin} object {end}\nobject: %json {json.dumps(call)}\n")
    if is_list:
        call = {"type": "array", "items": call, "minItems": 1} | ({"maxItems": 1} if is_one else {})
    return Grammar("json_schema", json.dumps(call))


def grammar_of_either(written: Format, toolbox: Toolbox, answer: Grammar) -> Grammar | None:
    """Calls, as :func:`grammar_of` has them, or an ``answer`` of JSON; None where the two cannot be told apart so."""
    if answer.kind not in ("json_schema", "json_object") or written.opening:
        return None
    calls = grammar_of(written, toolbox)
    schema = answer.text or '{"type": "object"}'
    if calls.kind == "json_schema":
        return Grammar("lark", f"start: call | answer\ncall: %json {calls.text}\nanswer: %json {schema}\n")
    return Grammar("lark", calls.text.replace("start: ", "start: answer | ", 1) + f"answer: %json {schema}\n")


def _call(function: Function, key: str, place: str) -> Json:
    """``place``: where this schema will stand, as a JSON pointer."""
    arguments = NO_ARGUMENTS if function.parameters is None else function.parameters
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, key: _moved(arguments, f"{place}/properties/{key}")},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """``schema`` as a part of another one, where its references to itself lead to ``place``."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: place + value[1:] if name == "$ref" and str(value).startswith("#") else _moved(value, place)
        for name, value in schema.items()
    }
