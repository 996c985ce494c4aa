"""Attention over our KV cache, registered with transformers: its model code runs unchanged and calls us.

One step is one ragged batch, flattened to ``[1, T]``: decodes first, then prompt chunks. Every attention module of a
model is given the engine's :class:`KVAttention`; the function below, registered under :data:`NAME`, finds it there. No
mask function is registered for the name, so transformers builds no mask at all (``masking_utils``, 5.23).

What a model passes beyond queries, keys, values, scale and sliding window (soft caps, attention sinks, biases) is
refused when the model is loaded, see ``model_check.py``: output is never silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "fairserve"

_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_idx",
    }
)
"""Arguments that models pass along to attention and that change nothing in what it computes."""


class UnsupportedAttention(Exception):
    """The model asks attention for something that we do not compute."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row, row + count) of a step: tokens at positions [length - count, length) of one sequence."""

    row: int
    count: int
    length: int
    """Tokens of the sequence in the cache after this step."""
    start: int | None
    """First KV slot when the slots follow each other, else None."""
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the rows of one step come from and where their keys and values go."""

    decodes: tuple[Span, ...]
    """Row i is decodes[i], in the order of their slots; scattered sequences last."""
    prefills: tuple[Span, ...]
    slots: Tensor
    """int64 [T]: the KV slot of each row."""


class LayerCaches:
    """Keys and values of every layer, and the step that they are read for: what all attentions have in common."""

    slot_dim: ClassVar[int]
    """The dimension of a cache tensor that counts KV slots."""

    def __init__(self, num_slots: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_slots = num_slots
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._layout: StepLayout | None = None

    def copy(self, runs: Sequence[tuple[int, int, int]]) -> None:
        dim = self.slot_dim
        sources = {slot for source, _, length in runs for slot in range(source, source + length)}
        is_apart = all(sources.isdisjoint(range(slot, slot + length)) for _, slot, length in runs)
        for tensor in (*self._keys.values(), *self._values.values()):
            read = [tensor.narrow(dim, source, length) for source, _, length in runs]
            if not is_apart:
                read = [rows.clone() for rows in read]
            for (_, slot, length), rows in zip(runs, read, strict=True):
                tensor.narrow(dim, slot, length).copy_(rows)

    def scrub(self, slots: Tensor) -> None:
        for tensor in (*self._keys.values(), *self._values.values()):
            tensor.index_fill_(self.slot_dim, slots, 0)


class KVAttention(Protocol):
    """A KV cache together with the attention that reads it."""

    block_size_multiple: ClassVar[int]
    shares_blocks: ClassVar[bool]
    """Two sequences may read the same block: it reads through block tables. Else it wants a sequence's slots to follow
    each other, and what is shared is copied."""

    def __init__(self, num_slots: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None: ...

    def begin(self, layout: StepLayout) -> None:
        """All attention calls until the next one belong to this step."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store keys and values, return attention output.

        Shapes: query ``[1, heads, T, dim]``, key and value ``[1, kv_heads, T, dim]``, result ``[1, T, heads, dim]``.
        ``window``: a token sees at most this many tokens, itself included; None for all.
        """
        ...

    def allocate(self, layer: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        """Make the cache of one layer, zeroed."""
        ...

    def copy(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Copy (first source slot, first destination slot, number) in all layers, as if all were read before any is
        written."""
        ...

    def scrub(self, slots: Tensor) -> None:
        """Zero these slots: what a failed request left there may be NaN, which masks do not hide."""
        ...


class Observer(Protocol):
    """Sees every attention call while a model is checked."""

    def saw(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, window: int | None) -> None: ...


class Attachment:
    """What an attention module carries: the cache, and while the model is checked an observer."""

    def __init__(self, cache: KVAttention) -> None:
        self.cache = cache
        self.observer: Observer | None = None


def attach(model: nn.Module, attachment: Attachment) -> None:
    """Give the engine's cache to every module that has a layer number."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.fairserve = attachment


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attachment = getattr(module, "fairserve", None)
    if attachment is None:
        raise UnsupportedAttention(f"{type(module).__name__} computes attention but has no layer_idx")
    if attachment.observer is not None:
        strange = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
        if strange:
            raise UnsupportedAttention(f"attention with {', '.join(strange)}")
        if attention_mask is not None:
            raise UnsupportedAttention("attention with its own mask or position bias")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedAttention("attention that is not causal")
        attachment.observer.saw(module, module.layer_idx, key, value, sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attachment.cache.attend(module.layer_idx, query, key, value, scale, sliding_window), None


AttentionInterface.register(NAME, _attention)


def slots_of(span: Span, block_size: int, begin: int = 0) -> Sequence[int]:
    """KV slots of positions [begin, length) of a sequence."""
    if span.start is not None:
        return range(span.start + begin, span.start + span.length)
    table = span.block_table
    return [table[p // block_size] * block_size + p % block_size for p in range(begin, span.length)]
