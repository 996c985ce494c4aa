"""What each replica's prefix cache probably holds: the prefixes of what was granted to it.

Each hash covers all tokens before it, so what is known of a prompt at a replica is a leading part of its hashes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b


class HashChain:
    """Hashes of a growing sequence of tokens, one per whole block, each covering ``start`` and all tokens before it."""

    __slots__ = ("_block_bytes", "_hash")

    def __init__(self, start: bytes, block_tokens: int, digest_size: int, secret: bytes = b"") -> None:
        """``digest_size``: bytes of a hash. ``secret``: at most 64 bytes; who does not know it can make no hash."""
        self._hash = blake2b(start, digest_size=digest_size, key=secret)
        self._block_bytes = 8 * block_tokens

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """The next blocks' hashes. Tokens past the last whole block are passed over: give them again, with more."""
        tokens, size, chain, hashes = array("q", token_ids).tobytes(), self._block_bytes, self._hash, []
        for end in range(size, len(tokens) + 1, size):
            chain.update(tokens[end - size : end])
            hashes.append(chain.digest())
        return hashes


def prefix_hashes(client: str, token_ids: Sequence[int], block_tokens: int, adapter: str = "") -> tuple[int, ...]:
    """One 64-bit hash per whole block of a prompt, each covering all before it. Salted with the client: equal prompts
    of two clients have nothing in common, for what is shared can be felt in the time to the first token. Nor have those
    of two LoRA adapters: what one computed is of no use to the other."""
    name = client.encode()
    chain = HashChain(len(name).to_bytes(8, "little") + name + adapter.encode(), block_tokens, digest_size=8)
    return tuple(int.from_bytes(block, "little") for block in chain.extend(token_ids))


class PrefixMap:
    """Hashes per replica, least recently granted first out."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._of: dict[str, OrderedDict[int, None]] = {}
        self._at: dict[int, set[str]] = {}

    def granted(self, replica: str, prefix: Sequence[int], capacity_tokens: int) -> None:
        """A prompt went to a replica whose KV cache holds ``capacity_tokens``."""
        mine = self._of.setdefault(replica, OrderedDict())
        for block in reversed(prefix):  # the first block is the one to keep longest
            mine[block] = None
            mine.move_to_end(block)
            self._at.setdefault(block, set()).add(replica)
        while len(mine) * self._block_tokens > capacity_tokens:
            block, _ = mine.popitem(last=False)
            self._gone(block, replica)

    def holders(self, prefix: Sequence[int]) -> Collection[str]:
        """Replicas that know the beginning of a prompt; in no order. To look at."""
        return self._at.get(prefix[0], ()) if prefix else ()

    def longest(self, prefix: Sequence[int]) -> Mapping[str, int]:
        """replica -> leading prompt tokens known there, for the replicas that know any."""
        return {replica: self.num_known(prefix, replica) for replica in self.holders(prefix)}

    def num_known(self, prefix: Sequence[int], replica: str, beyond: int = 0) -> int:
        """Leading tokens known at one replica; 0 for not more than ``beyond`` of them, which takes one look. O(log n):
        of one prompt the first blocks are forgotten last."""
        known = self._of.get(replica, ())
        low, high = max(0, beyond) // self._block_tokens + 1, len(prefix)
        if low > high or prefix[low - 1] not in known:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if prefix[middle - 1] in known:
                low = middle
            else:
                high = middle - 1
        return low * self._block_tokens

    def forget(self, replica: str) -> None:
        for block in self._of.pop(replica, ()):
            self._gone(block, replica)

    def _gone(self, block: int, replica: str) -> None:
        at = self._at[block]
        at.discard(replica)
        if not at:
            del self._at[block]

    def check(self) -> None:
        pairs = {(replica, block) for replica, blocks in self._of.items() for block in blocks}
        assert pairs == {(replica, block) for block, at in self._at.items() for replica in at}
