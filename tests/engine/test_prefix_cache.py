"""What is found is exactly what was computed for these tokens and this client; what is lost is the oldest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.prefix_cache import KeyMaker, PrefixScope, scope_of

BLOCK = 2


def keys_of(
    client: str, tokens: Sequence[int], scope: PrefixScope = "client", secret: bytes = b"s", block_size: int = BLOCK
) -> list[bytes]:
    keys = KeyMaker(secret, scope, block_size).keys_for(client)
    keys.add(tokens)
    return keys[:]


# -- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_covers_all_tokens_before_it_and_only_full_blocks_have_one() -> None:
    one, two = keys_of("ann", [1, 2, 3, 4, 5]), keys_of("ann", [9, 2, 3, 4])
    assert (len(one), len(two)) == (2, 2)
    assert not set(one) & set(two)
    assert keys_of("ann", [1, 2, 8, 8])[0] == one[0]


def test_keys_of_a_sequence_that_grows_are_those_of_the_whole() -> None:
    keys = KeyMaker(b"s", "client", BLOCK).keys_for("ann")
    keys.add([1, 2, 3])  # 3 fills no block, and comes again
    keys.add([3, 4, 5, 6])
    assert keys[:] == keys_of("ann", [1, 2, 3, 4, 5, 6])


def test_nobody_can_make_keys_without_the_secret() -> None:
    assert not set(keys_of("ann", range(8))) & set(keys_of("ann", range(8), secret=b"other"))
    assert {len(key) for key in keys_of("ann", range(8))} == {16}


def test_the_name_of_a_scope_cannot_pass_for_tokens() -> None:
    assert not set(keys_of("a", [1, 2], block_size=1)) & set(keys_of("a" + "\x01" + "\x00" * 7, [2], block_size=1))


@pytest.mark.parametrize(
    ("scope", "groups"),
    [
        ("client", [["o/ml/ann"], ["o/ml/bob"], ["o/ops/cid"], ["o/dan"], ["zoo/ml/eve"], ["fay"], ["gus"]]),
        ("team", [["o/ml/ann", "o/ml/bob"], ["o/ops/cid"], ["o/dan"], ["zoo/ml/eve"], ["fay"], ["gus"]]),
        ("organisation", [["o/ml/ann", "o/ml/bob", "o/ops/cid", "o/dan"], ["zoo/ml/eve"], ["fay"], ["gus"]]),
        ("replica", [["o/ml/ann", "o/ml/bob", "o/ops/cid", "o/dan", "zoo/ml/eve", "fay", "gus"]]),
    ],
)  # fmt: skip
def test_equal_prompts_have_equal_keys_within_the_scope_only(scope: PrefixScope, groups: list[list[str]]) -> None:
    found: dict[bytes, list[str]] = {}
    for client in (client for group in groups for client in group):
        found.setdefault(keys_of(client, [1, 2], scope)[0], []).append(client)
    assert list(found.values()) == groups


def test_no_client_is_named_like_a_group() -> None:
    assert scope_of("acme", "organisation") != scope_of("acme/ann", "organisation")


# -- blocks ---------------------------------------------------------------------------------------------------------


def computed(kv: KVBlocks, name: str, tokens: Sequence[int], expected: int = 0) -> int:
    """Start a sequence, compute it whole, store it."""
    keys = keys_of("ann", tokens)
    num_found = kv.take(name, len(tokens), expected, keys[: (len(tokens) - 1) // BLOCK])
    kv.store(name, num_found, keys[num_found:])
    kv.check()
    return num_found


def test_the_next_turn_takes_the_blocks_of_the_last_one_in_place() -> None:
    kv = KVBlocks(12, BLOCK, num_lanes=3)
    computed(kv, "other", [7] * 4, 8)
    computed(kv, "one", [1, 2, 3, 4, 5, 6], 8)
    kv.free("other")
    kv.free("one")
    assert computed(kv, "two", [1, 2, 3, 4, 5, 6, 7], 8) == 3
    assert kv.start("two") == 4 * BLOCK, "not at the first lane, which is free"
    assert kv.take_copies() == ()


def test_what_a_running_sequence_holds_is_copied() -> None:
    kv = KVBlocks(12, BLOCK, num_lanes=3)
    computed(kv, "one", [1, 2, 3, 4, 5], 8)
    assert computed(kv, "two", [1, 2, 3, 4, 9], 8) == 2
    assert kv.take_copies() == ((0, 4), (1, 5))
    assert kv.take_copies() == (), "once"
    assert kv.start("two") == 4 * BLOCK


def test_content_is_moved_out_of_the_way_instead_of_lost() -> None:
    kv = KVBlocks(6, BLOCK, num_lanes=2)
    computed(kv, "one", [1, 2, 3, 4])
    kv.free("one")
    assert computed(kv, "two", [5, 6, 7, 8]) == 0
    assert kv.table("two") == (0, 1), "the first lane is the best place all the same"
    assert dict(kv.take_copies()) == {0: 4, 1: 5}
    assert computed(kv, "three", [1, 2, 3, 4, 9]) == 2


def test_a_sequence_that_grows_into_content_moves_it() -> None:
    kv = KVBlocks(6, BLOCK, num_lanes=2)
    computed(kv, "two", [5, 6])
    for i in range(5):
        computed(kv, f"r{i}", [i, i])
    for i in range(5):
        kv.free(f"r{i}")
    kv.take_copies()
    kv.take("two", 4)
    assert kv.table("two") == (0, 1)
    assert len(kv.take_copies()) <= 1, "one was lost, so at most one moved"
    assert kv.num_cached == 4


def test_sharing_counts_a_block_once_and_keeps_it_until_the_last_has_left() -> None:
    kv = KVBlocks(6, BLOCK, shares=True)
    computed(kv, "one", [1, 2, 3, 4, 5])
    assert not kv.can_start(9, keys_of("ann", range(8))), "five blocks are too many"
    assert kv.can_start(9, keys_of("ann", [1, 2, 3, 4])), "but two of them are here"
    assert computed(kv, "two", [1, 2, 3, 4, 9]) == 2
    assert kv.table("one")[:2] == kv.table("two")[:2]
    assert (kv.num_free, kv.num_shared) == (2, 2)
    assert not kv.can_start(9, keys_of("ann", [1, 2, 3, 4, 7, 7]))
    assert kv.can_start(9, keys_of("ann", [1, 2, 3, 4]), without=["two"])
    assert not kv.can_start(9, without=["two"]), "what it shares does not become free"
    kv.free("one")
    assert (kv.num_free, kv.num_shared, kv.num_cached) == (3, 0, 0)
    kv.free("two")
    assert (kv.num_free, kv.num_cached) == (6, 2)


def test_what_a_failed_sequence_held_is_never_found_again() -> None:
    kv = KVBlocks(6, BLOCK, shares=True)
    computed(kv, "one", [1, 2, 3, 4, 5])
    computed(kv, "two", [1, 2, 3, 4, 9])
    assert kv.forget("two") == (kv.table("two")[2],), "what another reads is not cleared"
    kv.free("one")
    kv.free("two")
    assert kv.num_cached == 0


def test_of_what_is_free_the_oldest_is_lost_and_of_a_prompt_its_end() -> None:
    kv = KVBlocks(4, BLOCK)
    computed(kv, "old", [1, 2, 3, 4])
    computed(kv, "new", [5, 6, 7, 8])
    kv.free("old")
    kv.free("new")
    computed(kv, "big", [9, 9])
    assert len(list(kv._cache.match(keys_of("ann", [1, 2, 3, 4])))) == 1
    assert len(list(kv._cache.match(keys_of("ann", [5, 6, 7, 8])))) == 2


# -- everything at once ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A sequence of the machine below."""

    client: str
    tokens: list[int]
    num_computed: int = 0
    num_stored: int = 0
    is_new: bool = True

    def at(self, position: int) -> tuple[str, tuple[int, ...]]:
        """What a slot holds: keys and values depend on all tokens before."""
        return self.client, tuple(self.tokens[: position + 1])


