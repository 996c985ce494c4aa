"""``dotted.key=value`` words laid over settings, and what is wrong with settings in words.

For the service (YAML) and the simulator's scenarios (TOML) alike.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from pydantic import ValidationError

from fairserve.errors import ConfigError

PLAIN_WORD = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*")


def lay_over(data: dict[str, Any], word: str) -> None:
    """Put ``a.b=value`` into ``data``; the value is read as YAML, so 8 is a number, [1, 2] a list and null is None.
    In a list, a number picks an entry: ``faults.0.at_s=30``.

    Raises:
        ConfigError: not key=value, or a key inside something that has no keys.
    """
    path, value = setting_of(word)
    group: Any = data
    *parents, last = path.split(".")
    for parent in parents:
        group = group.setdefault(parent, {}) if isinstance(group, dict) else group[_index(group, parent, path)]
        if not isinstance(group, dict | list):
            raise ConfigError(f"{path}: {parent} holds a value, not a group of settings")
    group[last if isinstance(group, dict) else _index(group, last, path)] = value


def setting_of(word: str) -> tuple[str, Any]:
    """The dotted name and the value in ``a.b=value``.

    Raises:
        ConfigError: not key=value.
    """
    path, equals, text = word.partition("=")
    if not equals or not path:
        shown = f"{word!r}" if PLAIN_WORD.fullmatch(word) else "a word"  # anything else may be a secret
        raise ConfigError(f"{shown} is not key=value, such as num_replicas=2 or engine.max_num_seqs=8")
    try:
        return path, yaml.safe_load(text)
    except yaml.YAMLError:
        return path, text


def mistakes(error: ValidationError) -> str:
    """Every mistake with the setting's dotted name, in one line."""
    lines = []
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in mistake["loc"])
        text = mistake["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)


def told_place(error: Exception) -> str:
    """Where a YAML reader stopped, to follow a sentence. Its own text would show the line, and so a key in it."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def _index(entries: list[Any], key: str, path: str) -> int:
    if not (key.isdecimal() and int(key) < len(entries)):
        raise ConfigError(f"{path}: {key!r} names no entry of a list of {len(entries)}, numbered from 0")
    return int(key)
