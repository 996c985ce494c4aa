"""From what the drivers saw to figures: one run of one engine, then all rounds together, then its tokens beside
``model.generate``'s."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

TINY_GAP = 1e-3
"""Two logits nearer than this may change places with the order of a sum: float32 leaves about 1e-5 of a logit of 20
after 30 layers, and engines add up differently."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. Milliseconds; TTFT from the moment that the request was handed to the engine."""

    output_tokens_per_s: float
    """From the first request sent to the last token made."""
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    """Between a token of a request and its next."""
    inter_token_p99: float


NAMES = tuple(Figures.__dataclass_fields__)


def figures_of(requests: Sequence[Mapping[str, Any]]) -> Figures:
    """``requests``: see ``driver.py``."""
    ttft = [request["token_s"][0] - request["sent_s"][0] for request in requests]
    gaps = [after - before for request in requests for before, after in pairwise(request["token_s"])]
    began = min(request["sent_s"][0] for request in requests)
    ended = max(request["token_s"][-1] for request in requests)
    return Figures(
        sum(len(request["tokens"]) for request in requests) / (ended - began),
        1e3 * quantile(ttft, 0.5),
        1e3 * quantile(ttft, 0.99),
        1e3 * quantile(gaps, 0.5),
        1e3 * quantile(gaps, 0.99),
    )


def quantile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` of all do not exceed; nan of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


def over_rounds(runs: Sequence[Figures]) -> dict[str, dict[str, float]]:
    """Of each figure the median, the least and the most."""
    columns = {name: [getattr(run, name) for run in runs] for name in NAMES}
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in columns.items()
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """Where one prompt's tokens leave the reference's."""

    prompt: int
    token: int
    gap: float
    """Between the two best logits of the reference there."""


def differences(
    made: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> list[Difference]:
    """The first token of each prompt that is not the reference's; ``made`` may be of the first prompts only."""
    found = []
    for prompt, (ours, theirs) in enumerate(zip(made, expected, strict=False)):
        token = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other), None)
        if token is not None:
            found.append(Difference(prompt, token, gaps[prompt][token]))
    return found


def told(found: Sequence[Difference], num_prompts: int) -> str:
    """``32 of 32 equal``, or how many are not and how near the two best logits were where they part."""
    if not found:
        return f"{num_prompts} of {num_prompts} equal"
    tiny = sum(one.gap < TINY_GAP for one in found)
    gaps = ", ".join(f"{one.gap:.2g}" for one in sorted(found, key=lambda one: -one.gap)[:3])
    text = f"{len(found)} of {num_prompts} differ; logits gap there: largest {gaps}"
    return f"{text}; {tiny} below {TINY_GAP:g}"
