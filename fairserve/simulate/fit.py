"""From measured steps to the coefficients of :class:`~fairserve.simulate.step_time.StepTime`.

The errors that count are relative, |predicted - measured| / measured, so that a decode of 5 ms weighs as much as a
prefill of 500; and their sum is minimised, not the sum of their squares, so that a step during which the machine did
something else does not bend the fit. No coefficient may be negative: more work never takes less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fairserve.errors import ConfigError
from fairserve.simulate.step_time import Origin, StepTime

Array = npt.NDArray[np.float64]

HELD_OUT_EVERY = 5
"""Of the groups of samples, in order: the fifth, tenth and so on are kept for the test (an odd number,
because a profile takes turns between groups of prompts and of decodes)."""
MIN_SAMPLES = 8
MAX_ERROR = 0.15
"""Mean relative error from which a fit is doubtful; on a quiet machine it is 0.03 to 0.06."""
_ROUNDS = 50
_FLOOR = 1e-3
"""Relative error below which a sample is as good as exact."""
_UNITS = {
    "base_s": ("every step", 1e3, "ms"),
    "per_decode_s": ("each decode", 1e3, "ms"),
    "per_context_token_s": ("each token attended by a decode", 1e6, "us"),
    "prefill_base_s": ("a step with prompt tokens", 1e3, "ms"),
    "per_prefill_token_s": ("each prompt token", 1e3, "ms"),
    "per_prefill_context_s": ("each pair of prompt token and context", 1e6, "us"),
}


class Sample(Protocol):
    """One measured step; the counts are those of :meth:`StepTime.seconds`."""

    @property
    def group(self) -> int:
        """Steps of one group are alike: all of them are fitted to, or all are held out."""
        ...

    @property
    def num_decodes(self) -> int: ...
    @property
    def decode_context_tokens(self) -> int: ...
    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def prefill_context_tokens(self) -> int: ...
    @property
    def step_s(self) -> float: ...


AnySample = TypeVar("AnySample", bound=Sample)


def fit(samples: Sequence[Sample], origin: Origin | None = None) -> StepTime:
    """Coefficients from four fifths of the groups of ``samples``, errors from the rest, both in one StepTime.

    With fewer than five groups the errors are those of the samples that were fitted to.

    Raises:
        ConfigError: too few samples, a step that took no time, no decode, or no prompt.
    """
    _check(samples)
    fitted, held_out = split(samples)
    base, per_decode, per_context, prefill_base, per_prefill, per_pair = _coefficients(fitted)
    step_time = StepTime(base, per_decode, per_context, prefill_base, per_prefill, per_pair)
    mean, worst = errors(step_time, held_out or fitted)
    about: dict[str, Any] = (origin or Origin(kind="measured")).model_dump()
    about |= {"num_samples": len(fitted), "num_held_out": len(held_out), "mean_error": mean, "worst_error": worst}
    about["largest"] = {
        name: max(getattr(sample, name) for sample in samples)
        for name in ("num_decodes", "decode_context_tokens", "num_prefill_tokens", "prefill_context_tokens")
    }
    return replace(step_time, origin=Origin(**about))


def split(samples: Sequence[AnySample]) -> tuple[list[AnySample], list[AnySample]]:
    """(to fit to, to test with), by whole groups."""
    groups = sorted({sample.group for sample in samples})
    kept = set(groups[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    return [s for s in samples if s.group not in kept], [s for s in samples if s.group in kept]


def errors(step_time: StepTime, samples: Sequence[Sample]) -> tuple[float, float]:
    """Mean and worst relative error, as fractions of the measured time."""
    off = np.abs(_rows(samples) @ np.array(list(step_time.coefficients.values())) - 1.0)
    return float(off.mean()), float(off.max())


def is_doubtful(step_time: StepTime) -> bool:
    """The steps that were held out lasted so much longer or shorter that the machine must have been busy."""
    error = None if step_time.origin is None else step_time.origin.mean_error
    return error is not None and error > MAX_ERROR


def table(step_time: StepTime) -> str:
    """The coefficients in readable units, and how well they foretell."""
    lines = [f"{'what costs':<38}{'time':>10}"]
    for name, value in step_time.coefficients.items():
        text, scale, unit = _UNITS[name]
        lines.append(f"{text:<38}{value * scale:>10.4g} {unit}")
    origin = step_time.origin
    if origin is not None and origin.mean_error is not None and origin.worst_error is not None:
        which = f"{origin.num_held_out} further steps" if origin.num_held_out else "the same steps"
        lines.append(
            f"fitted to {origin.num_samples} steps; on {which} off by {origin.mean_error:.1%} on average, "
            f"{origin.worst_error:.0%} at worst"
        )
    return "\n".join(lines)


def _check(samples: Sequence[Sample]) -> None:
    if len(samples) < MIN_SAMPLES:
        raise ConfigError(f"{len(samples)} measured steps are too few to fit a step time: at least {MIN_SAMPLES}")
    if any(sample.step_s <= 0 for sample in samples):
        raise ConfigError("a measured step took no time: the clock is too coarse or stands still")
    if not any(sample.num_decodes for sample in samples):
        raise ConfigError("no measured step computed a decode")
    if not any(sample.num_prefill_tokens for sample in samples):
        raise ConfigError("no measured step computed prompt tokens")


def _rows(samples: Sequence[Sample]) -> Array:
    """[samples, coefficients], each row over the measured seconds: times the coefficients it should give 1."""
    rows = [
        (
            1,
            sample.num_decodes,
            sample.decode_context_tokens,
            sample.num_prefill_tokens > 0,
            sample.num_prefill_tokens,
            sample.prefill_context_tokens,
        )
        for sample in samples
    ]
    measured = np.array([sample.step_s for sample in samples])
    made: Array = np.array(rows, dtype=np.float64) / measured[:, None]
    return made


def _coefficients(samples: Sequence[Sample]) -> list[float]:
    """Least absolute relative error, by least squares whose weights are the inverse of the last round's errors."""
    rows = _rows(samples)
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    rows = rows / scale
    weights = np.ones(len(rows))
    best, best_loss = np.zeros(rows.shape[1]), float("inf")
    for _ in range(_ROUNDS):
        solution = non_negative(rows * weights[:, None], weights)
        off = np.abs(rows @ solution - 1.0)
        if off.sum() < best_loss:
            best, best_loss = solution, float(off.sum())
        weights = np.maximum(off, _FLOOR) ** -0.5
    return [float(value) for value in best / scale]


def non_negative(rows: Array, wanted: Array) -> Array:
    """x >= 0 that minimises |rows x - wanted|^2; for a handful of columns, because every support is tried.

    The minimum is the plain least squares solution on the columns where it is above 0 (Lawson and Hanson, 1974).
    """
    gram, goal = rows.T @ rows, rows.T @ wanted
    num = len(goal)
    best, best_loss = np.zeros(num), 0.0
    for size in range(1, num + 1):
        for columns in itertools.combinations(range(num), size):
            at = list(columns)
            part = np.linalg.lstsq(gram[np.ix_(at, at)], goal[at], rcond=None)[0]
            loss = float(part @ gram[np.ix_(at, at)] @ part - 2 * part @ goal[at])
            if part.min() >= 0 and loss < best_loss:
                best, best_loss = np.zeros(num), loss
                best[at] = part
    return best
