"""Matrix products with weights of 8 bits on a CPU: a quarter of the bytes to read, and four times as many products for
each instruction where the processor has VNNI. Answers differ from float32's, see ``benchmarks/quality.py``.

Weights: one scale for each output. Inputs: one scale for each row, taken from the row itself, so that what a request
gets does not depend on who shares its batch (torch's own dynamic quantisation takes one scale for the whole batch).
Sums are exact, in 32-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127.0
_TINY = 1e-12
"""Stands for the largest number of a row that is all zeros."""


class Int8Linear(nn.Module):
    """``x @ weight.T + bias``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` [out, in], ``bias`` [out] or None; float32 on a CPU."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rounded, scale = quantised(weight.detach())
        self._weight = rounded.T
        self._scale = scale.squeeze(1)
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = quantised(x)
        y = torch._int_mm(rounded, self._weight).float().mul_(self._scale).mul_(scale)
        return y if self._bias is None else y.add_(self._bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product plus ``other``, of the same shape."""
        y: Tensor = self(x)
        return y.add_(other)


class Int8Gate(nn.Module):
    """``silu(x @ gate.T) * (x @ up.T)``."""

    def __init__(self, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> None:
        super().__init__()
        biases = [gate_bias, up_bias]
        known = [bias for bias in biases if bias is not None]
        assert len(known) != 1, "either both have a bias or none"
        self._both = Int8Linear(torch.cat([gate, up]), torch.cat(known) if known else None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.parts(x)
        return functional.silu(gate).mul_(up)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both products as they are."""
        gate, up = self._both(x).chunk(2, dim=-1)
        return gate, up


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows`` [R, n] as int8 [R, n] and a scale for each row [R, 1]: rows = int8 * scale, rounded. A row with NaN or
    infinity has no finite scale."""
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(_TINY).div_(LARGEST)
    return (rows / scale).round_().to(torch.int8), scale
