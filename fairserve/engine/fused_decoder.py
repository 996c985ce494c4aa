"""Llama-like decoders on a CPU in few operations: as transformers writes a layer, it is some 50 operations of 2 us and
more beside the matrix products; here it is 12.

The arithmetic is the model's own; weights are rearranged when it is built, so that work disappears:

- RMSNorm's weight and its sqrt(n) are multiplied into the weights of the products that follow; what is left of it is
  x / hypot(|x|, sqrt(n eps)).
- The rows of q and k are reordered so that the two numbers that rotary positions turn lie side by side: turning is one
  complex multiplication, in place, for q and k together. Keys lie in the cache in that order; scores do not see it.
- Query heads that share a KV head lie ``kv_heads`` apart instead of side by side, and o's columns alike: what attention
  returns for decodes needs no copy.
- SiLU, the gate and both residual sums are done by oneDNN inside the products (in float32).

LoRA adapters are rearranged alike. In steps with adapters, SiLU and the gate come after the products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from fairserve.engine.attention import Attachment
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.cpu_linear import PackedGate, PackedLinear, release
from fairserve.engine.int8_linear import Int8Gate, Int8Linear
from fairserve.engine.lora import Adapters, Lora, arranged, joined

_KNOWN = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


class Products(NamedTuple):
    """How matrix products are computed."""

    linear: type[PackedLinear] | type[Int8Linear]
    gate: type[PackedGate] | type[Int8Gate]
    folds: bool
    """Norms' weights go into the products."""


FLOAT32 = Products(PackedLinear, PackedGate, folds=True)
INT8 = Products(Int8Linear, Int8Gate, folds=False)
"""Not folded: norms' weights make the largest inputs smaller, which leaves more of the 8 bits for the others."""


class Output(NamedTuple):
    logits: Tensor
    """[1, rows, vocabulary]."""
    hidden: Tensor | None = None
    """[T, hidden size]: what the head is applied to."""


def can_fuse(model: nn.Module) -> bool:
    """Is this a decoder that :class:`FusedDecoder` computes? Adapted and quantised ones are not."""
    if type(model) not in _KNOWN:
        return False
    config: Any = model.config
    core: Any = model.model
    linears = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    return (
        config.hidden_act == "silu"
        and core.embed_tokens.weight.dtype == torch.float32
        and all(type(linear) is nn.Linear for linear in linears)
    )


class FusedDecoder(nn.Module):
    """Takes over the weights of ``model``, layer by layer: afterwards the model is empty."""

    def __init__(self, model: Any, kinds: Products, adapters: Adapters | None = None) -> None:
        """``adapters``: those of ``model``, taken over too."""
        super().__init__()
        core = model.model
        self._step = adapters.step if adapters is not None else None
        self.embedding = core.embed_tokens
        self._rotary = core.rotary_emb
        windows = isinstance(model, MistralForCausalLM) and getattr(model.config, "sliding_window", None)
        self.layers = nn.ModuleList()
        for i, layer in enumerate(core.layers):
            window = windows or getattr(layer.self_attn, "sliding_window", None)
            self.layers.append(_FusedLayer(layer, window, kinds, adapters, f"model.layers.{i}"))
            release(layer.modules(), kept=())
        self._norm, self._scale = _norm(core.norm, kinds)
        head = model.lm_head
        self.head = kinds.linear(head.weight * self._scale, head.bias)
        if head.weight is not self.embedding.weight:
            release([head], kept=())

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.embedding
        return module

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        use_cache: bool,
        gives_hidden: bool = False,
    ) -> Output:
        """``input_ids``, ``position_ids`` [1, T]; ``logits_to_keep`` [rows], the rows of T to give logits for."""
        x = self.embedding(input_ids[0])
        cos, sin = self._rotary(x, position_ids)
        half = cos.shape[-1] // 2
        turns = torch.complex(cos[0, :, :half], sin[0, :, :half]).unsqueeze(1)
        is_adapted = self._step is not None and bool(self._step.names)
        for layer in self.layers:
            x = layer(x, turns, is_adapted)
        if not gives_hidden:
            return Output(self.head(self._norm(x[logits_to_keep])).unsqueeze(0))
        x = self._norm(x)
        return Output(self.head(x[logits_to_keep]).unsqueeze(0), x * self._scale)


class _LayerLora(NamedTuple):
    """What adapters add to the products of one layer; None where no adapter does."""

    qkv: Lora | None = None
    o: Lora | None = None
    gate: Lora | None = None
    up: Lora | None = None
    down: Lora | None = None


_BARE = _LayerLora()


