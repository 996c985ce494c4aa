"""How models write calls of functions, by what their chat templates show.

===========  ==============================================================  ===========================================
format       a call                                                          models
===========  ==============================================================  ===========================================
hermes       ``<tool_call>{"name": .., "arguments": {..}}</tool_call>``      Hermes, Qwen 2.5 and 3, many others
llama3_json  ``{"name": .., "parameters": {..}}``, all of the text           Llama 3.1, 3.2, 3.3
mistral      ``[TOOL_CALLS][{"name": .., "arguments": {..}}, ..]``           Mistral
mistral      ``[TOOL_CALLS]name[ARGS]{..}``                                  Mistral since November 2024
granite      ``<|tool_call|>[{"name": .., "arguments": {..}}, ..]``          Granite 3
phi4_mini    ``functools[{"name": .., "arguments": {..}}, ..]``              Phi-4-mini
nemotron     ``<TOOLCALL>[{"name": .., "arguments": {..}}, ..]</TOOLCALL>``  Llama Nemotron
pythonic     ``[name(key="value", n=1), ..]``, all of the text               Llama 3.2 and 4, ToolACE
olmo3        ``<function_calls>name(key="value")</function_calls>``          OLMo 3; a line for each call
qwen3_coder  ``<tool_call><function=name><parameter=key>value</parameter>    Qwen3-Coder
             </function></tool_call>``
seed_oss     the same in ``<seed:tool_call>``, a value on one line          Seed-OSS
glm4         ``<tool_call>name<arg_key>key</arg_key><arg_value>value         GLM-4.5 and later
             </arg_value></tool_call>``
===========  ==============================================================  ===========================================

``api.tool_format`` forces one, for a template that tells no format apart.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fairserve.api.tool_json import BARE, KEYED, JsonCall
from fairserve.api.tool_keywords import PythonCall, TagCall, Tags

if TYPE_CHECKING:
    from fairserve.api.tool_calls import Call

_NOTHING = re.compile(r"\s*")
_MAYBE_LIST = re.compile(r"\s*\[?\s*")
_LIST = re.compile(r"\s*\[\s*")
_BRACE = re.compile(r"\{")
_NAME = re.compile(r"[A-Za-z0-9_-]")
_TAG = re.compile("<")


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
    opening: re.Pattern[str] = _NOTHING
    """What stands between the marker and the first call."""
    between: str = ""
    """Characters that may stand between calls behind one marker; "": each call has its own."""
    first: re.Pattern[str] = _BRACE
    """The first character of a call."""
    reader: Callable[[Mapping[str, Any]], Call] = JsonCall
    """Makes what reads one call of these functions."""
    key: str = "arguments"
    """What the model calls the arguments in JSON; both words are read."""
    tags: Tags | None = None
    """Where arguments stand between tags."""
    new_id: Callable[[], str] = _call_id

    @property
    def is_json(self) -> bool:
        return self.tags is None and not self.is_python

    @property
    def is_python(self) -> bool:
        return self.reader is PythonCall

    @property
    def is_list(self) -> bool:
        """Calls stand in brackets."""
        return self.opening is not _NOTHING

    @property
    def has_marker_in_grammar(self) -> bool:
        """A forced call is written with its marker; else it begins behind it, as a list or as itself."""
        return bool(self.marker) and not self.is_list

    @property
    def signs(self) -> tuple[str, ...]:
        """What in a text says that a call begins: the marker, or without it the tag that models forget it before."""
        return tuple(sign for sign in (self.marker, self.tags.opening if self.tags else "") if sign)

    def shows_special(self, tokenizer: Any) -> bool:
        """What calls are read by is a token that would be left out of the text."""
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        return not special.isdisjoint({self.marker, self.end, *(self.tags.whole if self.tags else ())} - {""})


def _tagged(
    name: str, sign: str, marker: str, end: str, tags: Tags, first: re.Pattern[str] = _TAG, between: str = ""
) -> Format:
    reader = partial(TagCall, tags=tags)
    return Format(name, re.compile(sign), marker, end, first=first, between=between, reader=reader, tags=tags)


_LINES = Tags("<function=", "<parameter=", ">", "</parameter>", "</function>", is_padded=True)
_INLINE = Tags("<function=", "<parameter=", ">", "</parameter>", "</function>")
_PAIRS = Tags("", "<arg_key>", "</arg_key>", "</arg_value>", "</tool_call>", value="<arg_value>")

FORMATS = {
    one.name: one
    for one in (
        # The order counts: the first whose sign is there is taken.
        Format(
            "mistral",
            re.compile(r"\[TOOL_CALLS\]"),
            "[TOOL_CALLS]",
            end="]",
            opening=_MAYBE_LIST,
            between=",",
            first=re.compile(r"[{A-Za-z0-9_-]"),
            reader=partial(JsonCall, heads=(KEYED, BARE)),
            new_id=_nine_letters,
        ),
        _tagged("seed_oss", "<seed:tool_call>", "<seed:tool_call>", "</seed:tool_call>", _INLINE, between="\n"),
        _tagged("glm4", "<arg_key>", "<tool_call>", "</tool_call>", _PAIRS, first=_NAME),
        _tagged("qwen3_coder", "<tool_call>(?s:.)*<function=", "<tool_call>", "</tool_call>", _LINES, between="\n"),
        Format("hermes", re.compile("<tool_call>"), "<tool_call>", "</tool_call>"),
        Format("granite", re.compile(r"<\|tool_call\|>"), "<|tool_call|>", end="]", opening=_MAYBE_LIST, between=","),
        Format("phi4_mini", re.compile(r"functools\["), "functools", end="]", opening=_LIST, between=","),
        Format(
            "nemotron", re.compile("<TOOLCALL>"), "<TOOLCALL>", end="]</TOOLCALL>", opening=_MAYBE_LIST, between=","
        ),
        Format(
            "olmo3",
            re.compile("<function_calls>"),
            "<function_calls>",
            "</function_calls>",
            between="\n",
            first=_NAME,
            reader=PythonCall,
        ),
        Format("llama3_json", re.compile(r'"name": *function name, *"parameters"'), "", between=";,", key="parameters"),
        Format(
            "pythonic",
            re.compile(r"\[func_name1\("),
            "",
            end="]",
            opening=_LIST,
            between=",",
            first=_NAME,
            reader=PythonCall,
        ),
    )
}


def format_of(chat_template: Any, forced: str) -> Format | None:
    """``chat_template``: the template, or several by name; ``forced``: a format's name, or ``auto``. None: unknown."""
    if forced != "auto":
        return FORMATS[forced]
    text = "\n".join(chat_template.values()) if isinstance(chat_template, dict) else str(chat_template or "")
    return next((one for one in FORMATS.values() if one.sign.search(text)), None)
