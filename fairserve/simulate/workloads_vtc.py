"""The synthetic workloads of the VTC paper (arXiv 2401.00588, section 5), request for request.

The artifact (Ying1123/VTC-artifact, fair_bench/trace.py and exp_suite.py) makes them from numpy's legacy generator with
seed 42. Here ``published=True``, the default, makes the same requests at the same times, which the tests compare with
the stored runs; ``published=False`` draws others from the run's own seed. Clients are client-0, client-1, ... in the
paper's order. Two habits of the artifact are kept: a client makes int(rate * duration_s) requests, so that the last
ones may come a little after ``duration_s``, and its first request comes one to two intervals after the start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from fairserve.config import PositiveFloat, PositiveInt
from fairserve.errors import ConfigError
from fairserve.simulate.records import Arrival
from fairserve.simulate.workloads_basic import listed, merge, requests

TwoRates = tuple[PositiveFloat, PositiveFloat]
Lengths = tuple[PositiveInt, PositiveInt]
"""(input, output) tokens of every request of a client."""

SEED = 42
"""The artifact's."""
ON_OFF_S = 60.0
"""Client 0 of an on/off workload is silent in every second interval of this length."""


def _state(rng: random.Random, published: bool) -> np.random.RandomState:
    return np.random.RandomState(SEED if published else rng.getrandbits(32))


def _even_times(
    state: np.random.RandomState, rate: float, duration_s: float, start_s: float = 0.0, on_off_s: float | None = None
) -> Iterator[float]:
    """The artifact's ``generate_requests_uniform`` for one client: same operations, so the same floats."""
    at_s = start_s + state.random_sample() * 1 / rate
    for _ in range(int(rate * duration_s)):
        at_s += 1 / rate
        if on_off_s is None or int(at_s // on_off_s) % 2 == 0:
            yield at_s


def _even(
    rng: random.Random,
    rates: tuple[float, ...],
    weights: tuple[float, ...],
    lengths: Lengths,
    duration_s: float,
    published: bool,
    on_off_s: float | None = None,
) -> list[Arrival]:
    if weights and len(weights) != len(rates):
        raise ConfigError(f"{len(weights)} weights for the {len(rates)} clients of rates: give one each, or none")
    state = _state(rng, published)
    clients = []
    for num, (rate, weight) in enumerate(zip(rates, weights or [1.0] * len(rates), strict=True)):
        times = _even_times(state, rate, duration_s, on_off_s=on_off_s if num == 0 else None)
        clients.append(requests(rng, f"client-{num}", times, *lengths, weight=weight))
    return merge(*clients)


def overload(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (1.5, 3.0),
    weights: tuple[PositiveFloat, ...] = (),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 360.0,
    published: bool = True,
) -> list[Arrival]:
    """Two clients, both above their share all the time (figure 3). Also section 5.4's, with other rates and lengths."""
    return _even(rng, rates, weights, lengths, duration_s, published)


def proportional(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.5),
    weights: tuple[PositiveFloat, ...] = (),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 600.0,
    published: bool = True,
) -> list[Arrival]:
    """Three clients, two below their share: they must get all they ask for."""
    return _even(rng, rates, weights, lengths, duration_s, published)


def overload_multi(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6),
    weights: tuple[PositiveFloat, ...] = (),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 360.0,
    published: bool = True,
) -> list[Arrival]:
    """Eight clients above their share."""
    return _even(rng, rates, weights, lengths, duration_s, published)


def overload_weighted(
    rng: random.Random,
    *,
    rates: tuple[PositiveFloat, ...] = (1.0, 1.0, 1.0, 1.0),
    weights: tuple[PositiveFloat, ...] = (1.0, 2.0, 3.0, 4.0),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 360.0,
    published: bool = True,
) -> list[Arrival]:
    """Four clients with weights 1 to 4 and EQUAL demand. The paper's rates are 0.4, 0.8, 1.2, 1.6: demand in the very
    ratio of the weights, under which FCFS looks fair too. Both ask for 4 requests/s together."""
    return _even(rng, rates, weights, lengths, duration_s, published)


def on_off_less(
    rng: random.Random,
    *,
    rates: TwoRates = (0.5, 2.0),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 600.0,
    on_off_s: PositiveFloat = ON_OFF_S,
    published: bool = True,
) -> list[Arrival]:
    """Client 0, silent in odd minutes, is below its share when it speaks; client 1 is above it."""
    return _even(rng, rates, (), lengths, duration_s, published, on_off_s)


def on_off_overload(
    rng: random.Random,
    *,
    rates: TwoRates = (2.0, 3.0),
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 600.0,
    on_off_s: PositiveFloat = ON_OFF_S,
    published: bool = True,
) -> list[Arrival]:
    """Client 0, silent in odd minutes, is above its share when it speaks; so is client 1."""
    return _even(rng, rates, (), lengths, duration_s, published, on_off_s)


