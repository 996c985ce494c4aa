"""Attention with torch's scaled dot product, over a head-major cache: the path for CPUs, and without xformers for CUDA.

Cache of a layer: keys ``[kv_heads, slots, dim]``, values alike. Sequences whose slots follow each other are read
through views. Decodes of sequences at equal distances (``kv_blocks`` places them so) are one padded batch over one
strided view; scattered sequences are gathered. Groups of query heads that share a KV head fold into the query length
(decodes) or into a stride-0 dimension (prompt chunks): keys are never repeated in memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fairserve.engine.attention import LayerCaches, Span, StepLayout, slots_of

SPLIT_TOKENS = 256
"""Padding, in tokens, that costs about as much as one more SDPA call (some 15 us; 2 threads, 3 KV heads of 64)."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One SDPA call: which rows, which slots, which mask."""

    row: int
    rows: int
    sequences: int
    """More than one: decodes, one row each."""
    first: int
    """First slot; ``index`` instead for a scattered sequence."""
    stride: int
    length: int
    index: Tensor | None
    mask: Tensor | None
    causal: bool


def group_decodes(starts: Sequence[int], lengths: Sequence[int], num_slots: int) -> list[tuple[int, int, int]]:
    """Cut sequences, given by first slot (ascending) and length, into batches: (first, count, distance of starts).

    A batch is read as one strided view, every sequence as long as the longest; it must lie inside the cache.
    """
    groups: list[tuple[int, int, int]] = []
    first, stride, longest = 0, 0, 0
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = i - first
        if count:
            distance = start - starts[i - 1]
            longer = max(longest, length)
            padding = (count + 1) * longer - count * longest - length
            if (count == 1 or distance == stride) and padding <= SPLIT_TOKENS and start + longer <= num_slots:
                stride, longest = distance, longer
                continue
            groups.append((first, count, stride))
        first, stride, longest = i, 0, length
    if starts:
        groups.append((first, len(starts) - first, stride))
    return groups


