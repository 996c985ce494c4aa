"""Pages of many names: the right ones, in steps, and sorted only where somebody looks."""

from __future__ import annotations

import random

import pytest

from fairserve.dispatch.pages import SLICE, Ranking


def names_of(num: int) -> list[str]:
    names = [f"Client-{i}" for i in range(num)]
    random.Random(num).shuffle(names)
    return names


@pytest.mark.parametrize("num", [0, 1, SLICE - 1, SLICE, 5 * SLICE + 3])
@pytest.mark.parametrize("kinds", [1, 3, 10**6])
@pytest.mark.parametrize("search", [None, "t-1", "nobody"])
def test_pages_put_together_are_the_whole_in_order(num: int, kinds: int, search: str | None) -> None:
    names = names_of(num)
    value = {name: float(hash(name) % kinds) for name in names}
    ranking = Ranking(names, value.__getitem__, search)
    assert sum(1 for _ in ranking.steps()) >= num // SLICE
    right = sorted((name for name in names if search is None or search in name), key=lambda n: (-value[n], n))
    pages = [ranking.page(offset, 97) for offset in range(0, num + 97, 97)]
    assert [name for page in pages for name in page] == right
    assert len(ranking) == len(right)


def test_without_a_value_names_rise() -> None:
    ranking = Ranking(names_of(3 * SLICE), None)
    list(ranking.steps())
    assert ranking.page(1_000, 5) == sorted(names_of(3 * SLICE))[1_000:1_005]


def test_one_page_sorts_a_small_part_of_a_hundred_thousand() -> None:
    names = names_of(100_000)
    ranking = Ranking(names, lambda name: 0.0)
    list(ranking.steps())
    ranking.page(70_000, 100)
    num_sorted = sum(len(ranking._buckets[i]) for i in ranking._sorted)
    assert num_sorted < 5 * SLICE
    assert max(map(len, ranking._buckets)) < 5 * SLICE, "even when all are equal"


def test_a_search_ignores_case() -> None:
    ranking = Ranking(["Ann", "bob", "joanna"], None, "AN")
    list(ranking.steps())
    assert ranking.page(0, 10) == ["Ann", "joanna"]
