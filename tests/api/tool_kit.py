"""Chat templates that know tools, functions to call, and the outputs of a model that calls them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

PYTHONIC = "{% if tools %}[func_name1(params_name1=params_value1)] {{ tools | tojson }}{% endif %}" + TURNS.replace(
    "<tool_call>", ""
)
QWEN3_CODER = "{% if tools %}<tool_call>\n<function=NAME>{{ tools | tojson }}{% endif %}" + TURNS

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


def write(form: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Calls as the templates of models with this format write them."""
    key = "parameters" if form == "llama3_json" else "arguments"
    objects = [f'{{"name": "{name}", "{key}": {json.dumps(given, ensure_ascii=False)}}}' for name, given in calls]
    python = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]
    listed = f"[{', '.join(objects)}]"
    match form:
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "llama3_json":
            return "; ".join(objects)
        case "mistral":
            return f"[TOOL_CALLS]{listed}"
        case "granite":
            return f"<|tool_call|>{listed}"
        case "phi4_mini":
            return f"functools{listed}"
        case "nemotron":
            return f"<TOOLCALL>{listed}</TOOLCALL>"
        case "pythonic":
            return f"[{', '.join(python)}]"
        case "olmo3":
            return "<function_calls>\n{}\n</function_calls>".format("\n".join(python))
    return "\n".join(_tagged(form, name, given) for name, given in calls)


def _tagged(form: str, name: str, given: Mapping[str, Any]) -> str:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in given.items()
    }
    if form == "glm4":
        pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in texts.items())
        return f"<tool_call>{name}\n{pairs}</tool_call>"
    pad, of = ("\n", "") if form == "qwen3_coder" else ("", "seed:")
    lines = "".join(f"<parameter={k}>{pad}{v}{pad}</parameter>\n" for k, v in texts.items())
    return f"<{of}tool_call>\n<function={name}>\n{lines}</function>\n</{of}tool_call>"
