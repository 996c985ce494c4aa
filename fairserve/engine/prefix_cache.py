"""What is in the KV blocks: a key for each full block, which block holds it, and which content is worth least.

A key is a hash over the block's tokens and all before them, over the LoRA adapter that computes them, and over the
scope that may share it (one client, if nothing else is configured: whether a prompt was seen before can be felt in the
time to its first token). Two prompts share a block only where the keys are equal; the tokens are not compared. That is
safe because the hash has 128 bits and is keyed with a secret of this engine, which no caller knows: nobody can search
for a collision, and by chance one of a billion blocks has one with probability 1e-21. The router's hashes
(``dispatch/prefixes.py``, the same chain) only guess where a prompt is known, so 64 bits without a secret serve there,
not here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from fairserve.dispatch.prefixes import HashChain
from fairserve.fairness.hierarchy import path_of

PrefixScope = Literal["client", "team", "organisation", "replica"]
KEY_BYTES = 16


def scope_of(client: str, scope: PrefixScope) -> str:
    """Whose requests may find each other's blocks: the client, or the group it belongs to. A client that belongs to
    no such group shares with nobody. Groups end with a slash: no client is named like one."""
    if scope == "replica":
        return "/"
    path = path_of(client)
    if scope == "organisation":
        return path[0]
    return path[-2] if scope == "team" and len(path) == 3 else client


class BlockKeys:
    """The keys of one sequence's full blocks, as far as they were asked for."""

    __slots__ = ("_block_size", "_chain", "_keys")

    def __init__(self, secret: bytes, scope: str, block_size: int, adapter: str = "") -> None:
        """``secret``: at most 64 bytes."""
        # Their lengths first: no names and tokens together look like other names and tokens.
        start = b"".join(len(name).to_bytes(8, "little") + name for name in (scope.encode(), adapter.encode()))
        self._chain = HashChain(start, block_size, KEY_BYTES, secret)
        self._block_size = block_size
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        """Blocks that have a key."""
        return len(self._keys)

    def add(self, token_ids: Sequence[int]) -> None:
        """The tokens of the next blocks; what does not fill a block is passed over, and comes again when it does."""
        self._keys.extend(self._chain.extend(token_ids))

    def __getitem__(self, blocks: slice) -> list[bytes]:
        return self._keys[blocks]


class KeyMaker:
    """Makes the keys of one engine."""

    def __init__(self, secret: bytes, scope: PrefixScope, block_size: int) -> None:
        self._secret = secret
        self._scope: PrefixScope = scope
        self._block_size = block_size

    def keys_for(self, client: str, adapter: str = "") -> BlockKeys:
        """``adapter``: keys and values that it computed are of no use to others."""
        return BlockKeys(self._secret, scope_of(client, self._scope), self._block_size, adapter)


class PrefixCache:
    """Which block holds which content. Content is busy while a sequence holds its block, else idle; idle content is
    lost least recently used first. Only :class:`~fairserve.engine.kv_blocks.KVBlocks` writes here."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        """Blocks with content."""
        return len(self._block_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def block(self, key: bytes) -> int | None:
        """The block that holds this content."""
        return self._block_of.get(key)

    def key(self, block: int) -> bytes | None:
        """What the block holds; None for nothing that could be found again."""
        return self._key_of.get(block)

    def is_idle(self, key: bytes) -> bool:
        return key in self._idle

    def match(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
        """The leading keys that are here, with their blocks; changes nothing."""
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                return
            yield key, block

    def put(self, key: bytes, block: int) -> None:
        """The block holds this content, from now on the only one that does: a sequence's, or lifted content that lies
        here now, idle as before."""
        assert block not in self._key_of, "a block has two contents"
        self._block_of[key] = block
        self._key_of[block] = key

    def park(self, key: bytes) -> None:
        """Nobody holds it any more; it was used last."""
        self._idle[key] = None
        self._idle.move_to_end(key)

    def wake(self, key: bytes) -> None:
        """Somebody holds it again."""
        del self._idle[key]

    def lift(self, block: int) -> bytes | None:
        """Take idle content off its block, which will hold something else. It keeps its age until :meth:`put` finds it
        another block, or it is the oldest and lost."""
        return self._key_of.pop(block, None)

    def drop(self, key: bytes) -> None:
        """Forget it."""
        block = self._block_of.pop(key)
        if self._key_of.get(block) == key:
            del self._key_of[block]
        self._idle.pop(key, None)

    def pop_oldest(self) -> tuple[bytes, int]:
        """Forget the idle content that was used longest ago, of one sequence the last block first."""
        key, _ = self._idle.popitem(last=False)
        block = self._block_of[key]
        self.drop(key)
        return key, block

    def check(self) -> None:
        assert self._key_of == {block: key for key, block in self._block_of.items()}, "keys and blocks disagree"
        assert self._idle.keys() <= self._block_of.keys(), "idle content without a block"
