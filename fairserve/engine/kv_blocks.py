"""Who holds which KV blocks, and what is in them. A table of blocks per sequence; no tensors, no torch.

The cache is ``num_blocks * block_size`` token slots; block b is the ``block_size`` slots from ``b * block_size`` on.
Any block may belong to any sequence, so memory is never lost to placement. But attention on a CPU is faster when a
sequence's blocks follow each other (a view instead of a gather: 16 sequences of 800 tokens cost 0.9 ms a layer as
views, 12 ms gathered) and faster still when sequences stand at equal distances (one strided view for the whole batch).
So the cache is cut into equal lanes, one per running sequence: a new sequence starts at the head of a free lane, grows
into the neighbouring block while that is free, and takes blocks from the far end where it is not.

A freed block keeps what was computed in it (``prefix_cache.py``) until the block is needed: a sequence that begins with
the same tokens need not compute them again. How it gets them depends on the attention:

- ``shares`` (a paged cache on a GPU): both sequences hold the same block. New blocks are the ones worth least.
- Else (views): the sequence takes the blocks in place where they are free and lie where it starts; others are copied to
  where it wants them. Content that lies where a sequence starts or grows is moved out of its way, to a block that is
  worth less, so that placement decides about speed alone, and what is lost is always what was used longest ago.
  Copying a token's keys and values costs microseconds, computing them milliseconds.

Copies are to be made by the caller, all of them between this step's plan and its computation (:meth:`take_copies`),
and as if all were read before any is written: a source may be another copy's destination.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from fairserve.engine.prefix_cache import PrefixCache
from fairserve.errors import ConfigError

_FREE = 1


class KVBlocks:
    """``can_`` methods ask, ``take`` and ``free`` act; all other code reads."""

    def __init__(self, num_blocks: int, block_size: int, num_lanes: int = 1, *, shares: bool = False) -> None:
        """``num_lanes`` (usually the largest number of running sequences) only guides placement. ``shares``: sequences
        may hold the same block."""
        if num_blocks < 1 or block_size < 1 or num_lanes < 1:
            raise ConfigError(f"a KV cache needs blocks: {num_blocks=}, {block_size=}, {num_lanes=}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shares = shares
        lane_blocks = max(1, num_blocks // num_lanes)
        self._lane_heads = range(0, num_blocks - lane_blocks + 1, lane_blocks)
        self._state = bytearray([_FREE]) * num_blocks
        self._empty = bytearray([_FREE]) * num_blocks
        """Free, and without content that could be found again."""
        self._num_free = num_blocks
        self._num_shared = 0
        self._holders = [0] * num_blocks
        self._cache = PrefixCache()
        self._copies: dict[int, int] = {}
        """Destination -> source, since the last :meth:`take_copies`."""
        self._tables: dict[str, list[int]] = {}
        self._contiguous: dict[str, bool] = {}
        self._hoped: dict[str, tuple[int, int]] = {}
        """Blocks [first, end) a sequence is expected to grow into: new sequences start elsewhere if they can."""

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whatever is in them."""
        return self._num_free

    @property
    def num_shared(self) -> int:
        """Blocks that sharing saves: holders beyond the first of each block."""
        return self._num_shared

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that a new sequence may find its beginning in."""
        return self._cache.num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens need."""
        return -(-num_tokens // self.block_size)

    def num_held(self, request_id: str) -> int:
        """Blocks this sequence holds; 0 for a stranger."""
        return len(self._tables.get(request_id, ()))

    def num_missing(self, request_id: str, num_tokens: int) -> int:
        """Blocks that this sequence lacks for ``num_tokens`` tokens in all; not positive where it holds enough."""
        return -(-num_tokens // self.block_size) - len(self._tables.get(request_id, ()))

    def can_hold(self, request_id: str, num_tokens: int) -> bool:
        """May this sequence (known or new) hold ``num_tokens`` tokens in all?"""
        return self.blocks_for(num_tokens) - self.num_held(request_id) <= self._num_free

    def can_start(self, num_tokens: int, keys: Sequence[bytes] = (), without: Collection[str] = ()) -> bool:
        """May a new sequence that begins with the content of ``keys`` hold ``num_tokens`` tokens, once the sequences
        ``without`` are gone?"""
        needed = self.blocks_for(num_tokens)
        if not self.shares:
            return needed <= self._num_free + sum(map(self.num_held, without))
        leaving = Counter(block for request_id in without for block in self._tables[request_id])
        num_freed = sum(self._holders[block] == num for block, num in leaving.items())
        num_kept = sum(self._holders[block] > leaving[block] for _, block in self._cache.match(keys))
        return needed - num_kept <= self._num_free + num_freed

    def take(self, request_id: str, num_tokens: int, expected_tokens: int = 0, keys: Sequence[bytes] = ()) -> int:
        """Give the sequence blocks for ``num_tokens`` tokens in all; :meth:`can_hold` (for a new one
        :meth:`can_start`) must be true.

        ``expected_tokens`` is how long the sequence may become; it only guides where a new one is placed. ``keys``: the
        content that a new one's leading blocks shall have. Returns how many of them do, after :meth:`take_copies`.
        """
        table = self._tables.get(request_id)
        if table is None:
            assert self.can_start(num_tokens, keys), f"{request_id}: no room for {num_tokens} tokens"
            self._contiguous[request_id] = True
            table = self._tables[request_id] = []
            if self.shares:
                return self._start_shared(request_id, table, self.blocks_for(num_tokens), keys)
            return self._start(request_id, table, self.blocks_for(num_tokens), self.blocks_for(expected_tokens), keys)
        assert self.can_hold(request_id, num_tokens), f"{request_id}: no room for {num_tokens} tokens"
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > 0:
            lifted: dict[bytes, int] = {}
            self._grow(request_id, table, missing, lifted)
            self._move(lifted)
        return 0

    def store(self, request_id: str, first: int, keys: Sequence[bytes]) -> None:
        """The sequence's blocks from the ``first``-th on are full, computed, and hold this content."""
        table, cache = self._tables[request_id], self._cache
        for i, key in enumerate(keys, first):
            known = cache.block(key)
            if known == table[i]:
                continue
            if known is not None:
                if not cache.is_idle(key):
                    continue  # somebody runs who holds it: he will leave it behind
                cache.drop(key)
                self._empty[known] = _FREE
            cache.put(key, table[i])

    def free(self, request_id: str) -> None:
        """Take back all blocks of the sequence; a stranger has none. What was stored in them can be found."""
        table = self._tables.pop(request_id, [])
        self._contiguous.pop(request_id, None)
        self._hoped.pop(request_id, None)
        for block in reversed(table):  # a prompt is found from its beginning: the last block is worth least
            self._holders[block] -= 1
            if self._holders[block]:
                self._num_shared -= 1
                continue
            self._num_free += 1
            self._state[block] = _FREE
            key = self._cache.key(block)
            if key is None:
                self._empty[block] = _FREE
            else:
                self._cache.park(key)

    def forget(self, request_id: str) -> tuple[int, ...]:
        """Nobody shall find what this sequence holds: it may be spoilt. Returns the blocks that nobody else holds."""
        table = self._tables.get(request_id, [])
        for block in table:
            key = self._cache.key(block)
            if key is not None:
                self._cache.drop(key)
        return tuple(block for block in table if self._holders[block] == 1)

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of each block to copy before anything else is written; each is given out once."""
        copies = tuple((source, block) for block, source in self._copies.items())
        self._copies.clear()
        return copies

    def table(self, request_id: str) -> tuple[int, ...]:
        """The sequence's blocks in the order of its tokens."""
        return tuple(self._tables[request_id])

    def start(self, request_id: str) -> int | None:
        """First slot of a sequence whose slots follow each other, None for a scattered one."""
        table = self._tables[request_id]
        return table[0] * self.block_size if table and self._contiguous[request_id] else None

    def check(self) -> None:
        """Every block is held or free, and counted once; every flag is true."""
        held = Counter(block for table in self._tables.values() for block in table)
        assert all(num == self._holders[block] for block, num in held.items()), "holders were miscounted"
        assert sum(self._holders) == held.total(), "a block without a table has a holder"
        assert self.shares or held.total() == len(held), "a block has two owners"
        assert self._num_free == self.num_blocks - len(held) == self._state.count(_FREE), "blocks were lost"
        assert self._num_shared == held.total() - len(held), "shared blocks were miscounted"
        assert all(self._state[block] != _FREE for block in held), "a held block is marked free"
        self._cache.check()
        for block in range(self.num_blocks):
            key = self._cache.key(block)
            is_empty = self._state[block] == _FREE and key is None
            assert (self._empty[block] == _FREE) == is_empty, f"block {block}: wrong emptiness flag"
            if key is not None:
                assert self._cache.is_idle(key) == (self._state[block] == _FREE), f"block {block}: content miscounted"
        assert self._tables.keys() == self._contiguous.keys(), "a table without its flag"
        assert self._hoped.keys() <= self._tables.keys(), "a hope without a table"
        for request_id, table in self._tables.items():
            follows = table == list(range(table[0], table[0] + len(table))) if table else True
            assert self._contiguous[request_id] == follows, f"{request_id}: wrong contiguity flag"

    # -- sequences that share blocks ----------------------------------------------------------------------------------

    def _start_shared(self, request_id: str, table: list[int], needed: int, keys: Sequence[bytes]) -> int:
        for key, block in self._cache.match(keys):
            if self._holders[block]:
                self._num_shared += 1
            else:
                self._cache.wake(key)
                self._state[block] = 0
                self._num_free -= 1
            self._holders[block] += 1
            table.append(block)
        found = len(table)
        self._contiguous[request_id] = all(b == table[0] + i for i, b in enumerate(table))
        self._grow(request_id, table, needed - found, {})
        return found

    # -- sequences that want to lie in one piece ----------------------------------------------------------------------

    def _start(self, request_id: str, table: list[int], needed: int, expected: int, keys: Sequence[bytes]) -> int:
        hits = [(key, block, self._copies.get(block, block)) for key, block in self._cache.match(keys)]
        mine = [not self._holders[block] for _, block, _ in hits]
        for (key, block, _), is_mine in zip(hits, mine, strict=True):
            if is_mine:  # it comes along; else somebody runs who holds it, and this will be a second copy
                self._cache.drop(key)
                self._empty[block] = _FREE
                self._copies.pop(block, None)
        lifted: dict[bytes, int] = {}
        run = self._find_run(request_id, needed, max(needed, expected), hits[0][1] if hits else -1)
        for block in run:
            self._give(table, block, lifted)
        self._grow(request_id, table, needed - len(table), lifted)
        for block, (key, _, source), is_mine in zip(table, hits, mine, strict=False):
            if is_mine:
                self._cache.put(key, block)
            if source != block:
                self._copies[block] = source
        self._move(lifted)
        return len(hits)

    def _find_run(self, request_id: str, needed: int, wanted: int, home: int) -> range:
        """Free blocks in one piece for a new sequence, the best on offer; none when no run is long enough. ``home``:
        where what it begins with lies already."""
        for length in dict.fromkeys((wanted, needed)):
            run = bytes([_FREE]) * length
            heads = [head for head in self._lane_heads if self._state.startswith(run, head)]
            best = (home, *heads) if home in heads else heads
            unhoped = (h for h in best if not any(a < h + length and h < b for a, b in self._hoped.values()))
            first = next(unhoped, -1)
            if first < 0:
                first = heads[0] if heads else self._state.find(run)
            if first >= 0:
                self._hoped[request_id] = (first, first + length)
                return range(first, first + needed)
        return range(0)

    def _grow(self, request_id: str, table: list[int], num: int, lifted: dict[bytes, int]) -> None:
        for _ in range(num):
            beside = table[-1] + 1 if table else self.num_blocks
            free = self._empty if self.shares else self._state
            is_free = beside < self.num_blocks and free[beside] == _FREE
            block = beside if is_free else self._least(lifted)
            self._contiguous[request_id] &= not table or block == beside
            self._give(table, block, lifted)

    def _give(self, table: list[int], block: int, lifted: dict[bytes, int]) -> None:
        """``lifted`` takes up what is in the block: key -> the block where it is read."""
        self._state[block] = self._empty[block] = 0
        self._num_free -= 1
        self._holders[block] = 1
        table.append(block)
        source = self._copies.pop(block, block)
        key = self._cache.lift(block)
        if key is not None:
            lifted[key] = source

    def _least(self, lifted: dict[bytes, int]) -> int:
        """A free block, the one whose content is worth least; forgets that."""
        block = self._empty.rfind(_FREE)
        while block < 0:
            key, block = self._cache.pop_oldest()
            if lifted.pop(key, None) is not None:
                block = -1  # worth least of all, and its block is taken already
            else:
                self._empty[block] = _FREE
        return block

    def _move(self, lifted: dict[bytes, int]) -> None:
        """Find other blocks for content whose blocks were taken, as far as there is content worth less."""
        while lifted:
            block = self._empty.rfind(_FREE)
            if block < 0:
                key, block = self._cache.pop_oldest()
                if lifted.pop(key, None) is not None:
                    continue
            key, source = lifted.popitem()
            self._cache.put(key, block)
            self._empty[block] = 0
            self._copies[block] = source
