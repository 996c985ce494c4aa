"""The decoder of few operations takes the place of known models only, and computes what they do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fairserve.engine.fused_decoder import FusedDecoder, can_fuse
from fairserve.engine.int8_linear import Int8Linear
from fairserve.errors import ModelError
from tests.engine.support import drive, prepare, prompt_of, reference, request, tiny

PROMPTS = {f"r{i}": prompt_of(length, i) for i, length in enumerate((1, 17, 40, 64))}


@pytest.mark.parametrize(("kind", "fuses"), [("llama", True), ("qwen3", True), ("mistral", True), ("gpt2", False)])
def test_auto_fuses_the_models_that_it_knows(kind, fuses):
    assert isinstance(prepare(tiny(kind), "auto").model, FusedDecoder) == fuses


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"dtype": torch.bfloat16}, {"adapted": True}])
def test_what_differs_from_a_known_model_is_not_fused(changes):
    model = tiny("llama", **{k: v for k, v in changes.items() if k == "hidden_act"})
    if "dtype" in changes:
        model = model.to(changes["dtype"])
    if "adapted" in changes:
        model.model.layers[1].mlp.up_proj = type("Adapted", (nn.Linear,), {})(32, 48, bias=False)
    assert can_fuse(tiny("llama"))
    assert not can_fuse(model)


def test_asking_for_it_where_it_cannot_be_says_why():
    with pytest.raises(ModelError, match="'fused' knows no GPT2LMHeadModel"):
        prepare(tiny("gpt2"), "fused")


@pytest.mark.parametrize("changes", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_norms_biases_and_tied_weights_are_folded_right(changes):
    model = tiny("llama", **changes)
    for name, parameter in model.named_parameters():  # at 1 and 0, as they are made, they would hide a mistake
        if "norm" in name or "bias" in name:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    wanted = {name: reference(model, prompt, 12) for name, prompt in PROMPTS.items()}
    assert served(model, "fused") == wanted


def test_the_models_own_weights_are_freed_but_for_the_embedding():
    model = tiny("llama", tie_word_embeddings=True)
    loaded = prepare(model, "fused")
    assert sum(p.numel() for p in model.model.layers.parameters()) == 0
    assert loaded.model.get_input_embeddings().weight.numel() == 101 * 32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_int8_gives_the_tokens_of_the_same_model_with_rounded_products(kind):
    model = tiny(kind)
    rounded = copy.deepcopy(model)
    for parent in list(rounded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Rounded(child))
    wanted = {name: reference(rounded, prompt, 12) for name, prompt in PROMPTS.items()}
    assert wanted != {name: reference(model, prompt, 12) for name, prompt in PROMPTS.items()}, "rounding shows"
    assert served(model, "int8") == wanted


def test_a_row_is_rounded_by_its_own_scale_alone():
    linear = Int8Linear(torch.randn(8, 12), None)
    small, huge = torch.randn(1, 12), 1e6 * torch.randn(1, 12)
    assert torch.equal(linear(torch.cat([small, huge]))[:1], linear(small))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_hides_no_number_that_is_not_finite(bad):
    linear = Int8Linear(torch.randn(8, 12), torch.zeros(8))
    x = torch.randn(2, 12)
    x[1, 3] = bad
    y = linear(x)
    assert torch.isfinite(y[0]).all()
    assert not torch.isfinite(y[1]).any()


def test_a_row_of_zeros_is_zero_in_int8():
    assert torch.equal(Int8Linear(torch.randn(8, 12), None)(torch.zeros(1, 12)), torch.zeros(1, 8))


class Rounded(nn.Module):
    """A linear in float64 whose weight and input are rounded to 127 steps each side, row by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.double()), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (rounded(x.double()) @ self.weight.T).float()
        return y if self.bias is None else y + self.bias


def rounded(rows: torch.Tensor) -> torch.Tensor:
    step = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (rows / step).round() * step


def served(model: Any, cpu_linear: str) -> dict[str, list[int]]:
    driver = drive(prepare(model, cpu_linear), max_num_batched_tokens=24)
    driver.add(*(request(name, prompt, max_tokens=12) for name, prompt in PROMPTS.items()))
    driver.run()
    return {name: driver.tokens(name) for name in PROMPTS}
