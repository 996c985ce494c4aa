"""Workloads drawn from the published client profiles of ServeGen (alibaba/ServeGen, Apache-2.0, arXiv 2505.09999).

A profile file is JSON lines. The first line names the quantile levels of the lengths and the length of a window; every
other line is a client: its arrival process in each window (rate, coefficient of variation, family, shape), and the
quantiles of its input and output lengths from certain times on.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from fairserve.config import NonNegativeFloat, PositiveFloat, PositiveInt
from fairserve.errors import ConfigError
from fairserve.simulate.records import Arrival
from fairserve.simulate.workloads_basic import listed, merge


class Window(NamedTuple):
    """A client's arrival process from ``start_s`` on, for one window."""

    start_s: float
    rate: float
    cv: float
    family: str
    """Of the intervals: Weibull or Gamma."""
    shape: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One client."""

    client: str
    windows: tuple[Window, ...]
    lengths: tuple[tuple[float, list[float], list[float]], ...]
    """(from when on, quantiles of the input, of the output), in order of time."""


@dataclass(frozen=True, slots=True)
class Profiles:
    levels: list[float]
    window_s: float
    clients: tuple[Profile, ...]


def servegen(
    rng: random.Random,
    *,
    file: str,
    start_s: NonNegativeFloat | None = None,
    duration_s: PositiveFloat = 3600.0,
    rate: PositiveFloat = 10.0,
    num_clients: PositiveInt | None = None,
    max_tokens: PositiveInt | None = None,
) -> list[Arrival]:
    """Drawn from the profiles in ``file``: ``duration_s`` seconds from ``start_s`` of their time (None: their first
    window), all rates scaled by one factor so that ``rate`` requests per second arrive on average. ``num_clients``:
    only so many, those with most requests there. Requests longer than ``max_tokens`` in all are dropped.

    Within a window a client's intervals have the published family and shape; they are then stretched to fill the window
    and turned by a random angle, so that the number of requests is right even where one burst lasts for minutes.

    Raises:
        ConfigError: an unreadable file, or no requests in that time.
    """
    profiles = read_profiles(Path(file))
    first_s = min(window.start_s for one in profiles.clients for window in one.windows) if start_s is None else start_s
    end_s = first_s + duration_s
    demand = {one.client: _demand(one, profiles.window_s, first_s, end_s) for one in profiles.clients}
    chosen = sorted((one for one in profiles.clients if demand[one.client] > 0), key=lambda one: -demand[one.client])
    chosen = chosen[:num_clients]
    if not chosen:
        raise ConfigError(f"{file} has no requests in the {duration_s:g} s from {first_s:g} s on")
    scale = rate * duration_s / sum(demand[one.client] for one in chosen)
    clients = []
    for profile in chosen:
        rows = []
        for window in profile.windows:
            if not first_s - profiles.window_s < window.start_s < end_s:
                continue
            inputs, outputs = _lengths_at(profile, window.start_s)
            for at_s in _times(rng, window, profiles.window_s, scale):
                row = (
                    at_s - first_s,
                    _quantile(rng, profiles.levels, inputs),
                    _quantile(rng, profiles.levels, outputs),
                )
                if first_s <= at_s < end_s and (max_tokens is None or row[1] + row[2] <= max_tokens):
                    rows.append(row)
        clients.append(listed(f"client-{profile.client}", sorted(rows)))
    return merge(*clients)


def read_profiles(path: Path) -> Profiles:
    """The profiles in a file.

    Raises:
        ConfigError: unreadable, or not the format; it names the line.
    """
    line = 1
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            head = json.loads(file.readline())
            levels, window_s = [float(level) for level in head["length_quantile_levels"]], float(head["window_s"])
            clients = []
            for line, text in enumerate(file, 2):  # noqa: B007 - named in the error
                clients.append(_profile(json.loads(text), len(levels)))
    except OSError as error:
        raise ConfigError(f"cannot read the profiles {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"{path}, line {line}: no ServeGen profile: {type(error).__name__}: {error}") from error
    if not clients:
        raise ConfigError(f"{path} holds no clients")
    return Profiles(levels, window_s, tuple(clients))


def _profile(data: dict[str, Any], num_levels: int) -> Profile:
    windows = tuple(Window(*window) for window in data["windows"])
    for window in windows:
        if window.family not in ("Weibull", "Gamma"):
            raise ValueError(f"family {window.family!r}, known are Weibull and Gamma")
        if not (window.rate >= 0 and window.shape > 0):
            raise ValueError(f"rate {window.rate} must be at least 0, shape {window.shape} above 0")
    lengths = tuple(sorted((float(start_s), both["in"], both["out"]) for start_s, both in data["lengths"].items()))
    if not lengths or any(len(quantiles) != num_levels for _, *both in lengths for quantiles in both):
        raise ValueError(f"lengths must hold {num_levels} quantiles of 'in' and 'out'")
    return Profile(str(data["client"]), windows, lengths)


def _demand(profile: Profile, window_s: float, first_s: float, end_s: float) -> float:
    """Expected requests in [first_s, end_s), unscaled."""
    return sum(
        window.rate * max(0.0, min(end_s, window.start_s + window_s) - max(first_s, window.start_s))
        for window in profile.windows
    )


def _lengths_at(profile: Profile, at_s: float) -> tuple[list[float], list[float]]:
    """The newest lengths published for that time; the first where all are later."""
    known = [both for start_s, *both in profile.lengths if start_s <= at_s] or [list(profile.lengths[0][1:])]
    inputs, outputs = known[-1]
    return inputs, outputs


def _times(rng: random.Random, window: Window, window_s: float, scale: float) -> list[float]:
    expected = window.rate * scale * window_s
    num = int(expected) + (rng.random() < expected % 1)
    if window.family == "Weibull":
        gaps = [rng.weibullvariate(1.0, window.shape) for _ in range(num)]
    else:
        gaps = [rng.gammavariate(window.shape, 1.0) for _ in range(num)]
    total, turn = math.fsum(gaps), rng.random()
    if total == 0:  # a shape so bursty that every gap is below the smallest float: all at one moment
        return [window.start_s + turn * window_s] * num
    return sorted(window.start_s + (at / total + turn) % 1 * window_s for at in accumulate(gaps))


def _quantile(rng: random.Random, levels: Sequence[float], lengths: Sequence[float]) -> int:
    """A length, linear between the published quantiles."""
    level = rng.random()
    above = max(1, bisect_left(levels, level))
    width = levels[above] - levels[above - 1]
    part = (level - levels[above - 1]) / width if width else 1.0
    return max(1, round(lengths[above - 1] + part * (lengths[above] - lengths[above - 1])))
