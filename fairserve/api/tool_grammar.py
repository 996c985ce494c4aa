"""The grammar of an answer that must call a function, or may in place of an answer of a given form; calls are written
as the model writes them."""

from __future__ import annotations

import json
from typing import Any

from fairserve.api.tool_formats import Format
from fairserve.api.tool_keyword_grammar import KeywordGrammar, moved
from fairserve.api.tools import Toolbox
from fairserve.engine.grammar import json_rule
from fairserve.engine.request import Grammar

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
Json = dict[str, Any]


def grammar_of(written: Format, toolbox: Toolbox) -> Grammar:
    """What the whole output must be: calls of these functions and nothing else, one where only one is told.

    Raises:
        InvalidRequest: this notation cannot hold the arguments to the schema of one.
    """
    functions = list(toolbox.functions.items())
    is_one = not toolbox.is_parallel or bool(toolbox.choice.name)
    if not written.is_json:
        return Grammar("lark", KeywordGrammar(written, toolbox.functions).lark(is_one))
    place = "#/items" if written.is_list else "#"
    if len(functions) == 1:
        call = _call(*functions[0], written.key, place)
    else:
        call = {"anyOf": [_call(*one, written.key, f"{place}/anyOf/{i}") for i, one in enumerate(functions)]}
    if written.has_marker_in_grammar:
        more = "" if is_one else ' ("\\n" call)*'
        begin, end = json.dumps(written.marker + "\n"), json.dumps("\n" + written.end)
        return Grammar("lark", f"start: call{more}\ncall: {begin} object {end}\nobject: {json_rule(call)}\n")
    if written.is_list:
        call = {"type": "array", "items": call, "minItems": 1} | ({"maxItems": 1} if is_one else {})
    return Grammar("json_schema", json.dumps(call))


def grammar_of_either(written: Format, toolbox: Toolbox, answer: Grammar) -> Grammar | None:
    """Calls, as :func:`grammar_of` has them, or an ``answer`` of JSON; None where the two cannot be told apart so.

    Raises:
        InvalidRequest: as there.
    """
    if answer.kind not in ("json_schema", "json_object") or (written.is_list and written.is_json):
        return None
    calls = grammar_of(written, toolbox)
    try:
        form = json_rule(json.loads(answer.text or '{"type": "object"}'))
    except (ValueError, RecursionError):
        return answer  # which does not compile, and says why
    if calls.kind == "json_schema":
        call = json_rule(json.loads(calls.text))
        return Grammar("lark", f"start: call | answer\ncall: {call}\nanswer: {form}\n")
    return Grammar("lark", calls.text.replace("start: ", "start: answer | ", 1) + f"answer: {form}\n")


def _call(name: str, parameters: Json | None, key: str, place: str) -> Json:
    """``place``: where this schema will stand, as a JSON pointer."""
    arguments = NO_ARGUMENTS if parameters is None else parameters
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: moved(arguments, f"{place}/properties/{key}")},
        "required": ["name", key],
        "additionalProperties": False,
    }
