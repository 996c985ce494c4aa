"""A plan becomes tensors, the model runs once, tokens come back."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairserve.engine.attention import KVAttention, Span, StepLayout, slots_of
from fairserve.engine.batching import Chunk, StepPlan
from fairserve.engine.sampling import Sampled, Sampler

logger = logging.getLogger(__name__)

_NUM_PROBE = 4


class Runner:
    """Owns the tensors: the model, its KV cache and the sampler."""

    def __init__(
        self,
        model: nn.Module,
        cache: KVAttention,
        block_size: int,
        device: torch.device,
        sampler: Sampler,
        spare_block: int,
    ) -> None:
        """``spare_block``: a KV block that no request gets, see :meth:`is_sound`."""
        self.sampler = sampler
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._device = device
        self._spare_block = spare_block
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        """Compute the plan. Returns the token of each request whose chunk samples and None for the others; without
        those whose logits are not finite."""
        chunks = (*sorted(plan.decodes, key=_slot_order), *plan.prefills)
        logits = self.forward(chunks, len(plan.decodes))
        return self.sampler.sample(logits, [chunk.request_id for chunk in chunks], [chunk.samples for chunk in chunks])

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], num_decodes: int) -> Tensor:
        """Logits [chunks, vocabulary] of the last token of each chunk; the first ``num_decodes`` have one each.

        A chunk that does not sample needs its logits too: they show NaN in the step that made it, before another
        request's padding lies over it.
        """
        spans: list[Span] = []
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            span = Span(len(token_ids), len(chunk.token_ids), chunk.end, chunk.start, chunk.block_table)
            spans.append(span)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.position, chunk.end))
            slots.extend(slots_of(span, self._block_size, chunk.position))
            rows.append(len(token_ids) - 1)
        self._cache.begin(
            StepLayout(tuple(spans[:num_decodes]), tuple(spans[num_decodes:]), self._tensor(slots).view(-1))
        )
        kept = self._tensor(rows).view(-1)
        selection: dict[str, Any] = {"logits_to_keep": kept} if self._selects_rows else {}
        output = self._model(
            input_ids=self._tensor(token_ids).view(1, -1),
            position_ids=self._tensor(positions).view(1, -1),
            use_cache=False,
            **selection,
        )
        logits: Tensor = output.logits[0]
        return logits if self._selects_rows else logits[kept]

    @torch.inference_mode()
    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), as if all were read before any is written."""
        size = self._block_size
        runs: list[tuple[int, int, int]] = []
        for source, block in sorted(copies):
            if runs and (source * size, block * size) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                runs[-1] = (*runs[-1][:2], runs[-1][2] + size)
            else:
                runs.append((source * size, block * size, size))
        self._cache.copy(runs)

    @torch.inference_mode()
    def scrub(self, blocks: Sequence[int]) -> None:
        """Clear the KV blocks of a request that failed: NaN left there would leak into padded batches."""
        span = Span(0, 0, len(blocks) * self._block_size, None, tuple(blocks))
        self._cache.scrub(self._tensor(list(slots_of(span, self._block_size))))

    @torch.inference_mode()
    def is_sound(self) -> bool:
        """Does the model still compute anything? A short prompt of our own and one decode, in the spare block."""
        embeddings: Any = self._model.get_input_embeddings()
        tokens = tuple(7919 * (i + 3) % embeddings.weight.shape[0] for i in range(min(_NUM_PROBE, self._block_size)))
        last = len(tokens) - 1
        start, table = self._spare_block * self._block_size, (self._spare_block,)
        try:
            for begin, end in ((0, last), (last, last + 1)) if last else ((0, 1),):
                chunk = Chunk("", begin, tokens[begin:end], True, table, start)
                if not torch.isfinite(self.forward([chunk], int(begin > 0)).max()).item():
                    return False
        except Exception:
            logger.exception("the model fails on a prompt of our own")
            return False
        return True

    def release_memory(self) -> None:
        """Give back to the device what torch keeps of it unused."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def stop(self) -> None:
        """Nothing will be run any more."""

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _slot_order(chunk: Chunk) -> float:
    return float("inf") if chunk.start is None else chunk.start
