"""What is asked of a prompt besides its next token: log probabilities of its own tokens, or its hidden states pooled.

A step reads it off the rows that it computes (``Chunk.targets``, ``Chunk.pools``), each row once, whatever is computed
again after a preemption. Nothing of it stays on the device: at most ``batching.MAX_SCORED`` rows of the vocabulary live
for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairserve.engine.request import TokenLogprob


@dataclass(frozen=True, slots=True)
class PromptRows:
    """What one chunk gave."""

    logprobs: tuple[TokenLogprob, ...] = ()
    pooled: Tensor | None = None
    """float64 [hidden size] on the CPU: the sum of the rows."""


class PromptReading:
    """What the chunks of one request gave, together."""

    def __init__(self) -> None:
        self._logprobs: list[TokenLogprob] = []
        self._pooled: Tensor | None = None

    def add(self, rows: PromptRows) -> None:
        """Of the next chunk."""
        self._logprobs += rows.logprobs
        if rows.pooled is not None:
            self._pooled = rows.pooled if self._pooled is None else self._pooled + rows.pooled

    def take(self) -> list[TokenLogprob]:
        """Log probabilities of the prompt's tokens from the second on; they are given out once."""
        logprobs, self._logprobs = self._logprobs, []
        return logprobs

    def embedding(self) -> bytes:
        """The pooled hidden states as a vector of length 1, float32, little-endian; empty where none were asked for.
        A sum and a mean have the same direction."""
        if self._pooled is None:
            return b""
        unit = self._pooled / torch.linalg.vector_norm(self._pooled).clamp_min(torch.finfo(torch.float64).tiny)
        return unit.numpy().astype("<f4").tobytes()


def scores(logits: Tensor, targets: Sequence[Sequence[int]], num_top: Sequence[int]) -> list[tuple[TokenLogprob, ...]]:
    """Log probabilities of ``targets``, by chunk, with the ``num_top`` most likely tokens of each row.

    ``logits`` [n, vocabulary]: the rows that the targets follow, chunk by chunk.
    """
    if not targets:
        return []
    logits = logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    flat = torch.tensor([[token] for one in targets for token in one], device=logits.device)
    chosen = iter((logits.gather(1, flat) - total).squeeze(1).tolist())
    values, ids = logits.topk(min(max(num_top), logits.shape[-1]), dim=-1)
    rows = zip(ids.tolist(), (values - total).tolist(), strict=True)
    scored = []
    for tokens, num in zip(targets, num_top, strict=True):
        one = []
        for token in tokens:
            top_ids, top_values = next(rows)
            one.append(TokenLogprob(token, next(chosen), tuple(zip(top_ids[:num], top_values[:num], strict=True))))
        scored.append(tuple(one))
    return scored


@contextmanager
def last_hidden(model: Any) -> Iterator[list[Tensor]]:
    """Of a model of transformers' that runs inside: the hidden states [1, T, size] that its head is applied to; nothing
    of None.

    Raises:
        NotImplementedError: it does not tell its head from the rest.
    """
    seen: list[Tensor] = []
    if model is None:
        yield seen
        return
    if model.base_model is model:
        raise NotImplementedError(f"{type(model).__name__} has no base model to read hidden states from")

    def saw(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0])

    handle = model.base_model.register_forward_hook(saw)
    try:
        yield seen
    finally:
        handle.remove()
