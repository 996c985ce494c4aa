"""Values as models write them in calls, in Python's notation or JSON's, turned into JSON character by character.

Every reader is a generator: it is sent one character after another and returns the first one behind what it reads, so
the pieces in which a text comes make no difference. What it reads it adds to a list, as JSON, as soon as it is certain.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator

Reader = Generator[None, str, str]

MAX_DEPTH = 64
"""Of lists and dictionaries within each other."""
MAX_NUMBER = 400
"""Characters of a number; Python itself takes no longer ones than 4,300."""
SPACE = " \t\r\n"
WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
"""As JSON has it."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_ESCAPES |= {sign: sign for sign in "\\'\"/"}
_HEX = {"x": 2, "u": 4, "U": 8}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


class Malformed(Exception):
    """It is nothing of what a call may hold."""


def escaped(text: str) -> str:
    """As it stands within a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def spaces(char: str) -> Reader:
    while char in SPACE:
        char = yield
    return char


def value(char: str, out: list[str], depth: int = 0) -> Reader:
    """``char``: its first one. Tuples are lists.

    Raises:
        Malformed: it is a name, a call, a set, a number that JSON has not, or too deep.
    """
    if char in "\"'":
        return (yield from _string(char, out))
    if char in _CLOSING:
        if depth == MAX_DEPTH:
            raise Malformed
        return (yield from _items(char, out, depth + 1))
    if char.isdigit() or char in "+-.":
        return (yield from _number(char, out))
    word = ""
    while char.isalpha() and len(word) < 6:
        word += char
        char = yield
    if word not in WORDS or char.isalnum() or char == "_":
        raise Malformed
    out.append(WORDS[word])
    return char


def _items(opening: str, out: list[str], depth: int) -> Reader:
    """Of a list, a tuple or a dictionary; a comma may stand behind the last one."""
    closing, is_dictionary = _CLOSING[opening], opening == "{"
    out.append("{" if is_dictionary else "[")
    is_first = True
    char = yield from spaces((yield))
    while char != closing:
        if not is_first:
            out.append(", ")
        is_first = False
        if is_dictionary:
            if char not in "\"'":
                raise Malformed
            char = yield from spaces((yield from _string(char, out)))
            if char != ":":
                raise Malformed
            out.append(": ")
            char = yield from spaces((yield))
        char = yield from spaces((yield from value(char, out, depth)))
        if char == ",":
            char = yield from spaces((yield))
        elif char != closing:
            raise Malformed
    out.append("}" if is_dictionary else "]")
    return (yield)


def _number(char: str, out: list[str]) -> Reader:
    text = ""
    while (char.isascii() and char.isdigit()) or char in "+-.eE":
        text += char
        if len(text) > MAX_NUMBER:
            raise Malformed
        char = yield
    out.append(_as_json(text))
    return char


def _as_json(number: str) -> str:
    if NUMBER.fullmatch(number):
        return number
    try:
        read = int(number) if re.fullmatch(r"[+-]?[0-9]+", number) else float(number)  # such as .5, 1. and +1
    except ValueError:
        raise Malformed from None
    if not math.isfinite(read):
        raise Malformed
    return json.dumps(read)


def _string(quote: str, out: list[str]) -> Reader:
    """In single, double or three quotes. A line may end in it, as models write it."""
    out.append('"')
    char = yield
    is_long = False
    if char == quote:
        char = yield
        if char != quote:
            out.append('"')
            return char
        is_long = True
        char = yield
    held = 0
    """Quotes that may be the end of a long one."""
    while True:
        if char == quote:
            held += 1
            if held == 3 or not is_long:
                break
            char = yield
            continue
        if held:
            out.append(escaped(quote * held))
            held = 0
        if char == "\\":
            yield from _escape((yield), out)
        else:
            out.append(char if char.isalnum() and char.isascii() else escaped(_scalar(char)))
        char = yield
    out.append('"')
    return (yield)


def _escape(char: str, out: list[str]) -> Generator[None, str, None]:
    """What stands behind a backslash. As in Python, one that means nothing stays."""
    if char in _HEX:
        code = yield from _code(_HEX[char])
        if char == "u" and 0xD800 <= code < 0xDC00:  # JSON writes what is beyond 16 bits as two
            if (yield) != "\\" or (yield) != "u" or not 0xDC00 <= (low := (yield from _code(4))) < 0xE000:
                raise Malformed
            code = 0x10000 + (code - 0xD800) * 0x400 + low - 0xDC00
        if code > 0x10FFFF:
            raise Malformed
        out.append(escaped(_scalar(chr(code))))
    elif char in _ESCAPES:
        out.append(escaped(_ESCAPES[char]))
    else:
        out.append(escaped("\\" + _scalar(char)))


def _code(digits: int) -> Generator[None, str, int]:
    text = ""
    for _ in range(digits):
        text += yield
    if not re.fullmatch("[0-9a-fA-F]+", text):
        raise Malformed
    return int(text, 16)


def _scalar(char: str) -> str:
    """Half of a character that takes two codes is none."""
    if 0xD800 <= ord(char) < 0xE000:
        raise Malformed
    return char


def converted(text: str) -> str | None:
    """A whole value, in Python's notation or JSON's, as JSON; None: it is none."""
    out: list[str] = []
    reader = _alone(out)
    next(reader)
    try:
        for char in text + "\n":
            reader.send(char)
    except (Malformed, StopIteration):
        return None
    try:
        reader.send("\0")
    except Malformed:
        return None
    except StopIteration:
        return "".join(out)
    return None


def _alone(out: list[str]) -> Reader:
    char = yield from spaces((yield))
    char = yield from value(char, out)
    return (yield from spaces(char))
