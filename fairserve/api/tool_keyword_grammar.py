"""The grammar of calls that name every argument by itself, in Python's notation or between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import regex_to_lark

from fairserve.api.tool_formats import Format
from fairserve.api.tool_types import STRING, properties_of, resolved, types_of
from fairserve.engine.grammar import json_rule
from fairserve.errors import InvalidRequest

Json = dict[str, Any]

_TOLD = frozenset({"$comment", "$defs", "$id", "$schema", "additionalProperties", "default", "definitions"})
_TOLD |= {"deprecated", "description", "examples", "properties", "required", "strict", "title", "type"}
"""What a schema of arguments may say: the rest is about several of them at once."""
_PYTHON_KEY = re.compile(r"[^\s=(),\"']{1,256}")
_TAG_KEY = re.compile(r"[^\s<>]([^<>\r\n]{0,198}[^\s<>])?")
_WORDS = {frozenset({"boolean"}): '"True" | "False"', frozenset({"null"}): '"None"'}
"""As Python has them; within other values they stand as in JSON."""
_OTHERS = r"~/\s*(true|false|null|True|False|None|[-+.0-9\[({\"'])(?s:.*)/"
"""A text that can be taken for nothing else, where something else may stand."""


class KeywordGrammar:
    """Of calls of these functions: name -> JSON Schema of the arguments, or None."""

    def __init__(self, written: Format, functions: Mapping[str, Json | None]) -> None:
        """
        Raises:
            InvalidRequest: a schema says more than what each argument is by itself, or has a name for one that this
                notation cannot write.
        """
        self._format = written
        self._rules: list[str] = []
        self._calls = [self._function(name, schema or {}) for name, schema in functions.items()]

    def lark(self, is_one: bool) -> str:
        """``is_one``: one call and no more."""
        written, tags = self._format, self._format.tags
        between = ", " if written.is_list else "\n"
        calls = "call" if is_one else f"call ({_text(between)} call)*"
        function = " | ".join(self._calls)
        if tags is not None:
            begin = written.marker + "\n" * bool(tags.opening)
            call = f"{_text(begin)} ({function})" + f" {_text(chr(10) + written.end)}" * (written.end != tags.end)
        else:
            begin, end = ("[", "]") if written.is_list else (written.marker + "\n", "\n" + written.end)
            calls, call = f"{_text(begin)} {calls} {_text(end)}", function
        return "\n".join([f"start: {calls}", f"call: {call}", *self._rules, ""])

    def _rule(self, expression: str, prefix: str = "r") -> str:
        """``prefix``: in capital letters for what the lexer takes as one."""
        name = f"{prefix}{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def _function(self, name: str, root: Json) -> str:
        schema = resolved(root, root)
        schema = schema if isinstance(schema, dict) else {}
        if beyond := sorted(schema.keys() - _TOLD):
            raise self._refused(f"the parameters of {name!r} say {beyond[0]!r}, which is about several of them at once")
        required = set(schema.get("required") or ())
        arguments = [
            (self._argument(name, key, one, root), key in required) for key, one in properties_of(root).items()
        ]
        tags = self._format.tags
        if tags is None:
            return self._rule(f"{_text(name + '(')} {_listed(arguments, self._rule)} {_text(')')}")
        rest = " ".join(one if is_required else f"{one}?" for one, is_required in arguments)
        begin = f"{_text(tags.opening + name + '>' + chr(10))}" if tags.opening else f'{_text(name)} "\\n"?'
        return self._rule(f"{begin} {rest} {_text(tags.end)}")

    def _argument(self, function: str, key: str, schema: Any, root: Json) -> str:
        tags = self._format.tags
        if not (_PYTHON_KEY if tags is None else _TAG_KEY).fullmatch(key):
            raise self._refused(f"the parameter {key[:80]!r} of {function!r} cannot be written")
        if tags is None:
            words = _WORDS.get(types_of(schema, root))
            is_open = isinstance(schema, dict) and not {"enum", "const", "$ref"} & schema.keys()
            value = self._rule(words) if words and is_open else self._json(schema, root)
            return self._rule(f"{_text(key + '=')} {value}")
        values = " | ".join(self._between_tags(schema, root, types_of(schema, root) != STRING, function, key))
        if tags.value:
            return self._rule(f'{_text(tags.key + key + tags.key_end)} "\\n"? {_text(tags.value)} ({values}) "\\n"?')
        begin = tags.key + key + tags.key_end + "\n" * tags.is_padded
        return self._rule(f'{_text(begin)} ({values}) "\\n"')

    def _between_tags(self, schema: Any, root: Json, is_mixed: bool, function: str, key: str) -> list[str]:
        """A value and the tag behind it, in all ways. ``is_mixed``: it may be something else than a string."""
        schema, types = resolved(schema, root), types_of(schema, root)
        if STRING.isdisjoint(types):
            return [f"{self._json(schema, root)} {self._end()}"]
        said: Json = schema if isinstance(schema, dict) else {}
        if "enum" in said or "const" in said:
            values = said.get("enum", [said.get("const")])
            texts = [one for one in values if isinstance(one, str)]
            others = [one for one in values if not isinstance(one, str)]
            found = [self._rule(f"({' | '.join(map(_text, texts))}) {self._end()}", "T")] if texts else []
            return found + ([f"{self._json({'enum': others}, root)} {self._end()}"] if others else [])
        if parts := said.get("anyOf") or said.get("oneOf"):
            return [one for part in parts for one in self._between_tags(part, root, is_mixed, function, key)]
        found = [self._string(said, is_mixed, function, key)]
        if others := sorted(types - STRING):
            found.append(f"{self._json({**said, 'type': others}, root)} {self._end()}")
        return found

    def _string(self, schema: Json, is_mixed: bool, function: str, key: str) -> str:
        tags = self._format.tags
        assert tags is not None
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        parts = [rf"/(?s:.){{{least},{most}}}/" if least or most != "" else "/(?s:.*)/"]
        if isinstance(pattern := schema.get("pattern"), str):
            if _has_bare_alternatives(pattern):
                raise self._refused(f"the pattern of {key!r} of {function!r} has alternatives outside of parentheses")
            begin = "" if pattern.startswith("^") else "(?s:.*)"
            end = "" if pattern.endswith("$") else "(?s:.*)"
            inner = regex_to_lark(pattern.removeprefix("^").removesuffix("$"), use_ascii="d")
            parts.append(f"/{begin}({inner}){end}/")
        closing = tags.value_end.replace("/", r"\/")
        parts += [f"~/(?s:.*){closing}(?s:.*)/", *[_OTHERS] * is_mixed]
        text = self._rule(" & ".join(parts), "T")
        return self._rule(f"{text} {self._end()}", "T")

    def _end(self) -> str:
        tags = self._format.tags
        assert tags is not None
        return _text("\n" * tags.is_padded + tags.value_end)

    def _json(self, schema: Any, root: Json) -> str:
        """A rule for a value in JSON."""
        if '"$ref"' in json.dumps(schema):  # what it refers to comes with it
            place = "#/$defs/root"
            schema = {**moved(schema, place), "$defs": {"root": moved(root, place)}}
        return self._rule(json_rule(schema), "j")

    def _refused(self, why: str) -> InvalidRequest:
        detail = (
            f"tools: {why}, so a call cannot be held to it in this model's way of calling ({self._format.name}): "
            "send tool_choice 'auto', and no response_format"
        )
        return InvalidRequest(detail, param="tools", code="unsupported_parameter")


def moved(schema: Any, place: str) -> Any:
    """``schema`` as a part of another one, where its references to itself lead to ``place``, a JSON pointer."""
    if isinstance(schema, list):
        return [moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: place + value[1:] if name == "$ref" and str(value).startswith("#") else moved(value, place)
        for name, value in schema.items()
    }


def _listed(arguments: list[tuple[str, bool]], rule: Callable[[str], str]) -> str:
    """Arguments in their order with commas between them, those that may be left out included."""
    rest: list[str] = [""]
    """Of what may stand behind the i-th, from the last on."""
    for one, is_required in reversed(arguments):
        behind = f'", " {one}' if is_required else f'(", " {one})?'
        rest.append(rule(f"{behind} {rest[-1]}"))
    rest.reverse()
    firsts = []
    for i, (one, is_required) in enumerate(arguments):
        firsts.append(f"{one} {rest[i + 1]}")
        if is_required:
            return f"({' | '.join(firsts)})"
    return f"({' | '.join(firsts)})?" if firsts else ""


def _has_bare_alternatives(pattern: str) -> bool:
    bare = re.sub(r"\\.|\[\^?\]?(\\.|[^\]])*\]", "", pattern)
    depth = 0
    for sign in bare:
        depth += (sign == "(") - (sign == ")")
        if sign == "|" and depth == 0:
            return True
    return False


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
