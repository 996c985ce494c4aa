"""Traces: workloads that somebody recorded. ``trace_files.COLUMNS`` lists what a file may hold.

Two published kinds need more than their columns:

- ``mooncake`` (kvcache-ai/Mooncake, FAST'25): arrivals stand at ticks of 3 s, over which each tick's requests are
  spread evenly. A hash stands for 512 tokens: all lengths are divided by 32, so that it stands for 16. Hash 0 is common
  to all, so requests with the same second hash are one session, here: one interaction.
- profiles of ServeGen (alibaba/ServeGen, arXiv 2505.09999) are no traces but what traces are drawn from: see
  ``workloads_servegen.py``.

Requests that are too long are dropped and counted, never clipped: clipping changes who asks for how much.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fairserve.errors import ConfigError
from fairserve.simulate.records import PREFIX_BLOCK, Arrival
from fairserve.simulate.trace_files import read_file, write_trace
from fairserve.simulate.workloads_basic import merge

__all__ = ["Trace", "compose", "load_trace", "read_trace", "write_trace"]

logger = logging.getLogger(__name__)

Format = Literal["plain", "mooncake"]
MOONCAKE_BLOCK = 512
MOONCAKE_TICK_S = 3.0


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file held."""

    arrivals: list[Arrival]
    """In order of arrival."""
    num_read: int
    """Requests that were asked for (time, clients), before the too long ones were dropped."""
    num_too_long: int


def read_trace(path: Path, **options: Any) -> list[Arrival]:
    """The arrivals of :func:`load_trace`, which has the options; how many were dropped is logged."""
    trace = load_trace(path, **options)
    if trace.num_too_long:
        logger.warning("%s: dropped %d of %d requests as too long", path, trace.num_too_long, trace.num_read)
    return trace.arrivals


