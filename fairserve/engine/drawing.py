"""Which token a uniform number means: weights of scores, and inverse transform over a whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256
"""Tokens summed up together when one is drawn."""
_LEAST = -87.0
"""Scores below this, where 0 is the highest, weigh nothing. What they weigh is hardly a float32 any more, for which a
CPU takes up to 300 times as long (for minus infinity 20 times), and none but the uniform number 0 could tell the
difference."""


def weights_of(scores: Tensor) -> Tensor:
    """e to the scores, which are 0 at most. Overwrites them."""
    return torch.threshold_(scores.clamp_(min=_LEAST).exp_(), math.exp(_LEAST + 1e-4), 0.0)


def log_total(scores: Tensor) -> Tensor:
    """Of the weights of each row [R, 1]; the scores are 0 at most."""
    return scores.clamp(min=_LEAST).logsumexp(dim=-1, keepdim=True)


def inverse_transform(weights: Tensor, chances: Sequence[float]) -> Tensor:
    """Index [R] drawn with probability proportional to ``weights`` [R, n], ``chances``, a uniform number per row.

    Two searches, for a block and within it: running sums over the whole vocabulary are most of what drawing costs."""
    size = weights.shape[-1]
    num_blocks = size // _BLOCK
    sums = _sums(weights[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK)))
    tail = weights[:, num_blocks * _BLOCK :].sum(dim=-1, keepdim=True, dtype=torch.float64)
    blocks = torch.cat([sums, tail], dim=-1).cumsum(dim=-1)
    total = blocks[:, -1:]
    uniform = torch.tensor(chances, dtype=torch.float64, device=weights.device).unsqueeze(1)
    block, rest = _search(blocks, uniform * total)
    at = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, at.clamp(max=size - 1)).double().masked_fill_(at >= size, 0.0).cumsum(dim=-1)
    index, _ = _search(inside, rest)
    return (block * _BLOCK + index).squeeze(1)


def _sums(blocks: Tensor) -> Tensor:
    """Of the last dimension, in float64."""
    if blocks.device.type == "cpu":  # torch converts each number by itself
        return torch.from_numpy(np.add.reduce(blocks.numpy(), axis=-1, dtype=np.float64))
    return blocks.sum(dim=-1, dtype=torch.float64)


def _search(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where [R, 1] the running sums [R, n] pass ``target`` [R, 1], and how far it is beyond the sum before. It is taken
    to be below the total, however that was rounded: then what is found has weight."""
    total = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index, target - before
