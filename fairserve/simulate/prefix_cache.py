"""A model of one replica's prefix cache: which leading blocks of a prompt need not be computed again.

It has room of its own, beside the KV blocks of running requests, and forgets the block that was used longest ago; of
one prompt the last blocks go first (as in vLLM's and SGLang's caches, which share one pool with the running requests).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fairserve.simulate.records import PREFIX_BLOCK


class PrefixCache:
    """Blocks of ``PREFIX_BLOCK`` tokens by hash; a hash stands for its block and all before it."""

    def __init__(self, capacity_tokens: int) -> None:
        self._max_blocks = capacity_tokens // PREFIX_BLOCK
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._blocks) * PREFIX_BLOCK

    def match(self, prefix: Sequence[int]) -> int:
        """Leading tokens that are here; changes nothing."""
        num = 0
        for block in prefix:
            if block not in self._blocks:
                break
            num += 1
        return num * PREFIX_BLOCK

    def use(self, prefix: Sequence[int]) -> None:
        """A prompt was computed: its blocks are here now, and were used last."""
        blocks = self._blocks
        for block in reversed(prefix[: self._max_blocks]):
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > self._max_blocks:
            blocks.popitem(last=False)
