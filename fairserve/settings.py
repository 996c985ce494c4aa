"""Reading the configuration from files and ``key=value`` words, and printing it with its documentation."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from fairserve.config import FairServeArgs
from fairserve.errors import ConfigError
from fairserve.overrides import lay_over, mistakes, told_place

WIDTH = 110


def read_settings(file: Path | None = None, overrides: Sequence[str] = ()) -> FairServeArgs:
    """The configuration from an optional YAML or JSON file, with ``dotted.key=value`` words laid over it.

    The file holds the fields of :class:`FairServeArgs`, or is a Serve config file whose ``args`` hold them.

    Raises:
        ConfigError: an unreadable file, an unknown field, a wrong value; the message names the setting.
    """
    data = _arguments(file) if file is not None else {}
    for word in overrides:
        lay_over(data, word)
    return validated(data, source=str(file) if file is not None else "")


def validated(data: Any, source: str = "") -> FairServeArgs:
    """``data`` checked; every mistake on its own line.

    Raises:
        ConfigError: naming each wrong setting.
    """
    try:
        return FairServeArgs.model_validate(data)
    except ValidationError as error:
        raise ConfigError((f"{source}: " if source else "") + mistakes(error)) from None


def documented_yaml(model: type[BaseModel] = FairServeArgs) -> str:
    """The default configuration as YAML, each field under a comment with its documentation."""
    return "\n".join(_lines(model, indent=0)) + "\n"


def _lines(model: type[BaseModel], indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, field in model.model_fields.items():
        section = field.annotation if _is_model(field.annotation) else None
        text = field.description or (section.__doc__ if section is not None else "") or ""
        choices = f"One of: {', '.join(_choices(field.annotation))}." if _choices(field.annotation) else ""
        for paragraph in (" ".join(text.split()), choices):
            yield from textwrap.wrap(paragraph, WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
        if section is not None:
            yield f"{pad}{name}:"
            yield from _lines(section, indent + 1)
            continue
        if field.is_required():
            yield f"{pad}{name}:  # required"
            continue
        value = field.get_default(call_default_factory=True)
        yield f"{pad}{name}: {_scalar(list(value) if isinstance(value, tuple) else value)}"
        for item in filter(_is_model, get_args(field.annotation)):  # a list of entries: show one, commented out
            yield f"{pad}# One entry:"
            yield from (f"{pad}#   {line}" for line in _lines(item, 0))


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _choices(kind: Any) -> list[str]:
    """The values of a Literal, inside an Optional too."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if get_origin(kind) in (Union, types.UnionType):
        return [choice for part in get_args(kind) for choice in _choices(part)]
    return []


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _arguments(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML{told_place(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds a {type(data).__name__}, expected a mapping of settings")
    if "applications" not in data:
        return data
    ours = [
        app
        for app in data["applications"] or []
        if isinstance(app, dict) and str(app.get("import_path")).startswith("fairserve.")
    ]
    if len(ours) != 1:
        raise ConfigError(f"{file} is a Serve config file with {len(ours)} fairserve applications, expected one")
    return dict(ours[0].get("args") or {})