@dataclass
class Model:
    """The cache as one would like it: contents by who holds them, and the idle ones by age."""

    holders: dict[bytes, set[str]] = field(default_factory=dict)
    idle: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def held(self, key: bytes, name: str, shares: bool) -> None:
        if key in self.idle or key not in self.holders:
            self.idle.pop(key, None)
            self.holders[key] = {name}
        elif shares:
            self.holders[key].add(name)

    def left(self, keys: Sequence[bytes], name: str) -> None:
        for key in reversed(keys):
            if name in self.holders.get(key, ()):
                self.holders[key].remove(name)
                if not self.holders[key]:
                    self.idle[key] = None

    def forget(self, keys: Sequence[bytes], name: str) -> None:
        for key in keys:
            if name in self.holders.get(key, ()):
                del self.holders[key]

    def shrink(self, num_free: int) -> None:
        while len(self.idle) > num_free:
            key, _ = self.idle.popitem(last=False)
            del self.holders[key]


class Cache(RuleBasedStateMachine):
    """Plans of several requests over one small cache: memory is modelled slot by slot, the cache content by content."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Run] = {}
        self.model = Model()
        self.num_named = 0

    @initialize(shares=st.booleans(), num_blocks=st.integers(4, 14), num_lanes=st.integers(1, 5))
    def begin(self, shares: bool, num_blocks: int, num_lanes: int) -> None:
        self.kv = KVBlocks(num_blocks, BLOCK, num_lanes, shares=shares)
        self.memory: list[object] = [None] * (num_blocks * BLOCK)

    def slot(self, name: str, position: int) -> int:
        return self.kv.table(name)[position // BLOCK] * BLOCK + position % BLOCK

    def leave(self, name: str) -> None:
        run = self.runs.pop(name)
        self.model.left(keys_of(run.client, run.tokens)[: run.num_stored], name)
        self.kv.free(name)

    @rule(
        stops=st.lists(st.integers(0, 9), max_size=2),
        grows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=2),
        starts=st.lists(
            st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(0, 20)),
            max_size=3,
        ),
        share=st.floats(0, 1),
        fails=st.integers(0, 9),
    )
    def step(
        self,
        stops: list[int],
        grows: list[tuple[int, int]],
        starts: list[tuple[str, list[int], int]],
        share: float,
        fails: int,
    ) -> None:
        kv = self.kv
        for which in stops:
            if self.runs:
                self.leave(sorted(self.runs)[which % len(self.runs)])
        for which, more in grows:
            if self.runs:
                name = sorted(self.runs)[which % len(self.runs)]
                run = self.runs[name]
                if kv.can_hold(name, len(run.tokens) + more):
                    run.tokens += [1] * more
                    kv.take(name, len(run.tokens))
                    self.model.shrink(kv.num_free)
        for client, tokens, expected in starts:
            self.start(client, tokens, expected)
        before, copies = list(self.memory), kv.take_copies()
        for source, block in copies:
            self.memory[block * BLOCK : block * BLOCK + BLOCK] = before[source * BLOCK : source * BLOCK + BLOCK]
        for name, run in self.runs.items():
            for position in range(run.num_computed):
                assert self.memory[self.slot(name, position)] == run.at(position), f"{name} reads what is not its own"
        found = {block for name, run in self.runs.items() for block in kv.table(name)[: run.num_stored]}
        assert all(block in found or kv._cache.key(block) for _, block in copies), "copied for nobody"
        for name in sorted(self.runs)[:]:
            self.compute(name, share, is_failing=name == f"r{fails}")

    def start(self, client: str, tokens: list[int], expected: int) -> None:
        kv, name = self.kv, f"r{self.num_named}"
        keys = keys_of(client, tokens)[: (len(tokens) - 1) // BLOCK]
        if not kv.can_start(len(tokens), keys):
            assert kv.shares or kv.num_free < kv.blocks_for(len(tokens))
            return
        self.num_named += 1
        known = next((i for i, key in enumerate(keys) if key not in self.model.holders), len(keys))
        num_found = kv.take(name, len(tokens), expected, keys)
        assert num_found == known, "not what the model knows"
        for key in keys[:num_found]:
            self.model.held(key, name, kv.shares)
        self.model.shrink(kv.num_free)
        self.runs[name] = Run(client, list(tokens), num_found * BLOCK, num_found)

    def compute(self, name: str, share: float, is_failing: bool) -> None:
        """Some of what is not computed yet; rounded up, so that there is always progress."""
        run = self.runs[name]
        end = run.num_computed + -int(-(len(run.tokens) - run.num_computed) * share // 1)
        for position in range(run.num_computed, end):
            self.memory[self.slot(name, position)] = "nan" if is_failing else run.at(position)
        if is_failing:
            keys = keys_of(run.client, run.tokens)[: run.num_stored]
            self.model.forget(keys, name)
            for block in self.kv.forget(name):
                self.memory[block * BLOCK : block * BLOCK + BLOCK] = [None] * BLOCK
            self.leave(name)
            return
        run.num_computed = end
        keys = keys_of(run.client, run.tokens[:end])
        self.kv.store(name, run.num_stored, keys[run.num_stored :])
        for key in keys[run.num_stored :]:
            self.model.held(key, name, shares=False)
        run.num_stored = len(keys)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "kv"):
            return
        self.kv.check()
        assert self.kv._cache._block_of.keys() == self.model.holders.keys(), "another content is known"
        assert list(self.kv._cache._idle) == list(self.model.idle), "another content is the oldest"
        assert "nan" not in self.memory, "what failed was not cleared"


Cache.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestCache = Cache.TestCase
