"""Many names in order, made without anybody having to wait for it: in slices, and sorted only where somebody looks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

SLICE = 500
"""Names handled between two pauses: about a millisecond."""
SAMPLES_PER_BUCKET = 8

_Key = tuple[float, str]


class Ranking:
    """Names that contain ``search``, the greatest value first, equal ones by name; without ``value`` by name.

    A sample sort: names are dealt into buckets whose borders a sample gives (:meth:`steps`), and a bucket is sorted
    when a page needs it.
    """

    def __init__(self, names: Sequence[str], value: Callable[[str], float] | None, search: str | None = None) -> None:
        self._names = names
        self._value = value
        self._search = search.lower() if search else ""
        self._borders: list[_Key] = []
        self._buckets: list[list[_Key]] = [[]]
        self._sorted: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def steps(self) -> Iterator[None]:
        """Do the work; whoever drives may pause at each step."""
        names = self._names
        num_buckets = 1 + len(names) // SLICE
        if num_buckets > 1:
            sample = sorted(map(self._key, names[:: SLICE // SAMPLES_PER_BUCKET]))
            yield
            self._borders = sample[SAMPLES_PER_BUCKET::SAMPLES_PER_BUCKET]
            self._buckets = [[] for _ in range(len(self._borders) + 1)]
        for start in range(0, len(names), SLICE):
            for name in names[start : start + SLICE]:
                if self._search in name.lower():
                    key = self._key(name)
                    self._buckets[bisect_right(self._borders, key)].append(key)
            yield

    def page(self, offset: int, limit: int) -> list[str]:
        """``limit`` names from the one at ``offset`` on."""
        page: list[str] = []
        for index, bucket in enumerate(self._buckets):
            if len(page) == limit:
                break
            if offset >= len(bucket):
                offset -= len(bucket)
                continue
            if index not in self._sorted:
                bucket.sort()
                self._sorted.add(index)
            page += [name for _, name in bucket[offset : offset + limit - len(page)]]
            offset = 0
        return page

    def _key(self, name: str) -> _Key:
        return (0.0 if self._value is None else -self._value(name), name)
