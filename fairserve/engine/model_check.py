"""Before a model serves: does it compute the same through our attention as through its own?

A few tokens run through the model's own eager attention and, cut into chunks and decodes of two sequences, through
ours. What differs is refused: a model with recurrent state, positions in its mask, soft caps or sinks never gives
silently wrong output. What such a short run cannot show (windows, scaling beyond the trained length) is read from the
configuration and from the arguments of the attention calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairserve.engine.attention import NAME, Attachment, KVAttention, UnsupportedAttention, attach
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.batching import Chunk
from fairserve.engine.lora import Adapters
from fairserve.engine.runner import Runner
from fairserve.engine.sampling import Sampler
from fairserve.errors import ModelError

_BLOCK = 4
_NUM_BLOCKS = 16
_NUM_TOKENS = 24
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class _Witness:
    """Notes the shapes and windows of every attention layer."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}
        self._modules: dict[int, nn.Module] = {}
        self.cache: KVAttention | None = None

    def saw(self, module: nn.Module, layer: int, key: Tensor, value: Tensor, window: int | None) -> None:
        if self._modules.setdefault(layer, module) is not module:
            raise UnsupportedAttention(f"two attention modules in layer {layer}")
        if layer not in self.shapes:
            shape = self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
            self.windows[layer] = window
            assert self.cache is not None
            self.cache.allocate(layer, shape.kv_heads, shape.key_dim, shape.value_dim)


def check_model(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> dict[int, LayerShape]:
    """Switch ``model`` to our attention and prove it. Returns the KV shape of each layer.

    Raises:
        ModelError: the model cannot be served correctly.
    """
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if odd:
        raise ModelError(name, f"layers of type {', '.join(odd)} are not supported, only full and sliding attention")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = tuple(7919 * (i + 3) % vocabulary for i in range(_NUM_TOKENS))
    witness = _Witness()
    try:
        wanted = reference_logits(model, tokens, device)
        switch_attention(model, name)
        got = _served_logits(model, tokens, device, dtype, witness)
    except UnsupportedAttention as error:
        raise ModelError(name, f"its attention is not supported: {error}") from error
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(name, f"it does not run through the attention interface of transformers: {error}") from error
    if not witness.shapes:
        raise ModelError(name, "no layer calls attention through transformers' attention interface")
    require_equal(wanted, got, name, dtype, "it computes something else through our attention than through its own")
    _check_windows(config, witness, name)
    return witness.shapes


def require_equal(
    wanted: Tensor, got: Tensor, name: str, dtype: torch.dtype, complaint: str, tolerance: float | None = None
) -> None:
    """``tolerance``: of the largest logit; None: what rounding in ``dtype`` explains."""
    if tolerance is None:
        tolerance = 2e-3 if dtype == torch.float32 else 0.1
    difference = (wanted - got).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    if not difference <= tolerance:
        raise ModelError(name, f"{complaint} (logits differ by {difference:.2g} of the largest)")


@torch.inference_mode()
def reference_logits(model: Any, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """Logits [rows, vocabulary] of the rows that :func:`_served_logits` returns, through the model's own attention."""
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()
    return logits[_rows()]


def switch_attention(model: Any, name: str) -> None:
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise ModelError(name, f"{type(model).__name__} does not use transformers' attention interface")


def _rows() -> list[int]:
    half, rest = _NUM_TOKENS // 2 - 1, _NUM_TOKENS - 4
    return [half, rest, half, *range(_NUM_TOKENS - 3, _NUM_TOKENS), rest]


def _served_logits(
    model: Any,
    tokens: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    witness: _Witness,
    attention: type[KVAttention] = SdpaAttention,
    adapters: Adapters | None = None,
    adapter: str = "",
) -> Tensor:
    """Sequence a in two chunks and three decodes; sequence b, with scattered blocks, in two chunks beside it."""
    block_size = -(-_BLOCK // attention.block_size_multiple) * attention.block_size_multiple
    cache = attention(_NUM_BLOCKS * block_size, block_size, dtype, device)
    witness.cache = cache
    attachment = Attachment(cache)
    attachment.observer = witness
    attach(model, attachment)
    runner = Runner(model, cache, block_size, device, Sampler(), _NUM_BLOCKS - 1, adapters)
    half, rest = _NUM_TOKENS // 2, _NUM_TOKENS - 3
    blocks_a, blocks_b = tuple(range(6)), (15, 7, 13, 9, 11, 8)

    def chunk(request_id: str, begin: int, end: int, samples: bool) -> Chunk:
        a = request_id == "a"
        blocks, start = (blocks_a, 0) if a else (blocks_b, None)
        return Chunk(request_id, begin, tokens[begin:end], samples, blocks, start, adapter)

    steps: list[tuple[list[Chunk], int]] = [
        ([chunk("a", 0, half, False)], 0),
        ([chunk("a", half, rest, True), chunk("b", 0, half, False)], 0),
        ([chunk("a", rest, rest + 1, True)], 1),
        ([chunk("a", rest + 1, rest + 2, True)], 1),
        ([chunk("a", rest + 2, rest + 3, True), chunk("b", half, rest, True)], 1),
    ]
    return torch.cat([runner.forward(chunks, num_decodes).logits for chunks, num_decodes in steps]).float()


def serve_again(
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    attention: type[KVAttention] = SdpaAttention,
    adapters: Adapters | None = None,
    adapter: str = "",
) -> Tensor:
    """The same run once more: with linears that were replaced, through another attention, or under an adapter."""
    tokens = tuple(7919 * (i + 3) % model.get_input_embeddings().weight.shape[0] for i in range(_NUM_TOKENS))
    try:
        return _served_logits(model, tokens, device, dtype, _Witness(), attention, adapters, adapter)
    finally:
        if adapters is not None:
            adapters.step.begin(())


def _check_windows(config: Any, witness: _Witness, name: str) -> None:
    """A window that the configuration announces must reach our attention as an argument."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return
    layer_types = getattr(config, "layer_types", None)
    sliding: Callable[[int], bool] = (
        (lambda layer: layer_types[layer] == "sliding_attention") if layer_types else (lambda _: True)
    )
    for layer, seen in witness.windows.items():
        if sliding(layer) and seen != window:
            raise ModelError(name, f"layer {layer} has a window of {window} tokens that its attention does not pass on")
