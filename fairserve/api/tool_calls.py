"""What a model says, told apart into text and calls of functions: piece by piece as it comes, or whole.

What may turn out to be the beginning of a call is held back, as stop strings are. A call whose beginning is the usual
one (its name, then its arguments) is given out from there on; any other one when it is whole. What is no call after all
is text: no JSON, a function that was not offered, a call that does not end. A stream cannot take back what it has
given out: there the arguments may end early, or be no JSON, as OpenAI warns of its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from pydantic_core import from_json

from fairserve.api.tool_formats import Format

MAX_HEAD = 256
"""Characters in which the usual beginning of a call must be over."""
SPACE = " \t\r\n"
NAME_CHAR = re.compile(r"[A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True)
class CallPiece:
    """New about the ``index``-th call (from 0); ``id`` and ``name`` in its first piece only."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


Piece = str | CallPiece


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


class Call:
    """One call, from its first character on. ``raw``: what was taken of it; ``name``: as soon as it begins as usual."""

    def __init__(self, written: Format, names: frozenset[str]) -> None:
        self._format = written
        self._names = names
        self.raw = ""
        self.name = ""
        self.is_over = False
        self._object = Braces()
        self._arguments = Braces()
        self._start = self._given = 0
        self._stop: int | None = None
        """Of the arguments, where it begins as usual."""

    def push(self, text: str) -> str:
        """Take what belongs to the call, and return what is behind it."""
        may_begin = not self.name and len(self.raw) <= MAX_HEAD
        self.raw += text
        head = self._format.head(self.raw) if may_begin else None
        if head is not None and head[1] in self._names:
            self.name, self._start, self._given = head[1], head.end(), head.end()
            self._arguments = Braces(head.end())
        if self.name and self._stop is None:
            self._stop = self._arguments.end(self.raw)
        if self.raw[0] == "{":
            end = self._object.end(self.raw)
        elif self.name:
            end = self._stop
        else:
            self.is_over = len(self.raw) > MAX_HEAD or "{" in self.raw
            return ""
        if end is None:
            return ""
        self.is_over = True
        self.raw, rest = self.raw[:end], self.raw[end:]
        return rest

    def ready(self) -> str:
        """Arguments that can be given out and were not yet, of a call with a ``name``."""
        end = len(self.raw) if self._stop is None else self._stop
        text, self._given = self.raw[self._given : end], end
        return text

    def whole(self) -> tuple[str, str] | None:
        """Name and arguments of a call that is over; None: it is none."""
        if self.name:
            text = self.raw[self._start : self._stop]
            return (self.name, text) if self._stop is not None and _is_object(text) else None
        try:
            call = from_json(self.raw, allow_inf_nan=False)
        except ValueError:
            return None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names:
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


class CallParser:
    """Reads one choice.

    Args:
        written: how the model writes calls.
        names: of the functions that it may call.
        is_parallel: False: only the first call is given out.
        is_piecewise: calls are given out as they come; otherwise when they are whole and right.
        is_begun: the output begins where a marker has already been.
    """

    def __init__(
        self,
        written: Format,
        names: frozenset[str],
        *,
        is_parallel: bool = True,
        is_piecewise: bool = True,
        is_begun: bool = False,
    ) -> None:
        self._format = written
        self._names = names
        self._is_parallel = is_parallel
        self._is_piecewise = is_piecewise
        self._pieces: list[Piece] = []
        self._held = ""
        """Not decided yet."""
        self._envelope = ""
        """What stands before a call, and becomes text with it if it is none."""
        self._call = Call(written, names)
        self._num_calls = 0
        self._is_given = False
        """Part of the call that is being read has been given out."""
        self._state = self._before_call if is_begun or not written.marker else self._in_text

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        self._held += text
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, when the output is over."""
        text, self._held = self._held, ""
        if self._state == self._in_call:
            text = "" if self._is_given else self._envelope + self._call.raw
        elif self._state == self._before_call:
            text = self._envelope + text
        elif self._state == self._after_call and self._format.end.startswith(text.strip()):
            text = ""
        return [text] if text.strip() or (text and not self.has_calls) else []

    # Each state returns whether it has got further; if not, it needs more text.

    def _in_text(self) -> bool:
        marker, held = self._format.marker, self._held
        at = held.find(marker) if marker else -1
        end = at if at >= 0 else len(held) - overlap(held, marker)
        if marker:
            end = len(held[:end].rstrip())  # space before a marker is no text
        self._say(held[:end])
        self._held = held[end:]
        if at >= 0:
            self._envelope, self._held = held[end : at + len(marker)], held[at + len(marker) :]
            self._state = self._before_call
        return at >= 0

    def _before_call(self) -> bool:
        rest = self._held.lstrip(SPACE + self._format.opening)
        if not rest:
            return False
        if rest[0] == "{" or (self._format.bare is not None and NAME_CHAR.match(rest)):
            self._begin(rest)
        else:
            self._say(self._envelope)
            self._state = self._in_text
        return True

    def _begin(self, rest: str) -> None:
        self._envelope += self._held[: len(self._held) - len(rest)]
        self._held, self._state = rest, self._in_call
        self._call, self._is_given = Call(self._format, self._names), False

    def _in_call(self) -> bool:
        if not self._held:
            return False
        call, is_wanted = self._call, self._is_given or self._is_parallel or not self._num_calls
        self._held = call.push(self._held)
        if call.name and self._is_piecewise and is_wanted:
            name = "" if self._is_given else call.name
            if (arguments := call.ready()) or name:
                self._give(name, arguments)
            self._is_given = True
        if not call.is_over:
            return False
        found = call.whole()
        if found is not None and is_wanted and not self._is_given:
            self._give(*found)
        if found is None and not self._is_given:
            self._say(self._envelope + call.raw)
            self._state = self._in_text
        else:
            self._envelope, self._state = "", self._after_call
        return True

    def _after_call(self) -> bool:
        rest, end, marker = self._held.lstrip(), self._format.end, self._format.marker
        if not rest or (rest != end and end.startswith(rest)) or (rest != marker and marker.startswith(rest)):
            return False
        if end and rest.startswith(end):
            self._held, self._state = rest[len(end) :], self._in_text
            return True
        if self._format.between and not (marker and rest.startswith(marker)):
            rest = rest.lstrip(SPACE + self._format.between)
            if not rest:
                return False
            if rest[0] == "{":
                self._begin(rest)
                return True
        self._state = self._in_text
        return True

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _give(self, name: str, arguments: str) -> None:
        """The next piece of a call; one with a name begins it."""
        self._num_calls += bool(name)
        call_id = self._format.new_id() if name else ""
        self._pieces.append(CallPiece(self._num_calls - 1, arguments, call_id, name))


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker`` and is not all of it."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
