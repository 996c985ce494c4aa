"""Looking into a heap: the same order as taking it apart, and no more work than was asked for."""

from __future__ import annotations

import heapq
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from fairserve.fairness.heaps import in_order

entries = st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abcdef")))


@given(entries=entries, stale=st.sets(st.tuples(st.integers(0, 20), st.sampled_from("abcdef"))))
def test_live_entries_come_in_the_order_in_which_popping_would_give_them(
    entries: list[tuple[int, str]], stale: set[tuple[int, str]]
) -> None:
    heap = list(entries)
    heapq.heapify(heap)
    before = list(heap)
    assert list(in_order(heap, lambda entry: entry not in stale)) == sorted(e for e in entries if e not in stale)
    assert heap == before, "looking changes nothing"


def test_the_first_few_of_many_cost_few_looks() -> None:
    heap = [(i, "x") for i in range(10_000)]
    looked: list[tuple[int, str]] = []

    def is_live(entry: tuple[int, str]) -> bool:
        looked.append(entry)
        return True

    assert list(islice(in_order(heap, is_live), 5)) == [(i, "x") for i in range(5)]
    assert len(looked) == 5


def test_an_empty_heap_has_nothing() -> None:
    assert list(in_order([], lambda entry: True)) == []