class _FusedLayer(nn.Module):
    fairserve: Attachment
    """Set by :func:`~fairserve.engine.attention.attach`."""

    def __init__(self, layer: Any, window: int | None, kinds: Products, adapters: Adapters | None, path: str) -> None:
        super().__init__()
        linear = kinds.linear
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx: int = attention.layer_idx
        self._window = window
        self._dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._heads = attention.q_proj.out_features // self._dim
        kv_heads = attention.k_proj.out_features // self._dim
        self._turned = self._heads + kv_heads
        group = self._heads // kv_heads
        # From [kv_heads, group] to [group, kv_heads], and from two halves to pairs.
        heads = torch.arange(self._heads).view(kv_heads, group).T.flatten()
        pairs = torch.arange(self._dim).view(2, -1).T.flatten()
        q_rows = (heads.unsqueeze(1) * self._dim + pairs).flatten()
        k_rows = (torch.arange(kv_heads).unsqueeze(1) * self._dim + pairs).flatten()
        o_columns = (heads.unsqueeze(1) * self._dim + torch.arange(self._dim)).flatten()
        q, k, v, o = (getattr(attention, f"{name}_proj") for name in "qkvo")
        self._norm, scale = _norm(layer.input_layernorm, kinds)
        weight = torch.cat([q.weight[q_rows], k.weight[k_rows], v.weight]) * scale
        bias = None
        if q.bias is not None:  # all three of these models' or none
            bias = torch.cat([q.bias[q_rows], k.bias[k_rows], v.bias])
        self._qkv = linear(weight, bias)
        self._o = linear(o.weight[:, o_columns], o.bias)
        self._head_norm: Tensor | None = None
        if hasattr(attention, "q_norm"):
            self._head_eps, q_scale = _parts(attention.q_norm)
            _, k_scale = _parts(attention.k_norm)
            self._head_norm = torch.cat(
                [q_scale[pairs].expand(self._heads, -1), k_scale[pairs].expand(kv_heads, -1)]
            ).contiguous()
        self._mlp_norm, mlp_scale = _norm(layer.post_attention_layernorm, kinds)
        gate, up = mlp.gate_proj, mlp.up_proj
        self._gated = kinds.gate(gate.weight * mlp_scale, gate.bias, up.weight * mlp_scale, up.bias)
        self._down = linear(mlp.down_proj.weight, mlp.down_proj.bias)
        self._lora = _BARE
        if adapters is not None:
            take, lora = adapters.take, adapters.lora
            parts = [
                arranged(take(f"{path}.self_attn.q_proj"), scale=scale, rows=q_rows),
                arranged(take(f"{path}.self_attn.k_proj"), scale=scale, rows=k_rows),
                arranged(take(f"{path}.self_attn.v_proj"), scale=scale),
            ]
            self._lora = _LayerLora(
                qkv=lora(joined(parts, [q.out_features, k.out_features, v.out_features])),
                o=lora(arranged(take(f"{path}.self_attn.o_proj"), columns=o_columns)),
                gate=lora(arranged(take(f"{path}.mlp.gate_proj"), scale=mlp_scale)),
                up=lora(arranged(take(f"{path}.mlp.up_proj"), scale=mlp_scale)),
                down=lora(take(f"{path}.mlp.down_proj")),
            )

    def forward(self, x: Tensor, turns: Tensor, is_adapted: bool) -> Tensor:
        """``x`` [T, hidden], ``turns`` complex [T, 1, dim / 2]; ``is_adapted``: rows of the step belong to adapters."""
        lora = self._lora if is_adapted else _BARE
        normed = self._norm(x)
        rows = _added(self._qkv(normed), lora.qkv, normed).view(x.shape[0], -1, self._dim)
        turned = rows[:, : self._turned]
        if self._head_norm is not None:
            turned.div_(_length(turned, self._head_eps)).mul_(self._head_norm)
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turns)
        attachment = self.fairserve
        cache = attachment.cache
        assert isinstance(cache, SdpaAttention), "a fused decoder runs on a CPU only"
        if attachment.observer is not None:
            key, value = (t.transpose(0, 1).unsqueeze(0) for t in rows[:, self._heads :].chunk(2, dim=1))
            attachment.observer.saw(self, self.layer_idx, key, value, self._window)
        seen = cache.attend_rows(self.layer_idx, rows, self._heads, self._scale, self._window)
        x = _added(self._o.plus(seen, x), lora.o, seen)
        normed = self._mlp_norm(x)
        if lora.gate is None and lora.up is None:
            gated = self._gated(normed)
        else:
            gate, up = self._gated.parts(normed)
            gated = functional.silu(_added(gate, lora.gate, normed)).mul_(_added(up, lora.up, normed))
        return _added(self._down.plus(gated, x), lora.down, gated)


def _added(y: Tensor, lora: Lora | None, x: Tensor) -> Tensor:
    """The product ``y`` of ``x``, with what adapters add to it."""
    return y if lora is None else lora.add(y, x)


class _Norm(nn.Module):
    """RMSNorm without its weight, or with it."""

    def __init__(self, eps: Tensor, weight: Tensor | None) -> None:
        super().__init__()
        self._eps, self._weight = eps, weight

    def forward(self, x: Tensor) -> Tensor:
        y = x / _length(x, self._eps)
        return y if self._weight is None else y.mul_(self._weight)


def _norm(norm: Any, kinds: Products) -> tuple[_Norm, Tensor | float]:
    """The norm, and what it leaves to the columns of the products that follow."""
    eps, weight = _parts(norm)
    return (_Norm(eps, None), weight) if kinds.folds else (_Norm(eps, weight), 1.0)


def _parts(norm: Any) -> tuple[Tensor, Tensor]:
    """sqrt(n eps), and the weight [n] times sqrt(n)."""
    size = norm.weight.shape[0]
    return torch.tensor((size * norm.variance_epsilon) ** 0.5), norm.weight * size**0.5


def _length(x: Tensor, eps: Tensor) -> Tensor:
    """sqrt(|x|^2 + eps^2) of the last dimension, kept."""
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), eps)
