"""Looking into a heap without taking it apart."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Entry = TypeVar("Entry", bound=tuple[Any, ...])

SMALL = 32
"""Entries that are sorted sooner than looked through."""


def in_order(heap: list[Entry], is_live: Callable[[Entry], bool]) -> Iterator[Entry]:
    """Live entries of a ``heapq`` heap, least first; the k first cost O(k log k) plus the stale ones between them. The
    heap must not change meanwhile."""
    if len(heap) <= SMALL:
        yield from filter(is_live, sorted(heap))
        return
    frontier = [(heap[0], 0)] if heap else []
    while frontier:
        entry, index = heapq.heappop(frontier)
        for child in (2 * index + 1, 2 * index + 2):
            if child < len(heap):
                heapq.heappush(frontier, (heap[child], child))
        if is_live(entry):
            yield entry
