"""What is wrong with a body or a query, as OpenAI tells it: places written ``messages[0].role``, and the codes that its
clients switch on. ``tests/clients/test_error_bodies.py`` lays ours and OpenAI's side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from fairserve.errors import InvalidRequest

OTHER = "invalid_value"
CODES = {
    "missing": "missing_required_parameter",
    "unknown_field": "unknown_parameter",
    "unsupported_field": "unsupported_parameter",
    "unsupported_tool": "unsupported_value",
    **dict.fromkeys(
        (
            "int_type",
            "int_from_float",
            "float_type",
            "string_type",
            "bool_type",
            "list_type",
            "dict_type",
            "model_type",
            "model_attributes_type",
        ),
        "invalid_type",
    ),
    "string_too_long": "string_above_max_length",
}
"""Of pydantic's types of errors, and of what :func:`refuse` raises. What is not here is an ``invalid_value``, unless it
is one of OpenAI's codes itself."""
OPENAI_CODES = {
    *CODES.values(),
    "array_above_max_length",
    "previous_response_not_found",
    "object_above_max_properties",
    "property_name_above_max_length",
}
BOUNDS = {
    "greater_than": "below_min",
    "greater_than_equal": "below_min",
    "less_than": "above_max",
    "less_than_equal": "above_max",
}


def refuse(kind: str, message: str, field: str = "") -> PydanticCustomError:
    """What a validator raises; ``field``: the place in its own field that is at fault; ``kind`` as in :data:`CODES`."""
    return PydanticCustomError(kind, "{message}", {"message": message, "field": field})


def invalid(error: ValidationError) -> InvalidRequest:
    """The first mistake that pydantic found."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    param = place([*first["loc"], *filter(None, [context.get("field")])]) or None
    return InvalidRequest(f"{param}: {first['msg']}", param=param, code=code_of(first["type"], context))


def place(path: Iterable[int | str]) -> str:
    """``messages[0].content``, of the steps to it; a step may be such a place itself, ``[0].type``."""
    steps = (f"[{step}]" if isinstance(step, int) else step if step.startswith("[") else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def code_of(kind: str, context: Mapping[str, Any]) -> str:
    """OpenAI's code for a type of error of pydantic's; ``context``: what pydantic says of it."""
    if bound := BOUNDS.get(kind):
        limit = next(context[name] for name in ("gt", "ge", "lt", "le") if name in context)
        return f"{'decimal' if isinstance(limit, float) else 'integer'}_{bound}_value"
    if kind == "too_long":
        return "object_above_max_properties" if context.get("field_type") == "Dictionary" else "array_above_max_length"
    if kind == "too_short" and not context.get("actual_length"):
        return "empty_array"
    return CODES.get(kind, kind if kind in OPENAI_CODES else OTHER)