class SdpaAttention(LayerCaches):
    block_size_multiple: ClassVar[int] = 1
    shares_blocks: ClassVar[bool] = False
    slot_dim: ClassVar[int] = 1

    def __init__(self, num_slots: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_slots, block_size, dtype, device)
        self._both: dict[int, Tensor] = {}
        """Keys and values of a layer as one tensor, where they are alike: ``[2 kv_heads, slots, dim]``."""
        self._readings: dict[int | None, list[_Reading]] = {}

    def allocate(self, layer: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        if key_dim == value_dim:
            both = zeros_on_touch((2 * kv_heads, self._num_slots, key_dim), self._dtype, self._device)
            self._both[layer] = both
            self._keys[layer], self._values[layer] = both[:kv_heads], both[kv_heads:]
            return
        for cache, dim in ((self._keys, key_dim), (self._values, value_dim)):
            cache[layer] = zeros_on_touch((kv_heads, self._num_slots, dim), self._dtype, self._device)

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        self._readings = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        layout = self._layout
        assert layout is not None, "attend before begin"
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(1, layout.slots, key[0])
        values.index_copy_(1, layout.slots, value[0])
        readings = self._readings_of(layout, window)
        kv_heads, heads, num_rows = keys.shape[0], query.shape[1], query.shape[2]
        parts = []
        for reading in readings:
            rows = query[0, :, reading.row : reading.row + reading.rows]
            k, v = _view(keys, reading), _view(values, reading)
            if reading.rows == reading.sequences:
                q = rows.transpose(0, 1).reshape(reading.rows, kv_heads, heads // kv_heads, -1)
                out = functional.scaled_dot_product_attention(q, k, v, attn_mask=reading.mask, scale=scale)
                parts.append(out.reshape(reading.rows, heads, -1))
            else:
                q = rows.unflatten(0, (kv_heads, heads // kv_heads))
                k, v = (t.transpose(0, 1).expand(-1, heads // kv_heads, -1, -1) for t in (k, v))
                mask = reading.mask
                out = functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=reading.causal, scale=scale
                )
                parts.append(out.flatten(0, 1).transpose(0, 1))
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result.reshape(1, num_rows, heads, -1)

    def attend_rows(self, layer: int, rows: Tensor, heads: int, scale: float, window: int | None) -> Tensor:
        """:meth:`attend` for a decoder that lays its rows out as the cache likes it.

        ``rows`` ``[T, heads + 2 kv_heads, dim]``: queries, keys, values, with query head ``g * kv_heads + k`` reading
        KV head k. Returns ``[T, heads * dim]`` in that order of the heads.
        """
        layout = self._layout
        assert layout is not None, "attend before begin"
        self._both[layer].index_copy_(1, layout.slots, rows[:, heads:].transpose(0, 1))
        keys, values = self._keys[layer], self._values[layer]
        readings = self._readings_of(layout, window)
        kv_heads = keys.shape[0]
        queries = rows[:, :heads].unflatten(1, (-1, kv_heads))  # [T, group, kv_heads, dim]
        parts = []
        for reading in readings:
            q = queries[reading.row : reading.row + reading.rows]
            k, v = _view(keys, reading), _view(values, reading)
            if reading.rows == reading.sequences:
                q = q.transpose(1, 2)  # a sequence: [kv_heads, group, dim]
                out = functional.scaled_dot_product_attention(q, k, v, attn_mask=reading.mask, scale=scale)
                parts.append(out.transpose(1, 2).reshape(reading.rows, -1))
            else:
                group = queries.shape[1]
                q, k, v = q.permute(1, 2, 0, 3), k.expand(group, -1, -1, -1), v.expand(group, -1, -1, -1)
                out = functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=reading.mask, is_causal=reading.causal, scale=scale
                )
                parts.append(out.permute(2, 0, 1, 3).reshape(reading.rows, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _readings_of(self, layout: StepLayout, window: int | None) -> list[_Reading]:
        """Planned once a step for each window."""
        readings = self._readings.get(window)
        if readings is None:
            readings = self._readings[window] = self._plan_readings(layout, window)
        return readings

    def _plan_readings(self, layout: StepLayout, window: int | None) -> list[_Reading]:
        """Cut a step into SDPA calls; the same for all layers with this window."""
        starts, lengths = [], []
        for span in layout.decodes:
            if span.start is not None:
                seen = span.length if window is None else min(span.length, window)
                starts.append(span.start + span.length - seen)
                lengths.append(seen)
        readings = []
        for first, count, stride in group_decodes(starts, lengths, self._num_slots):
            group = lengths[first : first + count]
            mask = None if min(group) == max(group) else self._padding_mask(group)
            readings.append(_Reading(first, count, count, starts[first], stride, max(group), None, mask, False))
        rest = (*layout.decodes[len(starts) :], *layout.prefills)
        return readings + [self._read_one(span, window) for span in rest]

    def _read_one(self, span: Span, window: int | None) -> _Reading:
        position = span.length - span.count
        begin = 0 if window is None else max(0, position - window + 1)
        index = None
        if span.start is None:
            index = torch.tensor(slots_of(span, self._block_size, begin), device=self._device)
        length = span.length - begin
        mask, causal = None, False
        if span.count > 1:
            cut = window is not None and span.length > window
            if position == 0 and not cut:
                causal = True
            else:
                mask = self._causal_mask(span.count, length, window if cut else None)
        return _Reading(span.row, span.count, 1, (span.start or 0) + begin, 0, length, index, mask, causal)

    def _padding_mask(self, lengths: list[int]) -> Tensor:
        """Additive mask [n, 1, 1, longest]: 0 inside each sequence, -inf beyond."""
        ends = torch.tensor(lengths, device=self._device).view(-1, 1, 1, 1)
        hidden = torch.arange(max(lengths), device=self._device) >= ends
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))

    def _causal_mask(self, num_rows: int, length: int, window: int | None) -> Tensor:
        """Additive mask [rows, length] for the last ``num_rows`` of ``length`` positions."""
        rows = torch.arange(length - num_rows, length, device=self._device).unsqueeze(1)
        columns = torch.arange(length, device=self._device)
        hidden = columns > rows
        if window is not None:
            hidden |= columns <= rows - window
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))


def zeros_on_touch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken page by page when it is first written (on a CPU with Unix; else at once).

    Zeros, because padding is masked but NaN from uninitialised memory would survive a mask. ``torch.zeros`` would
    write, and so take, a whole cache of 3 GB that a few short requests never fill. Small pages, because a request
    touches a little memory for each layer and head: with huge ones it would take 2 MB each time.
    """
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _view(cache: Tensor, reading: _Reading) -> Tensor:
    """Keys or values of a reading, [sequences, kv_heads, length, dim]."""
    if reading.index is not None:
        return cache.index_select(1, reading.index).unsqueeze(0)
    heads, num_slots, dim = cache.shape
    size = (reading.sequences, heads, reading.length, dim)
    first = cache.storage_offset() + reading.first * dim
    return cache.as_strided(size, (reading.stride * dim, num_slots * dim, dim, 1), first)
