"""KV blocks: one owner each, none lost, contiguous where it can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fairserve.engine.kv_blocks import KVBlocks
from fairserve.errors import ConfigError


def test_a_sequence_alone_gets_contiguous_slots_and_can_fill_the_whole_cache():
    kv = KVBlocks(num_blocks=8, block_size=4, num_lanes=4)
    kv.take("a", 1)
    for num_tokens in range(2, 33):
        kv.take("a", num_tokens)
    assert kv.table("a") == tuple(range(8))
    assert kv.start("a") == 0
    assert not kv.can_hold("a", 33)


def test_asking_takes_nothing():
    kv = KVBlocks(num_blocks=2, block_size=4)
    assert kv.can_hold("a", 8)
    assert kv.num_free == 2
    assert kv.num_held("a") == 0


def test_short_sequences_start_at_equal_distances():
    kv = KVBlocks(num_blocks=12, block_size=4, num_lanes=3)
    for name in "abc":
        kv.take(name, 5, expected_tokens=16)
    assert [kv.start(name) for name in "abc"] == [0, 16, 32]


def test_a_newcomer_keeps_clear_of_where_a_long_sequence_will_grow():
    kv = KVBlocks(num_blocks=12, block_size=4, num_lanes=3)
    kv.take("long", 4, expected_tokens=32)
    kv.take("short", 4, expected_tokens=8)
    assert kv.start("short") == 32


def test_with_no_lane_left_any_block_serves():
    kv = KVBlocks(num_blocks=4, block_size=4, num_lanes=2)
    kv.take("a", 4, 8)
    kv.take("b", 4, 8)
    kv.take("c", 8)
    kv.check()
    assert kv.num_free == 0
    assert kv.start("c") is None


def test_a_scattered_sequence_says_so_and_keeps_its_order():
    kv = KVBlocks(num_blocks=3, block_size=2)
    kv.take("a", 2)
    kv.take("b", 2)
    kv.take("a", 4)
    assert kv.table("b") == (1,)
    assert kv.table("a") == (0, 2)
    assert kv.start("a") is None


def test_freed_blocks_serve_the_next():
    kv = KVBlocks(num_blocks=4, block_size=4)
    kv.take("a", 16)
    kv.free("a")
    kv.free("a")
    assert kv.num_free == 4
    kv.take("b", 16)
    assert kv.start("b") == 0


def test_taking_more_than_there_is_fails_loudly():
    kv = KVBlocks(num_blocks=2, block_size=4)
    with pytest.raises(AssertionError, match="no room"):
        kv.take("a", 9)


def test_a_cache_without_blocks_is_refused():
    with pytest.raises(ConfigError):
        KVBlocks(num_blocks=0, block_size=16)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 50), st.lists(st.integers(1, 64), max_size=8))
def test_whatever_fits_by_count_can_be_taken(num_blocks, block_size, num_lanes, lengths):
    kv = KVBlocks(num_blocks, block_size, num_lanes)
    left = num_blocks
    for i, length in enumerate(lengths):
        needed = -(-length // block_size)
        assert kv.can_hold(str(i), length) == (needed <= left)
        if needed <= left:
            kv.take(str(i), length, expected_tokens=3 * length)
            left -= needed
            assert len(kv.table(str(i))) == needed
        kv.check()


class Blocks(RuleBasedStateMachine):
    """Any order of growing and freeing."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVBlocks(num_blocks=13, block_size=3, num_lanes=4)
        self.lengths: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdef"), more=st.integers(1, 12), expected=st.integers(0, 40))
    def grow(self, name: str, more: int, expected: int) -> None:
        num_tokens = self.lengths.get(name, 0) + more
        before = self.kv.table(name) if name in self.lengths else ()
        if self.kv.can_hold(name, num_tokens):
            self.kv.take(name, num_tokens, expected)
            self.lengths[name] = num_tokens
            assert self.kv.table(name)[: len(before)] == before, "blocks already written were moved"

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.lengths)))
        self.kv.free(name)
        del self.lengths[name]

    @invariant()
    def holds(self) -> None:
        self.kv.check()
        for name, length in self.lengths.items():
            assert len(self.kv.table(name)) == -(-length // 3)


TestBlocks = Blocks.TestCase
