"""The parts that workloads are put together from: one client's requests in time, adversaries, and their merging.

Every workload, here and in the other ``workloads_*`` modules, is a function of a ``random.Random`` and keyword
parameters that returns arrivals in order, with unique ids. Rates are requests per second; lengths are tokens, one
number or (smallest, largest), both included and all between them equally likely.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from fairserve.config import NonNegativeFloat, PositiveFloat, PositiveInt
from fairserve.simulate.records import Arrival


def _ascending(lengths: tuple[int, int]) -> tuple[int, int]:
    if lengths[0] > lengths[1]:
        raise ValueError(f"a range of lengths is [smallest, largest], not {list(lengths)}")
    return lengths


Length = PositiveInt | Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ascending)]


def draw(rng: random.Random, length: Length) -> int:
    """Tokens: the number itself, or one of its range."""
    return length if isinstance(length, int) else rng.randint(*length)


def requests(
    rng: random.Random,
    client: str,
    times_s: Iterable[float],
    num_input: Length,
    num_output: Length,
    weight: float = 1.0,
    **fields: Any,
) -> list[Arrival]:
    """One request of ``client`` at each time; ``fields`` are further fields of :class:`Arrival`."""
    rows = ((at_s, draw(rng, num_input), draw(rng, num_output)) for at_s in times_s)
    return listed(client, rows, weight=weight, **fields)


def listed(client: str, rows: Iterable[tuple[float, int, int]], **fields: Any) -> list[Arrival]:
    """One request of ``client`` for each (arrival_s, input tokens, output tokens)."""
    return [
        Arrival(f"{client}#{num:05d}", at_s, client, num_input, num_output, **{"max_output": num_output, **fields})
        for num, (at_s, num_input, num_output) in enumerate(rows)
    ]


def merge(*workloads: Iterable[Arrival]) -> list[Arrival]:
    """All of them in order of arrival, ties by id. An id that was taken before gets ~2, ~3, ... added."""
    seen: Counter[str] = Counter()
    merged = []
    for arrival in (one for workload in workloads for one in workload):
        name = arrival.request_id
        while seen[arrival.request_id]:
            seen[name] += 1
            arrival = replace(arrival, request_id=f"{name}~{seen[name]}")
        seen[arrival.request_id] += 1
        merged.append(arrival)
    return sorted(merged, key=lambda one: (one.arrival_s, one.request_id))


# ------------------------------------------------------------------------------------------------------ one client
def even(
    rng: random.Random,
    *,
    client: str = "client-0",
    rate: PositiveFloat = 1.0,
    num_input: Length = 256,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    phase: NonNegativeFloat | None = None,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """The same interval between all requests; the first comes ``phase`` intervals after the start (None: 0 to 1)."""
    first = rng.random() if phase is None else phase
    return requests(rng, client, _even_times(rate, start_s, end_s, first), num_input, num_output, weight)


def poisson(
    rng: random.Random,
    *,
    client: str = "client-0",
    rate: PositiveFloat = 1.0,
    num_input: Length = 256,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """Exponential intervals: each request comes independently of the others."""
    return requests(rng, client, _poisson_times(rng, rate, start_s, end_s), num_input, num_output, weight)


def on_off(
    rng: random.Random,
    *,
    client: str = "client-0",
    rate: PositiveFloat = 1.0,
    on_s: PositiveFloat = 60.0,
    off_s: PositiveFloat = 60.0,
    spacing: Literal["even", "poisson"] = "even",
    num_input: Length = 256,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """``rate`` for ``on_s`` seconds, then silence for ``off_s``, and so on; it begins with its on time."""
    if spacing == "even":
        times = _even_times(rate, start_s, end_s, rng.random())
    else:
        times = _poisson_times(rng, rate, start_s, end_s)
    heard = (at_s for at_s in times if (at_s - start_s) % (on_s + off_s) < on_s)
    return requests(rng, client, heard, num_input, num_output, weight)


def ramp(
    rng: random.Random,
    *,
    client: str = "client-0",
    from_rate: PositiveFloat = 0.2,
    to_rate: PositiveFloat = 2.0,
    num_input: Length = 256,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """The rate moves linearly from the start to the end; each interval is 1 / the rate at its beginning."""
    times = (at_s for at_s in ramp_times(from_rate, to_rate, start_s, end_s) if at_s < end_s)
    return requests(rng, client, times, num_input, num_output, weight)


def _even_times(rate: float, start_s: float, end_s: float, phase: float) -> Iterator[float]:
    num = 0
    while (at_s := start_s + (phase + num) / rate) < end_s:
        yield at_s
        num += 1


def _poisson_times(rng: random.Random, rate: float, start_s: float, end_s: float) -> Iterator[float]:
    at_s = start_s + rng.expovariate(rate)
    while at_s < end_s:
        yield at_s
        at_s += rng.expovariate(rate)


def ramp_times(from_rate: float, to_rate: float, start_s: float, end_s: float) -> Iterator[float]:
    """Times of a ramp; the last one is past ``end_s``."""
    at_s = start_s
    while at_s < end_s:
        at_s += 1 / (from_rate + (to_rate - from_rate) * (at_s - start_s) / (end_s - start_s))
        yield at_s


# ----------------------------------------------------------------------------------------------------- adversaries
def burst(
    rng: random.Random,
    *,
    client: str = "burster",
    num_requests: PositiveInt = 50,
    at_s: NonNegativeFloat = 0.0,
    num_input: Length = 256,
    num_output: Length = 256,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """Many requests at the same moment."""
    return requests(rng, client, [at_s] * num_requests, num_input, num_output, weight)


def idle_then_burst(
    rng: random.Random,
    *,
    client: str = "sleeper",
    rate: PositiveFloat = 1.0,
    active_s: NonNegativeFloat = 60.0,
    idle_s: PositiveFloat = 600.0,
    num_requests: PositiveInt = 50,
    num_input: Length = 256,
    num_output: Length = 256,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """Even requests for ``active_s`` seconds, silence for ``idle_s``, then a burst: does idling save up service?"""
    times = [*_even_times(rate, 0.0, active_s, rng.random()), *[active_s + idle_s] * num_requests]
    return requests(rng, client, times, num_input, num_output, weight)


def many_tiny(
    rng: random.Random,
    *,
    client: str = "swarm",
    rate: PositiveFloat = 50.0,
    num_input: Length = 4,
    num_output: Length = 1,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """A flood of the smallest requests: little service each, much work for queues, slots and reports."""
    return requests(rng, client, _poisson_times(rng, rate, start_s, end_s), num_input, num_output, weight)


def abort_after_prefill(
    rng: random.Random,
    *,
    client: str = "aborter",
    rate: PositiveFloat = 2.0,
    num_input: Length = 1024,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """Long prompts whose caller leaves as soon as they are started: computed prompts must still be paid for."""
    times = _poisson_times(rng, rate, start_s, end_s)
    return cancelled(requests(rng, client, times, num_input, num_output, weight), cancel_after=0)


def lying_max_tokens(
    rng: random.Random,
    *,
    client: str = "liar",
    rate: PositiveFloat = 1.0,
    num_input: Length = 256,
    num_output: Length = 64,
    max_output: PositiveInt = 4096,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """Asks for ``max_output`` tokens whatever it will make: far more, to take memory; far fewer, to look small."""
    times = _poisson_times(rng, rate, start_s, end_s)
    return requests(rng, client, times, num_input, num_output, weight, max_output=max_output)


def sybil(
    rng: random.Random,
    *,
    client: str = "sybil",
    num_clients: PositiveInt = 10,
    rate: PositiveFloat = 2.0,
    num_input: Length = 256,
    num_output: Length = 256,
    start_s: NonNegativeFloat = 0.0,
    end_s: PositiveFloat = 600.0,
    weight: PositiveFloat = 1.0,
) -> list[Arrival]:
    """One client's requests (``rate`` in all) under many names, to get many shares; see :func:`split`."""
    times = _poisson_times(rng, rate, start_s, end_s)
    return split(requests(rng, client, times, num_input, num_output, weight), num_clients)


def split(arrivals: Sequence[Arrival], num_clients: int) -> list[Arrival]:
    """The same requests, dealt in turn to ``num_clients`` users CLIENT/user-0, ...: below one tenant in a hierarchy,
    strangers to each other without one."""
    return [replace(one, client=f"{one.client}/user-{num % num_clients}") for num, one in enumerate(arrivals)]


def cancelled(arrivals: Sequence[Arrival], cancel_after: int = 0) -> list[Arrival]:
    """The same requests, each left by its caller after ``cancel_after`` output tokens."""
    return [replace(one, cancel_after=cancel_after) for one in arrivals]


def asking(arrivals: Sequence[Arrival], max_output: int) -> list[Arrival]:
    """The same requests, each asking for ``max_output`` tokens."""
    return [replace(one, max_output=max_output) for one in arrivals]
