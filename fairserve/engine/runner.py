"""A plan becomes tensors, the model runs once, tokens come back."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairserve.engine.attention import KVAttention, Span, StepLayout, slots_of
from fairserve.engine.batching import Chunk, StepPlan
from fairserve.engine.lora import Adapters
from fairserve.engine.prompt_rows import PromptRows, last_hidden, scores
from fairserve.engine.sampling import Sampled, Sampler

logger = logging.getLogger(__name__)

_NUM_PROBE = 4


class Rows(NamedTuple):
    """What a step gives, by rows of its chunks."""

    logits: Tensor
    """[chunks, vocabulary]: of the last token of each chunk."""
    scored: Tensor
    """[n, vocabulary]: of the rows that targets follow, chunk by chunk."""
    pooled: tuple[Tensor, ...] = ()
    """float64 [hidden size]: the sums that were asked for, one for each chunk that pools."""


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
        adapters: Adapters | None = None,
    ) -> None:
        """``spare_block``: a KV block that no request gets, see :meth:`is_sound`. ``adapters``: those that the model
        has."""
        self.sampler = sampler
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._device = device
        self._spare_block = spare_block
        self._adapters = adapters
        parameters = inspect.signature(model.forward).parameters
        self._selects_rows = "logits_to_keep" in parameters
        self._gives_hidden = "gives_hidden" in parameters

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        """Compute the plan. Returns the token of each request whose chunk samples and None for the others; without
        those whose logits are not finite."""
        chunks = (*sorted(plan.decodes, key=_slot_order), *plan.prefills)
        rows = self.forward(chunks, len(plan.decodes))
        read = self._read(chunks, rows)
        sampled = self.sampler.sample(
            rows.logits, [chunk.request_id for chunk in chunks], [chunk.samples for chunk in chunks]
        )
        for request_id, prompt in read.items():
            if request_id in sampled:
                sampled[request_id] = replace(sampled[request_id] or Sampled(-1), prompt=prompt)
        return sampled

    def _read(self, chunks: Sequence[Chunk], rows: Rows) -> dict[str, PromptRows]:
        """What was asked of prompts, by request."""
        if not (rows.pooled or len(rows.scored)):
            return {}
        scored = [chunk for chunk in chunks if chunk.targets]
        num_top = [self.sampler.num_prompt_logprobs(chunk.request_id) for chunk in scored]
        logprobs = scores(rows.scored, [chunk.targets for chunk in scored], num_top)
        read = {chunk.request_id: PromptRows(one) for chunk, one in zip(scored, logprobs, strict=True)}
        pooled = (chunk for chunk in chunks if chunk.pools)
        return read | {
            chunk.request_id: PromptRows(pooled=one.cpu()) for chunk, one in zip(pooled, rows.pooled, strict=True)
        }

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], num_decodes: int) -> Rows:
        """Compute the chunks; the first ``num_decodes`` have one token each.

        A chunk that does not sample needs its logits too: they show NaN in the step that made it, before another
        request's padding lies over it.
        """
        spans: list[Span] = []
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        scored: list[int] = []
        pooled: list[range] = []
        for chunk in chunks:
            read_from = len(token_ids) + chunk.read_from
            span = Span(len(token_ids), len(chunk.token_ids), chunk.end, chunk.start, chunk.block_table)
            spans.append(span)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.position, chunk.end))
            slots.extend(slots_of(span, self._block_size, chunk.position))
            rows.append(len(token_ids) - 1)
            scored.extend(range(read_from, read_from + len(chunk.targets)))
            if chunk.pools:
                pooled.append(range(read_from, len(token_ids)))
        self._cache.begin(
            StepLayout(tuple(spans[:num_decodes]), tuple(spans[num_decodes:]), self._tensor(slots).view(-1))
        )
        if self._adapters is not None:
            self._adapters.step.begin(
                (chunk.adapter, span.row, span.count) for chunk, span in zip(chunks, spans, strict=True)
            )
        kept = self._tensor(rows + scored).view(-1)
        selection: dict[str, Any] = {"logits_to_keep": kept} if self._selects_rows else {}
        if pooled and self._gives_hidden:
            selection["gives_hidden"] = True
        with last_hidden(self._model if pooled and not self._gives_hidden else None) as seen:
            output = self._model(
                input_ids=self._tensor(token_ids).view(1, -1),
                position_ids=self._tensor(positions).view(1, -1),
                use_cache=False,
                **selection,
            )
        logits: Tensor = output.logits[0]
        if not self._selects_rows:
            logits = logits[kept]
        hidden: Any = seen[0][0] if seen else output.hidden if pooled else None
        sums = tuple(hidden[one.start : one.stop].double().sum(0) for one in pooled)
        return Rows(logits[: len(rows)], logits[len(rows) :], sums)

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
                if not torch.isfinite(self.forward([chunk], int(begin > 0)).logits.max()).item():
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
