"""A synthetic workload with the published profile of FairServe's trace (arXiv 2411.15997): users, applications,
interactions of several calls, heavy tails.

The trace (of a production copilot) is not redistributable. What is known of it, and fitted here: 10,000 requests in
72 s; 1,358 users, the busiest with 21 % of the requests, the median with 4; 5,251 interactions; 23 applications, of
the largest five their requests and mean lengths; prompts mean 5,809 p50 3,573 p99 33,639; outputs mean 109 p50 31 p99
1,172; calls per interaction p50 3 mean 12 p99 288. The last three cannot be over interactions, whose mean is 10,000 /
5,251 = 1.9: they are taken to be over requests (each request counts its interaction's calls), and then one interaction
of 288 calls explains both the mean and the p99. Not known, and assumed: which user uses which application
(independent), the time between calls, lengths within an interaction (independent).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

from fairserve.config import PositiveFloat, PositiveInt
from fairserve.simulate.records import Arrival
from fairserve.simulate.workloads_basic import merge

NUM_REQUESTS = 10_000
DURATION_S = 72.0
NUM_USERS = 1_358
TOP_USER = 0.21
"""Of all requests."""
OTHER_USERS = (4.0, 0.862)
"""Median and sigma of the log-normal requests of the other users: they make the other 79 % together."""
NUM_INTERACTIONS = 5_251
SINGLE_CALLS = 0.70
"""Of all interactions."""
LONGEST = 288
"""Calls of the one that is longest."""
OTHER_CALLS = (8.0, 4.492)
"""Scale and exponent of the Lomax (shifted Pareto) calls beyond 2 of the others: mean 1.9 over all interactions."""


@dataclass(frozen=True, slots=True)
class Application:
    """``num_requests`` of NUM_REQUESTS; mean tokens as traced, before any division."""

    name: str
    num_requests: int
    prompt_mean: float
    output_mean: float


_OTHERS = [round(400 * 0.8621**rank) for rank in range(18)]
APPLICATIONS = (
    Application("app-00", 4680, 5761, 57),
    Application("app-01", 971, 4070, 58),
    Application("app-02", 652, 17247, 535),
    Application("app-03", 546, 1115, 5),
    Application("app-04", 448, 1066, 63),
    # Of the other 18 only the sums are known (the rest to 10,000 requests and to the overall means).
    *(Application(f"app-{5 + rank:02d}", num, 5492, 143) for rank, num in enumerate(_OTHERS)),
)
PROMPT_SIGMA = 0.85
OUTPUT_SIGMA = 1.3
"""Of the log-normal lengths within an application, fitted to p50 and p99 over all."""


def fairserve(
    rng: random.Random,
    *,
    num_requests: PositiveInt = NUM_REQUESTS,
    duration_s: PositiveFloat = DURATION_S,
    length_divisor: PositiveFloat = 8.0,
    max_tokens: PositiveInt = 8_000,
    gap_s: PositiveFloat = 0.5,
) -> list[Arrival]:
    """``num_requests`` in ``duration_s``: choose both so that the cluster is overloaded. Users and interactions become
    fewer with fewer requests; the shapes stay. Lengths are divided by 8 as in FairServe's own runs; a request of more
    than ``max_tokens`` after that is drawn again. Calls of an interaction come an exponential time apart, ``gap_s`` on
    average or less where they would not fit. A client is a user."""
    calls = _calls(num_requests)
    users = _deal(rng, calls, _user_sizes(num_requests))
    applications = _deal(
        rng, calls, [math.ceil(one.num_requests * num_requests / NUM_REQUESTS) for one in APPLICATIONS]
    )
    arrivals = []
    for num, num_calls in enumerate(calls):
        application = APPLICATIONS[applications[num]]
        for call_index, at_s in enumerate(_times(rng, num_calls, duration_s, gap_s)):
            num_input, num_output = _lengths(rng, application, length_divisor, max_tokens)
            arrivals.append(
                Arrival(
                    request_id=f"i{num:05d}.{call_index:03d}",
                    arrival_s=at_s,
                    client=f"user-{users[num]:04d}",
                    num_input=num_input,
                    num_output=num_output,
                    max_output=num_output,
                    application=application.name,
                    interaction=f"i{num:05d}",
                    call_index=call_index,
                )
            )
    return merge(arrivals)


def _calls(num_requests: int) -> list[int]:
    """Calls of each interaction. The same for every seed: evenly spaced quantiles, so that the tail is always there."""
    num = max(1, round(NUM_INTERACTIONS * num_requests / NUM_REQUESTS))
    num_single = round(SINGLE_CALLS * num)
    num_more = num - num_single - 1
    scale, exponent = OTHER_CALLS
    more = [2 + int(scale * (((rank + 0.5) / num_more) ** (-1 / exponent) - 1)) for rank in range(num_more)]
    calls = [max(1, round(LONGEST * num_requests / NUM_REQUESTS)), *more, *[1] * num_single]
    while sum(calls) > num_requests:
        calls.pop()
    return calls + [1] * (num_requests - sum(calls))


def _user_sizes(num_requests: int) -> list[int]:
    """Requests of each user, the busiest first; their sum is about ``num_requests``."""
    num_others = max(1, round(NUM_USERS * num_requests / NUM_REQUESTS) - 1)
    median, sigma = OTHER_USERS
    normal = NormalDist(math.log(median), sigma)
    others = [round(math.exp(normal.inv_cdf((rank + 0.5) / num_others))) for rank in range(num_others)]
    return [math.ceil(TOP_USER * num_requests), *(max(1, size) for size in reversed(others))]


def _deal(rng: random.Random, sizes: Sequence[int], quotas: Sequence[int]) -> list[int]:
    """An owner (index of ``quotas``) for each of ``sizes``, so that the sizes of an owner add up to about its quota.

    The largest sizes choose first, by chance in proportion to the quotas among the owners with room; the ones of size 1
    fill the room that is left.
    """
    room = list(quotas)
    owners = [-1] * len(sizes)
    bounds = list(accumulate(quotas))
    for num in sorted(range(len(sizes)), key=lambda num: -sizes[num]):
        if sizes[num] == 1:
            continue
        tries = (rng.choices(range(len(room)), cum_weights=bounds)[0] for _ in range(100))
        roomy = max(range(len(room)), key=room.__getitem__)
        owner = next((one for one in tries if room[one] >= sizes[num]), roomy)
        owners[num] = owner
        room[owner] -= sizes[num]
    places = [owner for owner, left in enumerate(room) for _ in range(left)]
    rng.shuffle(places)
    for num, size in enumerate(sizes):
        if size == 1:
            owners[num] = places.pop() if places else rng.choices(range(len(room)), cum_weights=bounds)[0]
    return owners


def _times(rng: random.Random, num_calls: int, duration_s: float, gap_s: float) -> list[float]:
    """Increasing times in [0, duration_s)."""
    gaps = [rng.expovariate(1 / gap_s) for _ in range(num_calls - 1)]
    span_s = min(sum(gaps), 0.9 * duration_s)
    shrink = span_s / sum(gaps) if gaps else 1.0
    start_s = rng.random() * (duration_s - span_s)
    return list(accumulate((gap * shrink for gap in gaps), initial=start_s))


def _lengths(rng: random.Random, application: Application, divisor: float, max_tokens: int) -> tuple[int, int]:
    while True:
        prompt = _log_normal(rng, application.prompt_mean, PROMPT_SIGMA)
        output = _log_normal(rng, application.output_mean, OUTPUT_SIGMA)
        num_input, num_output = max(1, round(prompt / divisor)), max(1, round(output / divisor))
        if num_input + num_output <= max_tokens:
            return num_input, num_output


def _log_normal(rng: random.Random, mean: float, sigma: float) -> float:
    return rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
