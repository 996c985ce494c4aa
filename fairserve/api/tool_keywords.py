"""Calls that name every argument by itself, in Python's notation or between tags: read character by character, and
given out as JSON."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from fairserve.api.tool_literals import SPACE, Malformed, converted, escaped, spaces, value
from fairserve.api.tool_types import STRING, properties_of, types_of

Steps = Generator[None, str, None]

MAX_NAME = 64
MAX_KEY = 256
"""Characters of an argument's name."""
_NAME = re.compile(r"[A-Za-z0-9_-]")
_KINDS = {'"': "string", "{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
"""By its first character in JSON; all others are numbers."""


class KeywordCall:
    """One call, from its first character on; see :class:`~fairserve.api.tool_calls.Call`."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        """``functions``: the JSON Schema of the arguments (or None) of each that may be called."""
        self._functions = functions
        self.raw = ""
        self.name = ""
        self.is_over = False
        self.is_text = False
        self._out: list[str] = []
        self._num_given = 0
        self._keys: set[str] = set()
        self._steps = self._read()
        next(self._steps)

    def push(self, text: str) -> str:
        num_taken = 0
        try:
            for char in text:
                num_taken += 1
                self._steps.send(char)
        except (Malformed, StopIteration) as end:
            self.is_over, self.is_text = True, isinstance(end, Malformed)
        self.raw += text[:num_taken]
        return text[num_taken:]

    def ready(self) -> str:
        text = "".join(self._out[self._num_given :])
        self._num_given = len(self._out)
        return text

    def whole(self) -> tuple[str, str] | None:
        return None if self.is_text or not self.is_over else (self.name, "".join(self._out))

    def _read(self) -> Steps:
        raise NotImplementedError

    def _begin(self, name: str) -> None:
        """
        Raises:
            Malformed: there is no such function.
        """
        if name not in self._functions:
            raise Malformed
        self.name = name
        self._out.append("{")

    def _add_key(self, key: str) -> None:
        """
        Raises:
            Malformed: it has been given.
        """
        if key in self._keys:
            raise Malformed
        self._out.append(f'{", " if self._keys else ""}"{escaped(key)}": ')
        self._keys.add(key)


class PythonCall(KeywordCall):
    """``name(key=value, ...)``. A value is a literal, of Python or of JSON."""

    def _read(self) -> Steps:
        name = ""
        while _NAME.match(char := (yield)) and len(name) < MAX_NAME:
            name += char
        if char != "(":
            raise Malformed
        self._begin(name)
        char = yield from spaces((yield))
        while char != ")":
            key = ""
            while char not in "=(),\"'" + SPACE and len(key) < MAX_KEY:
                key += char
                char = yield
            char = yield from spaces(char)
            if char != "=" or not key:
                raise Malformed
            self._add_key(key)
            char = yield from spaces((yield))
            char = yield from spaces((yield from value(char, self._out)))
            if char == ",":
                char = yield from spaces((yield))
            elif char != ")":
                raise Malformed
        self._out.append("}")


@dataclass(frozen=True, slots=True)
class Tags:
    """How a call is written between tags. Values stand as they are; strings have no quotes."""

    opening: str
    """What the name follows; "": the name begins the call, and ends with its line or before a tag."""
    key: str
    """What an argument's name follows."""
    key_end: str
    value_end: str
    end: str
    value: str = ""
    """A tag between the argument's name and its value."""
    is_padded: bool = False
    """A value stands on lines of its own when the model follows its template."""

    @property
    def whole(self) -> frozenset[str]:
        """Tags that can be tokens of their own."""
        named = (self.opening, self.key, self.key_end, self.value_end, self.end, self.value)
        return frozenset(one for one in named if one.startswith("<") and one.endswith(">"))


class TagCall(KeywordCall):
    """``<function=name><parameter=key>value</parameter></function>`` or with other tags. What a value is, a number or a
    text with digits, says the function's schema."""

    def __init__(self, functions: Mapping[str, Any], tags: Tags) -> None:
        self._tags = tags
        super().__init__(functions)

    def _read(self) -> Steps:
        tags, name = self._tags, ""
        if tags.opening:
            yield from self._literal(tags.opening, (yield))
            while (char := (yield)) != ">":
                name = _longer(name, char)
            self._begin(name)
            char = yield from spaces((yield))
        else:
            while (char := (yield)) not in "<\n":
                name = _longer(name, char)
            self._begin(name.rstrip())
            char = yield from spaces(char)
        schema = self._functions[self.name]
        schemas = properties_of(schema)
        while True:
            # The tags of an argument and of the end begin alike: only then is the next character awaited.
            shared = 0
            while char == tags.key[shared] == tags.end[shared]:
                shared += 1
                char = yield
            if char != tags.key[shared]:
                yield from self._literal(tags.end[shared:], char)
                self._out.append("}")
                return
            yield from self._literal(tags.key[shared:], char)
            key = ""
            while not key.endswith(tags.key_end):
                key = _longer(key, (yield), MAX_KEY)
            key = key.removesuffix(tags.key_end).strip()
            if tags.value:
                yield from self._literal(tags.value, (yield from spaces((yield))))
            self._add_key(key)
            yield from self._value(types_of(schemas.get(key, True), schema or {}))
            char = yield from spaces((yield))

    def _literal(self, wanted: str, char: str) -> Steps:
        """``char``: its first character, when it comes."""
        for at, sign in enumerate(wanted):
            if at:
                char = yield
            if char != sign:
                raise Malformed

    def _value(self, types: frozenset[str]) -> Steps:
        """A text is given out as it comes, except for what may be the end."""
        ends = [self._tags.value_end] + ["\n" + self._tags.value_end] * self._tags.is_padded
        is_string, text, held = types == STRING, "", ""
        if is_string:
            self._out.append('"')
        if (char := (yield)) == "\n" and self._tags.is_padded:
            char = yield
        while True:
            held += char
            while held and not any(end.startswith(held) for end in ends):
                if is_string:
                    self._out.append(escaped(held[0]))
                else:
                    text += held[0]
                held = held[1:]
            if held in ends:
                break
            char = yield
        self._out.append('"' if is_string else _typed(text, types))


def _typed(text: str, types: frozenset[str]) -> str:
    """As JSON: a value of one of the types, or a string where that may be or nothing else is to be seen in it."""
    found = converted(text)
    if found is not None:
        kind = _KINDS.get(found[0], "number")
        is_whole = kind == "number" and "integer" in types and float(found).is_integer()
        if "string" not in types or is_whole or (kind in types and kind != "string"):
            return found
    return f'"{escaped(text)}"'


def _longer(text: str, char: str, most: int = MAX_NAME + 1) -> str:
    if len(text) == most:
        raise Malformed
    return text + char
