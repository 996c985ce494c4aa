"""How models write calls of functions, by what their chat templates show.

===========  ==========================================================  =================================
format       a call                                                      models
===========  ==========================================================  =================================
hermes       ``<tool_call>{"name": .., "arguments": {..}}</tool_call>``  Hermes, Qwen 2.5 and 3, many others
llama3_json  ``{"name": .., "parameters": {..}}``, all of the text       Llama 3.1, 3.2, 3.3
mistral      ``[TOOL_CALLS][{"name": .., "arguments": {..}}, ..]``       Mistral
mistral      ``[TOOL_CALLS]name[ARGS]{..}``                              Mistral since November 2024
===========  ==========================================================  =================================

``api.tool_format`` forces one, for a template that tells no format apart.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_KEYED = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""The usual beginning of a call: from its end on the arguments can be given out as they come."""
_BARE = re.compile(r"\s*([A-Za-z0-9_-]{1,64})\s*(?:\[CALL_ID\]\s*[A-Za-z0-9]+\s*)?(?:\[ARGS\]\s*)?(?=\{)")


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _nine_letters() -> str:
    """Mistral's templates refuse any other id."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    sign: re.Pattern[str]
    """What in a chat template says that the model writes so."""
    marker: str
    """What calls begin with; "": a call is the whole text, and begins it."""
    end: str = ""
    """What ends what the marker began; "": nothing does."""
    opening: str = ""
    """What may stand between the marker and the first call."""
    between: str = ""
    """Characters that may stand between calls behind one marker; "": each call has its own."""
    key: str = "arguments"
    """What the model calls the arguments; both words are read."""
    bare: re.Pattern[str] | None = None
    """A call may also begin so, with the arguments alone in braces."""
    new_id: Callable[[], str] = _call_id

    def head(self, text: str) -> re.Match[str] | None:
        return _KEYED.match(text) or (self.bare.match(text) if self.bare else None)

    @property
    def has_marker_in_grammar(self) -> bool:
        """A forced call is written with its marker; else it begins behind it, as a list or as itself."""
        return bool(self.marker) and not self.opening

    def is_marker_special(self, tokenizer: Any) -> bool:
        """The marker is a token that would be left out of the text."""
        return bool(self.marker) and self.marker in getattr(tokenizer, "all_special_tokens", ())


FORMATS = {
    one.name: one
    for one in (
        # The order counts: the first whose sign is there is taken. Qwen3-Coder and what follows it write XML instead.
        Format(
            "mistral",
            re.compile(r"\[TOOL_CALLS\]"),
            "[TOOL_CALLS]",
            end="]",
            opening="[",
            between=",",
            bare=_BARE,
            new_id=_nine_letters,
        ),
        Format("hermes", re.compile(r"\A(?!.*<function=).*<tool_call>", re.DOTALL), "<tool_call>", "</tool_call>"),
        Format("llama3_json", re.compile(r'"name": *function name, *"parameters"'), "", between=";,", key="parameters"),
    )
}


def format_of(chat_template: Any, forced: str) -> Format | None:
    """``chat_template``: the template, or several by name; ``forced``: a format's name, or ``auto``. None: unknown."""
    if forced != "auto":
        return FORMATS[forced]
    text = "\n".join(chat_template.values()) if isinstance(chat_template, dict) else str(chat_template or "")
    return next((one for one in FORMATS.values() if one.sign.search(text)), None)
