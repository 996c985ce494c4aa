"""Totals that grow in place: one object per account, not one per token."""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.dispatch.messages import Totals


@dataclass(slots=True)
class Sum:
    """Fields as in ``Totals``."""

    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    service: float = 0.0

    def add(self, more: Totals | Sum) -> None:
        self.num_input += more.num_input
        self.num_cached += more.num_cached
        self.num_output += more.num_output
        self.service += more.service

    def totals(self) -> Totals:
        return Totals(self.num_input, self.num_cached, self.num_output, self.service)
