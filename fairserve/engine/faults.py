"""A step that fails: whose fault is it?

A step may be run again: a chunk writes the same KV slots, and the sampler draws the same chance until a token is taken.
So a step that raises is first asked of a prompt of our own. If even that fails, nothing here works any more. Otherwise
halves of the step are run, and halves of the halves that fail, down to the requests that fail alone: at most
2 n - 2 runs for n requests, about 2 log2(n) for one culprit. Logits that are not finite name their request, but what
it left in the KV cache can reach the padding of others in the same step: each such request is run once more alone.
Running out of memory is nobody's fault; the caller makes the step smaller.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fairserve.engine.batching import StepPlan
from fairserve.engine.sampling import Sampled, Sampler

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's output is not finite (NaN or infinity)"
_MEMORY_WORDS = ("out of memory", "allocate memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says it where it raises a plain RuntimeError: its CPU allocator, cuBLAS."""


class EngineBroken(Exception):
    """The model fails whatever it is asked: only a new process can help."""


class StepRunner(Protocol):
    """What the engine asks of a :class:`~fairserve.engine.runner.Runner`."""

    @property
    def sampler(self) -> Sampler: ...

    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        """See :meth:`fairserve.engine.runner.Runner.run`."""
        ...

    def is_sound(self) -> bool:
        """Does the model still compute a prompt of our own?"""
        ...

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), as if all were read before any is written."""
        ...

    def scrub(self, blocks: Sequence[int]) -> None:
        """Clear the KV blocks of a request that failed."""
        ...

    def release_memory(self) -> None:
        """Give back what is cached and not used."""
        ...

    def stop(self) -> None:
        """Nothing will be run any more."""
        ...


@dataclass(slots=True)
class StepResult:
    """What became of a step."""

    rows: dict[str, Sampled | None] = field(default_factory=dict)
    """By request: its token, None where its chunk does not sample yet."""
    failed: dict[str, str] = field(default_factory=dict)
    """By request that failed alone: why."""
    out_of_memory: str | None = None
    """Nothing was computed, and this is what the allocator said."""


def is_out_of_memory(error: BaseException) -> bool:
    """On whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def run_step(runner: StepRunner, plan: StepPlan) -> StepResult:
    """Run a step, and where it fails find out for whom.

    Raises:
        EngineBroken: it fails for everybody.
    """
    result = StepResult()
    try:
        result.rows = runner.run(plan)
    except Exception as error:
        why = _named(error)
        if is_out_of_memory(error):
            result.out_of_memory = why
            return result
        logger.exception("a step of %d requests failed", len(plan))
        if not runner.is_sound():
            raise EngineBroken(f"the model computes nothing any more: {why}") from error
        _find_culprits(runner, plan, result)
    _look_again(runner, plan, result)
    return result


def _find_culprits(runner: StepRunner, plan: StepPlan, result: StepResult) -> None:
    parts = deque(_halves(plan))
    while parts:
        part = parts.popleft()
        why = _run_part(runner, part, result)
        if why is None:
            continue
        if len(part) > 1:
            parts.extend(_halves(part))
        else:
            result.failed |= {chunk.request_id: why for chunk in part}


def _look_again(runner: StepRunner, plan: StepPlan, result: StepResult) -> None:
    """Run alone whatever has no finite logits."""
    chunks = list(plan)
    suspects = [i for i, c in enumerate(chunks) if c.request_id not in result.rows | result.failed]
    if suspects and not result.rows and not runner.is_sound():
        raise EngineBroken("the model gives NaN or infinity whatever it is asked")
    for i in suspects:
        why = _run_part(runner, plan.part(i, i + 1), result) if len(chunks) > 1 else None
        if chunks[i].request_id not in result.rows:
            result.failed[chunks[i].request_id] = why or NOT_FINITE


def _run_part(runner: StepRunner, part: StepPlan, result: StepResult) -> str | None:
    """Why it failed, None when it did not."""
    try:
        result.rows |= runner.run(part)
    except Exception as error:
        return _named(error)
    return None


def _halves(plan: StepPlan) -> list[StepPlan]:
    """A lone request is its own half: it gets a second chance."""
    num, middle = len(plan), len(plan) // 2
    return [plan.part(0, middle), plan.part(middle, num)] if middle else [plan]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