def increase(
    rng: random.Random,
    *,
    rate: PositiveFloat = 0.5,
    from_rate: PositiveFloat = 0.2,
    to_rate: PositiveFloat = 2.0,
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 600.0,
) -> list[Arrival]:
    """Client 0 is even, client 1 becomes greedy (isolation, figure 5). No chance in it: the same for every seed."""
    even = accumulate([1 / rate] * int(rate * duration_s))
    most = int(0.5 * (from_rate + to_rate) * duration_s)
    rising: list[float] = []
    while len(rising) < most:  # the artifact counts requests: its ramp goes on past the end until it has made them all
        now_s = rising[-1] if rising else 0.0
        rising.append(now_s + 1 / (from_rate + (to_rate - from_rate) * now_s / duration_s))
    return merge(requests(rng, "client-0", even, *lengths), requests(rng, "client-1", rising, *lengths))


def dist_shift(
    rng: random.Random,
    *,
    lengths: Lengths = (256, 256),
    duration_s: PositiveFloat = 900.0,
    on_off_s: PositiveFloat = ON_OFF_S,
    published: bool = True,
) -> list[Arrival]:
    """Three phases of a third each: 0.5 on/off and 2 requests/s; 1 and 1; 0.5 and 1.5."""
    state = _state(rng, published)
    times: tuple[list[float], list[float]] = ([], [])
    for phase, rates in enumerate(((0.5, 2.0), (1.0, 1.0), (0.5, 1.5))):
        for client, rate in enumerate(rates):
            silent = on_off_s if phase == client == 0 else None
            times[client].extend(_even_times(state, rate, duration_s / 3, duration_s / 3 * phase, silent))
    return merge(*(requests(rng, f"client-{num}", sorted(mine), *lengths) for num, mine in enumerate(times)))


# --------------------------------------------------------------------------------------------------------- Poisson
def _poisson(
    state: np.random.RandomState, rates: TwoRates, duration_s: float, spread: tuple[int, int] | None = None
) -> Iterator[tuple[int, float, int, int]]:
    """(client, arrival_s, input, output) of one Poisson stream whose requests belong to client 0 or 1 by chance;
    lengths are drawn from [spread) and are 0 without it."""
    total = int(sum(rates) * duration_s)
    is_second = state.random_sample(total) > rates[0] / (rates[0] + rates[1])
    inputs = state.randint(*spread, total) if spread else np.zeros(total)
    outputs = state.randint(*spread, total) if spread else np.zeros(total)
    times = accumulate(state.gamma(1.0, 1 / sum(rates), total))
    for client, at_s, num_input, num_output in zip(is_second, times, inputs, outputs, strict=True):
        yield int(client), float(at_s), int(num_input), int(num_output)


def _two_poisson(
    rng: random.Random, rates: TwoRates, lengths: tuple[Lengths, Lengths], duration_s: float, published: bool
) -> list[Arrival]:
    times: tuple[list[float], list[float]] = ([], [])
    for client, at_s, *_ in _poisson(_state(rng, published), rates, duration_s):
        times[client].append(at_s)
    return merge(*(requests(rng, f"client-{num}", times[num], *lengths[num]) for num in (0, 1)))


def poisson_short_long(
    rng: random.Random,
    *,
    rates: TwoRates = (8.0, 1.5),
    lengths: tuple[Lengths, Lengths] = ((64, 64), (256, 256)),
    duration_s: PositiveFloat = 600.0,
    published: bool = True,
) -> list[Arrival]:
    """Client 0 sends many short requests, client 1 few long ones."""
    return _two_poisson(rng, rates, lengths, duration_s, published)


def poisson_short_long_2(
    rng: random.Random,
    *,
    rates: TwoRates = (8.0, 1.5),
    lengths: tuple[Lengths, Lengths] = ((512, 32), (32, 512)),
    duration_s: PositiveFloat = 600.0,
    published: bool = True,
) -> list[Arrival]:
    """Client 0 sends long prompts with short answers, client 1 short prompts with long answers."""
    return _two_poisson(rng, rates, lengths, duration_s, published)


def poisson_on_off_overload(
    rng: random.Random,
    *,
    rates: TwoRates = (0.5, 2.0),
    spread: Lengths = (16, 512),
    duration_s: PositiveFloat = 600.0,
    on_off_s: PositiveFloat = ON_OFF_S,
    published: bool = True,
) -> list[Arrival]:
    """Two Poisson clients, lengths equally likely in ``spread`` without its end; client 0 is silent in odd minutes."""
    rows: tuple[list[tuple[float, int, int]], list[tuple[float, int, int]]] = ([], [])
    for client, at_s, num_input, num_output in _poisson(_state(rng, published), rates, duration_s, spread):
        if client != 0 or int(at_s // on_off_s) % 2 == 0:
            rows[client].append((at_s, num_input, num_output))
    return merge(*(listed(f"client-{num}", mine) for num, mine in enumerate(rows)))
