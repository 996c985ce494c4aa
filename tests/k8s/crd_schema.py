"""Checks a custom resource against its definition, as the API server does with strict validation, without one.

jsonschema alone does not do it: the server drops nulls and fills in defaults before it asks for required fields,
refuses unknown fields although the schema allows them, and has rules of its own for lists that are maps. Rules in CEL
(``x-kubernetes-validations``) are left to a real API server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

EMBEDDED_METADATA = frozenset({"labels", "annotations", "name", "namespace", "generateName", "finalizers"})


def load_definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> schema of every version of every definition below ``folder``."""
    schemas = {}
    for path in sorted(folder.rglob("*.yaml")):
        for definition in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schemas[key] = version["schema"]["openAPIV3Schema"]
    return schemas


def mistakes(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What the server would refuse, one line each, empty when it is fine."""
    filled = _fill(_without_nulls(document), schema)
    found = list(_unknown(filled, schema, "", is_root=True))
    validator = jsonschema.Draft202012Validator(_plain(schema))
    found += [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(filled)]
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _fill(value: Any, schema: dict[str, Any]) -> Any:
    """``value`` with the schema's defaults."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        filled = {key: part["default"] for key, part in known.items() if "default" in part and key not in value}
        rest = schema.get("additionalProperties")
        for key, item in value.items():
            part = known.get(key, rest if isinstance(rest, dict) else {})
            filled[key] = _fill(item, part)
        return filled
    if isinstance(value, list):
        return [_fill(item, schema.get("items", {})) for item in value]
    return value


def _plain(schema: Any) -> Any:
    """The schema in words that jsonschema knows."""
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {}
    for key, part in schema.items():
        if key == "properties":
            plain[key] = {name: _plain(inner) for name, inner in part.items()}
        elif key == "pattern":
            plain[key] = "(?i)" + part.replace("(?i)", "") if "(?i)" in part else part
        elif key not in ("format", "default", "description", "example"):
            plain[key] = _plain(part)
    if schema.get("x-kubernetes-int-or-string"):
        plain["type"] = ["integer", "string"]
        plain.pop("anyOf", None)
    if schema.get("nullable") and isinstance(plain.get("type"), str):
        plain["type"] = [plain["type"], "null"]
    return plain


def _unknown(value: Any, schema: dict[str, Any], path: str, *, is_root: bool = False) -> Iterator[str]:
    """Fields that the server would silently drop, and doubles in lists that are maps."""
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        is_free = schema.get("x-kubernetes-preserve-unknown-fields") or rest is True or not (known or rest)
        for key, item in value.items():
            if is_root and key == "metadata":
                continue
            if path.endswith(".metadata") and not known and key not in EMBEDDED_METADATA:
                yield f"{path}.{key}: unknown field"
            part = known.get(key, rest if isinstance(rest, dict) else None)
            if part is not None:
                yield from _unknown(item, part, f"{path}.{key}")
            elif not is_free:
                yield f"{path}.{key}: unknown field"
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys") if schema.get("x-kubernetes-list-type") == "map" else None
        if keys:
            ids = [tuple(item.get(key) for key in keys) for item in value]
            yield from (f"{path}: {one} occurs twice" for one in sorted({str(i) for i in ids if ids.count(i) > 1}))
        for place, item in enumerate(value):
            yield from _unknown(item, schema.get("items", {}), f"{path}[{place}]")
