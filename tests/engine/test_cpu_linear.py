"""Packed linears compute what plain ones do, and the plain ones are gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fairserve.engine import cpu_linear
from fairserve.engine.cpu_linear import FusedPart, PackedLinear, pack
from tests.engine.support import tiny


class Block(nn.Module):
    """Query, key and value as transformers' models apply them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 16, bias=bias)
        self.k_proj = nn.Linear(12, 8, bias=bias)
        self.v_proj = nn.Linear(12, 8, bias=False)
        self.o_proj = nn.Linear(16, 12, bias=bias)
        self.conv = Conv1D(6, 12)

    def forward(self, x: torch.Tensor, order: str = "qkv") -> list[torch.Tensor]:
        parts = {name: getattr(self, f"{name}_proj")(x) for name in order}
        return [parts["q"], parts["k"], parts["v"], self.o_proj(parts["q"]), self.conv(x)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv"])
@torch.inference_mode()
def test_packed_and_fused_products_equal_plain_ones(bias, order):
    torch.manual_seed(0)
    block = Block(bias).eval()
    packed = copy.deepcopy(block)
    assert pack(packed) == 5
    assert isinstance(packed.q_proj, FusedPart)
    assert isinstance(packed.o_proj, PackedLinear)
    for rows in (1, 7, 64):
        x = torch.randn(1, rows, 12)
        for plain, got in zip(block(x), packed(x, order), strict=True):
            assert torch.allclose(plain, got, atol=1e-5)


@torch.inference_mode()
def test_a_fused_part_may_be_asked_twice_or_alone():
    block = Block(bias=True).eval()
    x, other = torch.randn(1, 3, 12), torch.randn(1, 3, 12)
    expected, expected_other = block.k_proj(x), block.k_proj(other)
    expected_query = block.q_proj(x)
    pack(block)
    assert torch.allclose(block.q_proj(x), expected_query, atol=1e-5)
    assert torch.allclose(block.k_proj(other), expected_other, atol=1e-5)
    assert torch.allclose(block.k_proj(x), expected, atol=1e-5)
    assert torch.allclose(block.k_proj(x), expected, atol=1e-5)
    assert torch.allclose(block.k_proj(other), expected_other, atol=1e-5)


@torch.inference_mode()
def test_no_rows_are_no_trouble():
    block = Block(bias=True).eval()
    pack(block)
    assert block.o_proj(torch.randn(1, 0, 16)).shape == (1, 0, 12)


def test_plain_weights_are_freed_but_not_those_the_embedding_shares():
    model = tiny("llama", tie_word_embeddings=True)
    before = sum(p.numel() for p in model.parameters())
    linear = model.model.layers[0].mlp.down_proj
    pack(model)
    assert linear.weight.numel() == 0
    assert model.get_input_embeddings().weight.numel() == 101 * 32
    assert sum(p.numel() for p in model.parameters()) < 0.5 * before
    assert isinstance(model.lm_head, PackedLinear)


def test_packing_is_said_to_be_impossible_where_it_is_wrong(monkeypatch):
    assert cpu_linear.can_pack()
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features))
    assert not cpu_linear.can_pack()
