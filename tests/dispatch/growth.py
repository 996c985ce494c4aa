"""Finds every container that an object holds on to, however deep, and how full each is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

Sizes = dict[str, int]


def sizes(root: object, name: str = "") -> Sizes:
    """By path below ``root``: elements in each dict, set, list, deque; the sum where many stand at one place (below
    keys and indices). Looks into objects of fairserve and into containers."""
    found: Sizes = {}
    seen: set[int] = set()
    todo: deque[tuple[str, object]] = deque([(name or type(root).__name__, root)])
    while todo:
        path, one = todo.popleft()
        if id(one) in seen or isinstance(one, str | int | float | bytes | bool | None):
            continue
        seen.add(id(one))
        if isinstance(one, dict | set | frozenset | list | deque):
            found[path] = found.get(path, 0) + len(one)
            todo.extend((path + "[]", value) for value in (one.values() if isinstance(one, dict) else one))
        elif isinstance(one, tuple):
            todo.extend((path, value) for value in one)
        elif type(one).__module__.startswith("fairserve"):
            todo.extend((f"{path}.{field}", value) for field, value in _fields(one))
    return found


def above(root: object, limit: int) -> Sizes:
    """Those with more than ``limit`` elements."""
    return {path: size for path, size in sizes(root).items() if size > limit}


def _fields(one: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(one, "__dict__", {}).items()
    for kind in type(one).__mro__:
        slots = getattr(kind, "__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(one, slot):
                yield slot, getattr(one, slot)
