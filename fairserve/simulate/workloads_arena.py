"""The arena trace of the VTC paper (section 5.3), or a synthetic one like it for those who do not have the file.

All numbers here are of the trace in the artifact (Ying1123/VTC-artifact, Apache-2.0; 1,500 requests in 600 s, a client
is the model that a visitor of the chatbot arena talked to), kept in this project's traces as
vtc_arena_27clients_600s.csv.gz.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

from fairserve.config import PositiveFloat
from fairserve.simulate.records import Arrival
from fairserve.simulate.traces import read_trace
from fairserve.simulate.workloads_basic import listed, merge

NORMAL = NormalDist()

DURATION_S = 600.0
RATE = 2.5
"""Requests per second of all clients."""
CLIENTS = (
    *((296, 0, 598), (262, 206, 600), (199, 0, 582), (120, 1, 597), (67, 14, 583), (66, 288, 596), (56, 1, 598)),
    *((46, 218, 582), (44, 0, 597), (43, 105, 579), (40, 20, 577), (36, 9, 597), (31, 413, 593), (26, 19, 587)),
    *((25, 206, 598), (23, 50, 573), (22, 44, 269), (22, 453, 589), (19, 13, 150), (19, 409, 571), (12, 4, 149)),
    *((11, 11, 83), (7, 16, 118), (3, 15, 28), (2, 27, 64), (2, 590, 594), (1, 592, 593)),
)
"""(requests, second of the first, second of the last): the arena added and dropped models while it ran."""
LEVELS = (0.0, 0.05, 0.10, 0.25, 0.40, 0.50, 0.60, 0.75, 0.80, 0.90, 0.95, 0.99, 1.0)
INPUTS = (2, 2, 5, 13, 24, 40, 68, 161, 214, 432, 653, 902, 1021)
"""Prompt tokens at each of LEVELS: mean 136."""
OUTPUTS = (2, 10, 18, 62, 141, 211, 308, 458, 511, 513, 513, 785, 977)
"""Output tokens at each of LEVELS: mean 256; one in five reaches 511, where most models had to stop."""
CORRELATION = 0.275
"""Of the normal variables behind input and output (their rank correlation is 0.264)."""


def arena(
    rng: random.Random, *, duration_s: PositiveFloat = DURATION_S, rate: PositiveFloat = RATE, file: str = ""
) -> list[Arrival]:
    """Synthetic: the trace's 27 clients with its requests per client, in its lengths, each client's at random times
    between its first and its last. Left out is that clients differ in their lengths, too: the busiest has 20 % of the
    service here and 22 % in the trace, the Gini coefficient is 0.60 and 0.63.

    ``rate`` is of all clients together, 2.5 as published, and scales every client; another ``duration_s`` stretches the
    clients' times. With ``file``, the trace itself, cut at ``duration_s``; ``rate`` then speeds it up or slows it down.
    """
    if file:
        return read_trace(Path(file), time_scale=RATE / rate, duration_s=duration_s)
    stretch, more = duration_s / DURATION_S, duration_s * rate / (DURATION_S * RATE)
    clients = []
    for num, (num_requests, first_s, last_s) in enumerate(CLIENTS):
        times = (rng.uniform(first_s, last_s) * stretch for _ in range(round(num_requests * more)))
        clients.append(listed(f"client-{num}", [(at_s, *_lengths(rng)) for at_s in sorted(times)]))
    return merge(*clients)


def _lengths(rng: random.Random) -> tuple[int, int]:
    one = rng.gauss()
    other = CORRELATION * one + math.sqrt(1 - CORRELATION**2) * rng.gauss()
    return _quantile(INPUTS, NORMAL.cdf(one)), _quantile(OUTPUTS, NORMAL.cdf(other))


def _quantile(lengths: tuple[int, ...], level: float) -> int:
    """Geometric between the levels: the means come out right, with straight lines they would be 2 % too high."""
    at = min(bisect_right(LEVELS, level), len(LEVELS) - 1) - 1
    (below, above), (low, high) = list(pairwise(LEVELS))[at], list(pairwise(lengths))[at]
    return round(low * math.pow(high / low, (level - below) / (above - below)))
