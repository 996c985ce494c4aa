"""Cost functions: tokens of one request to service, the unit in which clients are compared.

Source: VTC (arXiv 2401.00588) section 3.1 for weighted tokens, section 4.4 for a general h(n_in, n_out) and
appendix B for the profiled fit; Justitia (arXiv 2510.17015) for KV token-time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class CostFunction(Protocol):
    """h: the service that a request has received; monotone in every argument, and h of no tokens is small."""

    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        """Service of ``num_input`` prompt tokens (``num_cached`` of them from the prefix cache) and ``num_output``
        generated tokens."""
        ...


@dataclass(frozen=True, slots=True)
class WeightedTokens:
    """w_p * n_in + w_q * n_out; a cached input token counts ``cached_fraction`` of a computed one."""

    input_weight: float = 1.0
    output_weight: float = 2.0
    cached_fraction: float = 0.0

    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        computed = num_input - num_cached * (1.0 - self.cached_fraction)
        return self.input_weight * computed + self.output_weight * num_output


@dataclass(frozen=True, slots=True)
class ProfiledQuadratic:
    """a*x + b*y + c*x*y + d*y*y + e, x input and y output tokens; the defaults are VTC's fit in milliseconds (A10G,
    Llama-2-7B)."""

    a: float = 0.21001891
    b: float = 0.10075395
    c: float = 0.0039868
    d: float = 0.00324733
    e: float = 1.14601454
    cached_fraction: float = 0.0

    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        computed = num_input - num_cached * (1.0 - self.cached_fraction)
        x, y = num_input, num_output
        fixed = self.e if num_input + num_output > 0 else 0.0
        return self.a * computed + self.b * y + self.c * x * y + self.d * y * y + fixed


@dataclass(frozen=True, slots=True)
class KvTokenTime:
    """x*y + y*y/2: KV tokens held, summed over the steps of the answer. The prompt alone counts one step."""

    cached_fraction: float = 0.0

    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        computed = num_input - num_cached * (1.0 - self.cached_fraction)
        return computed + num_input * num_output + num_output * num_output / 2
