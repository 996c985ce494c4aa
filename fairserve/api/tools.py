"""Which functions the model may call in one answer, and whether it must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fairserve.api.openai_schema import Tool

MAX_TOOLS = 128
"""OpenAI's limit; so are those of a name."""
NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"
MODES = ("none", "auto", "required")
NAMED = '{"type": "function", "function": {"name": NAME}}'
CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": [*MODES, None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}


@dataclass(frozen=True, slots=True)
class Choice:
    """``tool_choice``; ``name`` is that of the one function that must be called, "" where the mode says it all."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str = ""

    @property
    def must_call(self) -> bool:
        return self.mode == "required"


def choice_of(value: Any) -> Choice | None:
    """None: it is neither a mode nor a named function."""
    if isinstance(value, str) and value in MODES:
        return Choice(value)  # type: ignore[arg-type]
    if isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function":
        function = value["function"]
        if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
            return Choice("required", function["name"])
    return None


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What one request lets the model call."""

    tools: tuple[Tool, ...]
    choice: Choice = Choice()
    is_parallel: bool = True
    """Several calls in one answer."""

    @property
    def functions(self) -> dict[str, dict[str, Any] | None]:
        """Those that it may call now: the JSON Schema of each one's arguments, None where it has none."""
        offered = [tool.function for tool in self.tools]
        return {one.name: one.parameters for one in offered if self.choice.name in ("", one.name)}