def load_trace(
    path: Path,
    *,
    format: Format = "plain",  # noqa: A002 - the word for it, and the key in a scenario
    start_s: float = 0.0,
    time_scale: float = 1.0,
    duration_s: float | None = None,
    length_divisor: int | None = None,
    hash_block: int | None = None,
    max_tokens: int | None = None,
    top_clients: int | None = None,
    tenants: Mapping[str, float] | None = None,
    limit: int | None = None,
    rng: random.Random | None = None,
) -> Trace:
    """Read a trace.

    ``start_s``: seconds of the trace's own time to leave out. ``time_scale``: times are multiplied by it, so 0.5 is
    twice as fast. ``duration_s``: only requests that arrive before it, after both. ``length_divisor``: lengths are
    divided by it, rounding up (plain: 1, mooncake: 32). ``hash_block``: tokens that one prefix hash of the file stands
    for, before that (plain: 16, mooncake: 512). ``max_tokens``: input and output together; longer requests are
    dropped. ``top_clients``: only so many clients, those with most requests. ``tenants``: name -> share; whole
    interactions are given to them by chance (``rng``) and share, the file's clients forgotten. ``limit``: only so many
    requests, the first to arrive.

    Raises:
        ConfigError: an unreadable file, a missing column, a wrong value (naming file, line and column).
    """
    is_mooncake = format == "mooncake"
    divisor = length_divisor or (MOONCAKE_BLOCK // PREFIX_BLOCK if is_mooncake else 1)
    hash_tokens = hash_block or (MOONCAKE_BLOCK if is_mooncake else PREFIX_BLOCK)
    arrivals = read_file(path)
    if is_mooncake:
        arrivals = _sessions(_untick(arrivals))
    arrivals = merge(arrivals)
    if (start_s, time_scale) != (0.0, 1.0):
        arrivals = [replace(one, arrival_s=(one.arrival_s - start_s) * time_scale) for one in arrivals]
    arrivals = [one for one in arrivals if one.arrival_s >= 0 and (duration_s is None or one.arrival_s < duration_s)]
    if divisor != 1 or hash_tokens != PREFIX_BLOCK:
        arrivals = [_shortened(one, divisor, hash_tokens) for one in arrivals]
    if tenants:
        arrivals = _given_to(arrivals, tenants, rng or random.Random(0))
    if top_clients is not None:
        busiest = {client for client, _ in Counter(one.client for one in arrivals).most_common(top_clients)}
        arrivals = [one for one in arrivals if one.client in busiest]
    fitting = [one for one in arrivals if max_tokens is None or one.num_input + one.num_output <= max_tokens]
    return Trace(fitting[:limit], len(arrivals), len(arrivals) - len(fitting))


def compose(times: Iterable[Arrival], sessions: Iterable[Arrival], rng: random.Random) -> list[Arrival]:
    """A workload with tenants AND prefixes, of which no trace is published: who and when from ``times``, what from
    ``sessions``. Say that it is composed.

    Whole interactions of ``sessions`` are given to the clients of ``times`` by chance, in proportion to their requests.
    A client's k-th arrival then sends the k-th request that it was given; what is left over on either side is dropped.
    """
    times = list(times)
    shares = Counter(one.client for one in times)
    if not shares:
        return []
    given: dict[str, deque[Arrival]] = defaultdict(deque)
    for one in _given_to(list(sessions), shares, rng):
        given[one.client].append(one)
    composed = []
    for when in times:
        if given[when.client]:
            what = given[when.client].popleft()
            composed.append(replace(what, arrival_s=when.arrival_s, weight=when.weight, ingress=when.ingress))
    return merge(composed)


def _untick(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Spread the requests of each tick, in the file's order, evenly over it. Ticks wander by some milliseconds."""
    ticks: dict[int, list[Arrival]] = defaultdict(list)
    for one in arrivals:
        ticks[round(one.arrival_s / MOONCAKE_TICK_S)].append(one)
    return [
        replace(one, arrival_s=MOONCAKE_TICK_S * (tick + num / len(together)))
        for tick, together in sorted(ticks.items())
        for num, one in enumerate(together)
    ]


def _sessions(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Name the interactions; ``arrivals`` in order of time."""
    num_calls: Counter[str] = Counter()
    named = []
    for one in arrivals:
        if one.interaction or len(one.prefix) < 2:
            named.append(one)
            continue
        session = f"session-{one.prefix[1]}"
        named.append(replace(one, interaction=session, call_index=num_calls[session]))
        num_calls[session] += 1
    return named


def _shortened(one: Arrival, divisor: int, hash_tokens: int) -> Arrival:
    """Lengths divided, rounding up; each hash made as many as there are blocks of PREFIX_BLOCK tokens left of it."""
    num_input = -(-one.num_input // divisor)
    blocks, rest = divmod(hash_tokens, divisor * PREFIX_BLOCK)
    if one.prefix and (rest or not blocks):
        raise ConfigError(
            f"a prefix hash of {hash_tokens} tokens with lengths divided by {divisor} is no multiple of {PREFIX_BLOCK} "
            "tokens: change length_divisor or hash_block"
        )
    prefix = tuple(known * blocks + part for known in one.prefix for part in range(blocks))
    return replace(
        one,
        num_input=num_input,
        num_output=-(-one.num_output // divisor),
        max_output=-(-one.max_output // divisor),
        cancel_after=None if one.cancel_after is None else one.cancel_after // divisor,
        prefix=prefix[: num_input // PREFIX_BLOCK],
    )


def _given_to(arrivals: Iterable[Arrival], shares: Mapping[str, float], rng: random.Random) -> list[Arrival]:
    """Whole interactions (and single requests) to clients by chance, in proportion to ``shares``."""
    names, weights = list(shares), list(shares.values())
    owners: dict[str, str] = {}
    given = []
    for one in arrivals:
        key = one.interaction or f"alone {one.request_id}"
        if key not in owners:
            owners[key] = rng.choices(names, weights)[0]
        given.append(replace(one, client=owners[key]))
    return given
