"""Attention on CUDA with xformers, over a paged cache. Imported only there.

NOT RUN ON THE MACHINE IT WAS WRITTEN ON, which has no GPU: written against the source of xformers 0.0.35. Where it
runs, ``sizing.why_not`` first compares it with torch's attention on the model itself, and takes torch's if they differ.

Cache of a layer: keys ``[slots, kv_heads, dim]``, values alike; a page is one KV block.

- Decodes: ``PagedBlockDiagonalPaddedKeysMask`` over the block tables, through ``triton_splitKF``, which is pure Triton
  and splits long keys over the whole GPU. It wants pages of a multiple of 64 tokens (``BLOCK_N``). With one query per
  sequence the causal variant of the mask hides nothing more, and this one is free of its limit on query lengths.
- Prompt chunks: keys and values are gathered once (a copy of the context, small beside the chunk's own products) and
  attended to with ``BlockDiagonalCausalFromBottomRightMask``. The paged causal mask would save the copy, but xformers
  supports it only with its own flash-attention build, not with the one that comes with torch (``_USE_PT_FLASH_ATTN``).
- A layer with a sliding window shorter than a sequence reads through plain SDPA with a mask, chunk by chunk.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from xformers.ops import fmha

from fairserve.engine.attention import LayerCaches, Span, StepLayout, slots_of


class XformersAttention(LayerCaches):
    block_size_multiple: ClassVar[int] = 64
    shares_blocks: ClassVar[bool] = True
    slot_dim: ClassVar[int] = 0

    def __init__(self, num_slots: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_slots, block_size, dtype, device)
        self._num_decodes = 0
        self._longest = 0
        self._decode_bias: fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask | None = None
        self._prefill_bias: fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask | None = None
        self._prefill_slots: Tensor | None = None

    def allocate(self, layer: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        for cache, dim in ((self._keys, key_dim), (self._values, value_dim)):
            cache[layer] = torch.zeros(self._num_slots, kv_heads, dim, dtype=self._dtype, device=self._device)

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        self._num_decodes = len(layout.decodes)
        self._longest = max((span.length for span in (*layout.decodes, *layout.prefills)), default=0)
        self._decode_bias = self._prefill_bias = self._prefill_slots = None
        if layout.decodes:
            width = max(len(span.block_table) for span in layout.decodes)
            tables = [span.block_table + (0,) * (width - len(span.block_table)) for span in layout.decodes]
            self._decode_bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                q_seqlen=[1] * len(tables),
                kv_seqlen=[span.length for span in layout.decodes],
                block_tables=torch.tensor(tables, dtype=torch.int32, device=self._device),
                page_size=self._block_size,
                device=self._device,
            )
        if layout.prefills:
            self._prefill_bias = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
                q_seqlen=[span.count for span in layout.prefills],
                kv_seqlen=[span.length for span in layout.prefills],
                device=self._device,
            )
            slots = [slot for span in layout.prefills for slot in slots_of(span, self._block_size)]
            self._prefill_slots = torch.tensor(slots, device=self._device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        assert self._layout is not None, "attend before begin"
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, self._layout.slots, key[0].transpose(0, 1))
        values.index_copy_(0, self._layout.slots, value[0].transpose(0, 1))
        if window is not None and self._longest > window:
            return self._attend_windowed(query, keys, values, scale, window)
        kv_heads, heads = keys.shape[1], query.shape[1]
        # [1, T, kv_heads, group, dim]; keys are expanded over the group without a copy (xformers' BMGHK).
        q = query.transpose(1, 2).unflatten(2, (kv_heads, heads // kv_heads))
        group = heads // kv_heads
        parts = []
        if self._decode_bias is not None:
            k, v = (t[None, :, :, None].expand(-1, -1, -1, group, -1) for t in (keys, values))
            rows = q[:, : self._num_decodes].contiguous()
            op = fmha.triton_splitk.FwOp
            parts.append(fmha.memory_efficient_attention_forward(rows, k, v, self._decode_bias, scale=scale, op=op))
        if self._prefill_bias is not None:
            k, v = (t[self._prefill_slots][None, :, :, None].expand(-1, -1, -1, group, -1) for t in (keys, values))
            rows = q[:, self._num_decodes :].contiguous()
            parts.append(fmha.memory_efficient_attention_forward(rows, k, v, self._prefill_bias, scale=scale))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.flatten(2, 3)

    def _attend_windowed(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
        assert self._layout is not None
        parts = []
        for span in (*self._layout.decodes, *self._layout.prefills):
            slots = torch.tensor(slots_of(span, self._block_size), device=self._device)
            k, v = (t[slots].transpose(0, 1).unsqueeze(0) for t in (keys, values))
            rows = query[:, :, span.row : span.row + span.count]
            mask = _window_mask(span, window, self._device)
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    rows, k, v, attn_mask=mask, scale=scale, enable_gqa=True
                )
            )
        return torch.cat(parts, dim=2).transpose(1, 2)


def _window_mask(span: Span, window: int, device: torch.device) -> Tensor:
    """Boolean [rows, length]: what each row may see."""
    rows = torch.arange(span.length - span.count, span.length, device=device).unsqueeze(1)
    columns = torch.arange(span.length, device=device)
    return (columns <= rows) & (columns > rows - window)
