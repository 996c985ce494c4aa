"""Who asks for what and when: a plan made from a seed, the same for every policy that is compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

GREEDY, STEADY, ON_OFF = "greedy", "steady", "on-off"
CLIENTS = (GREEDY, STEADY, ON_OFF)
MODEST = (STEADY, ON_OFF)

FLOOD = 10
"""The greedy client's requests for each one of a modest client."""
OVERLOAD = 3.0
"""Demand of all clients together over what the service can do. A modest client then asks for a quarter of the
capacity, a little less than the third that is its fair share of three."""
ON_S = OFF_S = 15.0
"""The on-off client asks like the steady one for ON_S seconds, then rests for OFF_S seconds."""
MIX = ((24, 16), (48, 32), (96, 48))
"""(words in the prompt, output tokens), equally likely for every client."""
MEAN_OUTPUT = sum(num_output for _, num_output in MIX) / len(MIX)

_WORDS = [
    *("river", "table", "window", "paper", "garden", "music", "winter", "number", "letter", "market", "silver"),
    *("bridge", "morning", "doctor", "island", "engine", "village", "pocket", "mountain", "kitchen", "summer"),
]


@dataclass(frozen=True, slots=True)
class Planned:
    """One request: ``at_s`` seconds after the start, ``num_output`` tokens exactly (ignore_eos)."""

    client: str
    at_s: float
    prompt: str
    num_output: int


def flood(capacity_rps: float, duration_s: float, num_slots: int, seed: int = 0) -> list[Planned]:
    """A greedy client at FLOOD times the rate of each of two modest ones, together OVERLOAD times the capacity.

    ``capacity_rps`` is what the service finishes, requests of MIX per second. The greedy client starts with a burst
    that fills the cluster's ``num_slots`` twice, so the service is saturated from the first second to the last.
    """
    rng = random.Random(seed)
    modest_rps = capacity_rps * OVERLOAD / (FLOOD + len(MODEST))
    arrivals: list[tuple[str, float]] = [(GREEDY, 0.0)] * (2 * num_slots)
    arrivals += ((GREEDY, at_s) for at_s in _poisson(rng, FLOOD * modest_rps, duration_s))
    arrivals += ((STEADY, at_s) for at_s in _poisson(rng, modest_rps, duration_s))
    for at_s in _poisson(rng, modest_rps, duration_s):  # its own time, in which it is always on
        arrivals.append((ON_OFF, at_s + (at_s // ON_S) * OFF_S))
    arrivals = [(client, at_s) for client, at_s in arrivals if at_s < duration_s]
    return [_request(rng, client, at_s) for client, at_s in sorted(arrivals, key=lambda arrival: arrival[1])]


def burst(client: str, num_requests: int, seed: int = 1) -> list[Planned]:
    """``num_requests`` of MIX at once: to warm up, and to find the capacity."""
    rng = random.Random(seed)
    return [_request(rng, client, 0.0) for _ in range(num_requests)]


def _poisson(rng: random.Random, rate_rps: float, duration_s: float) -> Iterator[float]:
    at_s = rng.expovariate(rate_rps)
    while at_s < duration_s:
        yield at_s
        at_s += rng.expovariate(rate_rps)


def _request(rng: random.Random, client: str, at_s: float) -> Planned:
    num_words, num_output = rng.choice(MIX)
    return Planned(client, at_s, " ".join(rng.choices(_WORDS, k=num_words)), num_output)
