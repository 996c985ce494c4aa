"""Calls written as JSON, name and arguments in one object or the arguments behind the name: read as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

MAX_HEAD = 256
"""Characters in which the usual beginning of a call must be over."""
KEYED = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""The usual beginning of a call: from its end on the arguments can be given out as they come."""
BARE = re.compile(r"\s*([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\]\s*[A-Za-z0-9]+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
"""Or the arguments alone in braces, behind the name."""


class Braces:
    """Finds where an object of JSON ends, in text that grows."""

    def __init__(self, start: int = 0) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def end(self, text: str) -> int | None:
        """The place behind the closing brace; None: it is not there yet."""
        for at in range(self._at, len(text)):
            char = text[at]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char == "{":
                self._depth += 1
            elif char == "}":
                self._depth -= 1
                if self._depth == 0:
                    self._at = at
                    return at + 1
        self._at = len(text)
        return None


class JsonCall:
    """One call, from its first character on; see :class:`~fairserve.api.tool_calls.Call`."""

    def __init__(self, functions: Mapping[str, Any], heads: tuple[re.Pattern[str], ...] = (KEYED,)) -> None:
        self._functions = functions
        self._heads = heads
        self.raw = ""
        self.name = ""
        self.is_over = False
        self.is_text = False
        self._object = Braces()
        self._arguments = Braces()
        self._start = self._given = 0
        self._stop: int | None = None
        """Of the arguments, where it begins as usual."""

    def push(self, text: str) -> str:
        may_begin = not self.name and len(self.raw) <= MAX_HEAD
        self.raw += text
        head = self._head() if may_begin else None
        if head is not None and head[1] in self._functions:
            self.name, self._start, self._given = head[1], head.end(), head.end()
            self._arguments = Braces(head.end())
        if self.name and self._stop is None:
            self._stop = self._arguments.end(self.raw)
        if self.raw[0] == "{":
            end = self._object.end(self.raw)
        elif self.name:
            end = self._stop
        else:
            self.is_over = self.is_text = len(self.raw) > MAX_HEAD or "{" in self.raw
            return ""
        if end is None:
            return ""
        self.is_over = True
        self.raw, rest = self.raw[:end], self.raw[end:]
        return rest

    def _head(self) -> re.Match[str] | None:
        beginning = self.raw[: MAX_HEAD + 1]
        return next((found for head in self._heads if (found := head.match(beginning))), None)

    def ready(self) -> str:
        end = len(self.raw) if self._stop is None else self._stop
        text, self._given = self.raw[self._given : end], end
        return text

    def whole(self) -> tuple[str, str] | None:
        if self.name:
            text = self.raw[self._start : self._stop]
            return (self.name, text) if self._stop is not None and _is_object(text) else None
        try:
            call = from_json(self.raw, allow_inf_nan=False)
        except ValueError:
            return None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._functions:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            return (name, arguments) if _is_object(arguments) else None
        return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(from_json(text, allow_inf_nan=False), dict)
    except ValueError:
        return False
