"""What a function's JSON Schema says about each of its arguments, for the notations that write them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
STRING = frozenset({"string"})
_MAX_REFERENCES = 16


def resolved(schema: Any, root: Json) -> Any:
    """What a reference into ``root`` leads to; a schema that is none stays, and one that leads nowhere says nothing."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        found: Any = root
        for part in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name, True) if isinstance(found, dict) else True
        schema = found
    return True


def properties_of(parameters: Json | None) -> dict[str, Any]:
    """The schema of each argument, those that must be given and are not described included."""
    schema = resolved(parameters or {}, parameters or {})
    known = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required") if isinstance(schema, dict) else None
    named = dict(known) if isinstance(known, dict) else {}
    return named | {str(name): True for name in required or () if name not in named}


def types_of(schema: Any, root: Json) -> frozenset[str]:
    """What a value may be; all where the schema does not say."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict):
        return TYPES
    if (said := schema.get("type")) is not None:
        return frozenset([said] if isinstance(said, str) else said) & TYPES or TYPES
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_type_of, schema["enum"]))
    for several in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(several), list) and parts:
            found = [types_of(part, root) for part in parts]
            return frozenset.intersection(*found) if several == "allOf" else frozenset.union(*found)
    return TYPES


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    for kind, name in ((str, "string"), (int, "integer"), (float, "number"), (list, "array"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "null"
