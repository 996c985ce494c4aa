"""What a model says, told apart into text and calls of functions: piece by piece as it comes, or whole.

What may turn out to be the beginning of a call is held back, as stop strings are. A call whose beginning is the usual
one (its name, then its arguments) is given out from there on; any other one when it is whole. What is no call after all
is text: no JSON, a function that was not offered, a call that does not end. A stream cannot take back what it has
given out: there the arguments may end early, or be no JSON, as OpenAI warns of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fairserve.api.tool_formats import Format

SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """New about the ``index``-th call (from 0); ``id`` and ``name`` in its first piece only."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""


Piece = str | CallPiece


class Call(Protocol):
    """One call, from its first character on."""

    raw: str
    """What was taken of it."""
    name: str
    """As soon as it begins as usual."""
    is_over: bool
    is_text: bool
    """It is over because it cannot be a call: what was taken may hold another one."""

    def push(self, text: str) -> str:
        """Take what belongs to the call, and return what is behind it."""

    def ready(self) -> str:
        """Arguments that can be given out and were not yet, of a call with a ``name``."""

    def whole(self) -> tuple[str, str] | None:
        """Name and arguments of a call that is over; None: it is none."""


class CallParser:
    """Reads one choice.

    Args:
        written: how the model writes calls.
        functions: those that it may call: the JSON Schema of each one's arguments, None where it has none.
        is_parallel: False: only the first call is given out.
        is_piecewise: calls are given out as they come; otherwise when they are whole and right.
        is_begun: the output begins where a marker has already been.
    """

    def __init__(
        self,
        written: Format,
        functions: Mapping[str, Any],
        *,
        is_parallel: bool = True,
        is_piecewise: bool = True,
        is_begun: bool = False,
    ) -> None:
        self._format = written
        self._functions = functions
        self._is_parallel = is_parallel
        self._is_piecewise = is_piecewise
        self._pieces: list[Piece] = []
        self._held = ""
        """Not decided yet."""
        self._envelope = ""
        """What stands before a call, and becomes text with it if it is none."""
        self._call: Call = written.reader(functions)
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
        found = min(((at, sign) for sign in self._format.signs if (at := held.find(sign)) >= 0), default=None)
        end = len(held) - max((overlap(held, sign) for sign in self._format.signs), default=0)
        if found is not None:
            end = found[0]
        if marker:
            end = len(held[:end].rstrip())  # space before a marker is no text
        self._say(held[:end])
        self._held = held[end:]
        if found is None:
            return False
        at = found[0] + len(marker) * (found[1] == marker)
        self._envelope, self._held = held[end:at], held[at:]
        self._state = self._before_call
        return True

    def _before_call(self) -> bool:
        opening = self._format.opening.match(self._held)
        rest = self._held[opening.end() :] if opening else self._held.lstrip()
        if not rest:
            return False
        if opening and self._format.first.match(rest):
            self._begin(rest)
        else:
            self._say(self._envelope)
            self._state = self._in_text
        return True

    def _begin(self, rest: str) -> None:
        self._envelope += self._held[: len(self._held) - len(rest)]
        self._held, self._state = rest, self._in_call
        self._call, self._is_given = self._format.reader(self._functions), False

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
            num_said = len(call.raw) if not call.is_text else 0 if self._envelope else 1  # the rest is read once more
            self._say(self._envelope + call.raw[:num_said])
            self._held, self._state = call.raw[num_said:] + self._held, self._in_text
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
            if self._format.first.match(rest):
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
