"""Functions and ``tool_choice`` as ``/v1/responses`` writes them: flat, where a chat has one level more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fairserve.api.body_errors import refuse
from fairserve.api.openai_schema import MAX_NAME_CHARS, Body
from fairserve.api.tools import MODES, NAME_PATTERN

Json = dict[str, Any]
NAMED = '{"type": "function", "name": NAME}'
ALLOWED = f'{{"type": "allowed_tools", "mode": "auto" or "required", "tools": [{NAMED}, ..]}}'
ONLY_FUNCTIONS = "only tools of type 'function' are supported, which the caller runs; nothing is run here"

# What is accepted, for the description.
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
    "additionalProperties": False,
}
CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [*MODES]},
        _NAMED,
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _NAMED, "minItems": 1},
            },
            "required": ["type", "mode", "tools"],
            "additionalProperties": False,
        },
    ]
}


class FunctionTool(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments, an object. Left out: no arguments."""
    strict: bool | None = None
    """Accepted, as in a chat: arguments of a call that was asked for follow the schema in any case."""

    @property
    def of_chat(self) -> Json:
        return {"type": "function", "function": self.model_dump(exclude_unset=True, exclude={"type"})}

    @property
    def as_told(self) -> Json:
        """What the answer repeats."""
        return self.model_dump() | {"strict": bool(self.strict)}


def check_kinds(tools: Any) -> None:
    """
    Raises:
        PydanticCustomError: one of the tools would have to be run here.
    """
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind is not None and kind != "function":
            shown = repr(kind)[:MAX_NAME_CHARS]
            raise refuse("unsupported_tool", f"{shown} is not supported: {ONLY_FUNCTIONS}", f"[{i}].type")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``told``: as the caller said it; ``of_chat``: as a chat says it, with only the ``allowed`` functions at hand."""

    told: Any = "auto"
    of_chat: Any = "auto"
    allowed: frozenset[str] | None = None
    """None: all."""


def choice_of(value: Any) -> ToolChoice:
    """
    Raises:
        PydanticCustomError: it is neither a mode, nor a function, nor a list of allowed functions.
    """
    if isinstance(value, str) and value in MODES:
        return ToolChoice(value, value)
    if (name := _named(value)) is not None:
        return ToolChoice(value, {"type": "function", "function": {"name": name}})
    if isinstance(value, dict) and value.keys() == {"type", "mode", "tools"} and value["type"] == "allowed_tools":
        mode, tools = value["mode"], value["tools"]
        names = [_named(tool) for tool in tools] if isinstance(tools, list) else []
        if mode in ("auto", "required") and names and None not in names:
            return ToolChoice(value, mode, frozenset(name for name in names if name is not None))
    raise refuse("wrong_tool_choice", f"must be one of {', '.join(MODES)}, or {NAMED}, or {ALLOWED}")


def _named(value: Any) -> str | None:
    """The name of the function that ``value`` names."""
    if isinstance(value, dict) and value.keys() == {"type", "name"} and value["type"] == "function":
        name = value["name"]
        return name if isinstance(name, str) else None
    return None
