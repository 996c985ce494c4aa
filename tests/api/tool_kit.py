"""Chat templates that know tools, functions to call, and the outputs of a model that calls them."""

from __future__ import annotations

from typing import Any

from fairserve.api.tool_calls import CallPiece, Piece

CALLS = """
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
"""
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    + CALLS.strip()
    + "{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if mood %}<|mood|>{{ mood }}\n{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HERMES = "{% for tool in tools or [] %}<|tool|>{{ tool | tojson }}\n{% endfor %}" + TURNS
LLAMA = '{% if tools %}Answer with {"name": function name, "parameters": its arguments}.\n{% endif %}' + TURNS.replace(
    "<tool_call>", ""
).replace("</tool_call>", "")
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}" + TURNS.replace(
    "<tool_call>", "[TOOL_CALLS]"
)

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def told(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call's name and arguments."""
    calls: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            name, arguments = calls.get(piece.index, ("", ""))
            calls[piece.index] = name + piece.name, arguments + piece.arguments
    return "".join(piece for piece in pieces if isinstance(piece, str)), [calls[index] for index in sorted(calls)]
