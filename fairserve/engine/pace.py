"""How long a step takes by the prompt tokens in it, learned while steps run: seconds = a + b * tokens."""

from __future__ import annotations

KEEP = 0.9
"""Weight of what was seen before against the newest step: some ten steps count."""
RIDGE = 64.0
"""tokens^2. Steps that differ by less than some 8 tokens say little about the slope: it stays what it was."""


class Pace:
    """A least-squares line through the latest steps, the newest counting most. ``a`` follows the decodes of the batch,
    which change slowly; ``b`` the contexts of its prompts."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._slope: float | None = None

    def saw(self, num_tokens: int, step_s: float) -> None:
        """A step with ``num_tokens`` prompt tokens (0: decodes only) took ``step_s``."""
        self._weight = KEEP * self._weight + 1
        self._x = KEEP * self._x + num_tokens
        self._y = KEEP * self._y + step_s
        self._xx = KEEP * self._xx + num_tokens * num_tokens
        self._xy = KEEP * self._xy + num_tokens * step_s
        x, y = self._x / self._weight, self._y / self._weight
        variance, covariance = self._xx / self._weight - x * x, self._xy / self._weight - x * y
        if self._slope is None:
            self._slope = y / x if x else None  # all of it: too much rather than too little
        else:
            self._slope = max(0.0, (covariance + RIDGE * self._slope) / (variance + RIDGE))

    def tokens_within(self, step_s: float) -> float:
        """Prompt tokens of a step that takes ``step_s``; may be negative, infinite where they cost nothing, and 0 as
        long as none was seen."""
        if self._slope is None:
            return 0.0
        base_s = (self._y - self._slope * self._x) / self._weight
        return (step_s - max(0.0, base_s)) / self._slope if self._slope else float("inf")
