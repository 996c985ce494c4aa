"""LoRA adapters of one model: rows of different adapters, and of none, in one step.

What a linear gives for a row x of adapter i is W x + B_i A_i x, scaled (Hu et al., arXiv 2106.09685). W multiplies all
rows at once, whoever they belong to; then the rows of adapters are gathered by adapter, each group is multiplied with
its own two thin matrices (as Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, do it; here in plain torch), and
what comes out is put back. No row is padded, and a row without adapter is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """What one adapter adds to one linear: ``x @ a @ b``."""

    a: Tensor
    """[in, r]: LoRA's A, transposed."""
    b: Tensor
    """[r, out]: LoRA's B, transposed, times the adapter's scale."""


Table = Mapping[str, Factors]
"""What adapters, by name, add to one linear; those that leave it alone are not in it."""


class StepRows:
    """Which rows of the step that is computed now belong to which adapter."""

    __slots__ = ("_device", "first", "names", "num", "order", "sizes")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin(())

    def begin(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """``spans``: adapter ("" for none), first row and number of rows of each chunk of the step."""
        by_name: dict[str, list[int]] = {}
        for name, row, count in spans:
            if name:
                by_name.setdefault(name, []).extend(range(row, row + count))
        rows = [row for one in by_name.values() for row in one]
        self.names = tuple(by_name)
        """Adapters in the step; with none, nobody asks for the rest."""
        self.sizes = [len(one) for one in by_name.values()]
        self.num = len(rows)
        self.first = rows[0] if rows else 0
        follow = rows == list(range(self.first, self.first + self.num))
        self.order = None if follow else torch.tensor(rows, dtype=torch.int64, device=self._device)
        """Rows by adapter; None where they follow each other from ``first`` on."""


class Lora:
    """What adapters add to one product."""

    __slots__ = ("_table", "step")

    def __init__(self, table: Table, step: StepRows) -> None:
        self._table = table
        self.step = step

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` [.., T, out], the product of ``x`` [.., T, in], with what adapters add to it; in place. For steps with
        adapters only."""
        step, order, table = self.step, self.step.order, self._table
        if table.keys().isdisjoint(step.names):
            return y
        # A view takes as long as a product of few rows: none is made that does nothing.
        rows, sums = (t if t.dim() == 2 else t.view(-1, t.shape[-1]) for t in (x, y))
        if order is not None:
            mine, added = rows.index_select(0, order), sums.new_zeros(step.num, sums.shape[1])
        elif step.num < rows.shape[0]:
            mine, added = rows.narrow(0, step.first, step.num), sums.narrow(0, step.first, step.num)
        else:
            mine, added = rows, sums
        if len(step.names) == 1:
            parts: Iterable[tuple[Tensor, Tensor]] = ((mine, added),)
        else:
            parts = zip(mine.split(step.sizes), added.split(step.sizes), strict=True)
        for name, (inputs, outputs) in zip(step.names, parts, strict=True):
            factors = table.get(name)
            if factors is not None:
                outputs.addmm_(inputs @ factors.a, factors.b)
        if order is not None:
            sums.index_add_(0, order, added)  # on a CPU in half the time of index_copy_
        return y


class Adapters:
    """The adapters of one model."""

    def __init__(self, factors: Mapping[str, Mapping[str, Factors]], device: torch.device) -> None:
        """``factors``: by adapter, then by the path of the linear in the model."""
        self.names = frozenset(factors)
        self.step = StepRows(device)
        self._tables: dict[str, dict[str, Factors]] = {}
        for name, linears in factors.items():
            for path, one in linears.items():
                self._tables.setdefault(path, {})[name] = one

    def take(self, path: str) -> Table:
        """What they add to the linear at this path of the model. Whoever asks sees to it: it is asked once."""
        return self._tables.pop(path, {})

    def lora(self, table: Table) -> Lora | None:
        return Lora(table, self.step) if table else None

    def attach(self, model: Any) -> None:
        """Let the linears of a model, or what stands in their place, add what is not yet taken."""
        for path in list(self._tables):
            _adapt(model.get_submodule(path), Lora(self.take(path), self.step))


def arranged(
    table: Table, *, scale: Tensor | float = 1.0, columns: Tensor | None = None, rows: Tensor | None = None
) -> Table:
    """The same for the weight [out, in] rearranged as ``weight[rows][:, columns] * scale``; ``scale`` [in]."""
    arranged = {}
    for name, (a, b) in table.items():
        a = a if columns is None else a[columns]
        a = a * scale.unsqueeze(1) if isinstance(scale, Tensor) else a * scale
        arranged[name] = Factors(a.contiguous(), b if rows is None else b[:, rows].contiguous())
    return arranged


def joined(tables: Sequence[Table], sizes: Sequence[int]) -> Table:
    """The same for one product in place of several over the same input, whose outputs, of these sizes, follow each
    other."""
    joined = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        known = next(table[name] for table in tables if name in table)
        parts = [
            table.get(name) or Factors(known.a[:, :0], known.b.new_empty(0, size))
            for table, size in zip(tables, sizes, strict=True)
        ]
        joined[name] = Factors(torch.cat([one.a for one in parts], 1), torch.block_diag(*(one.b for one in parts)))
    return joined


def _adapt(linear: nn.Module, lora: Lora) -> None:
    # Not by a hook or a module around it: each costs a step without adapters a microsecond for each linear.
    plain, step = linear.forward, lora.step

    def forward(x: Tensor) -> Tensor:
        y: Tensor = plain(x)
        return lora.add(y, x) if step.names else y

    linear.forward = forward
