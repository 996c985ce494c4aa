"""Every workload by name, and the parameters that it has."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import create_model

from fairserve.config import NonNegativeFloat, PositiveFloat, PositiveInt, Strict
from fairserve.errors import ConfigError
from fairserve.simulate import workloads_basic as basic
from fairserve.simulate import workloads_vtc as vtc
from fairserve.simulate.records import Arrival
from fairserve.simulate.traces import Format, compose, read_trace
from fairserve.simulate.workloads_arena import arena
from fairserve.simulate.workloads_fairserve import fairserve
from fairserve.simulate.workloads_prefix import shared_prefix, tree_of_thought
from fairserve.simulate.workloads_servegen import servegen

Workload = Callable[..., list[Arrival]]
"""(random.Random, parameters by keyword) -> arrivals in order of time, with unique ids."""


def trace(
    rng: random.Random,
    *,
    file: str,
    format: Format = "plain",  # noqa: A002 - the key in a scenario
    start_s: NonNegativeFloat = 0.0,
    time_scale: PositiveFloat = 1.0,
    duration_s: PositiveFloat | None = None,
    length_divisor: PositiveInt | None = None,
    hash_block: PositiveInt | None = None,
    max_tokens: PositiveInt | None = None,
    top_clients: PositiveInt | None = None,
    tenants: dict[str, PositiveFloat] | None = None,
    limit: PositiveInt | None = None,
) -> list[Arrival]:
    """A recorded workload; see ``traces.load_trace``."""
    return read_trace(
        Path(file),
        format=format,
        start_s=start_s,
        time_scale=time_scale,
        duration_s=duration_s,
        length_divisor=length_divisor,
        hash_block=hash_block,
        max_tokens=max_tokens,
        top_clients=top_clients,
        tenants=tenants,
        limit=limit,
        rng=rng,
    )


def composed(
    rng: random.Random,
    *,
    file: str,
    sessions_file: str,
    sessions_format: Format = "mooncake",
    start_s: NonNegativeFloat = 0.0,
    time_scale: PositiveFloat = 1.0,
    duration_s: PositiveFloat | None = None,
    max_tokens: PositiveInt | None = None,
    top_clients: PositiveInt | None = None,
) -> list[Arrival]:
    """Two recorded workloads in one: who and when from ``file``, lengths, sessions and prefixes from ``sessions_file``
    (from which ``max_tokens`` drops); see ``traces.compose``."""
    times = read_trace(
        Path(file), start_s=start_s, time_scale=time_scale, duration_s=duration_s, top_clients=top_clients
    )
    sessions = read_trace(Path(sessions_file), format=sessions_format, max_tokens=max_tokens)
    return compose(times, sessions, rng)


WORKLOADS: Mapping[str, Workload] = {
    one.__name__: one
    for one in (
        # VTC's (workloads_vtc.py, workloads_arena.py)
        vtc.overload,
        vtc.proportional,
        vtc.on_off_less,
        vtc.on_off_overload,
        vtc.poisson_short_long,
        vtc.poisson_short_long_2,
        vtc.poisson_on_off_overload,
        vtc.increase,
        vtc.dist_shift,
        vtc.overload_multi,
        vtc.overload_weighted,
        arena,
        # FairServe's, DLPM's, recorded ones
        fairserve,
        shared_prefix,
        tree_of_thought,
        servegen,
        trace,
        composed,
        # one client each, to be mixed (workloads_basic.py)
        basic.even,
        basic.poisson,
        basic.on_off,
        basic.ramp,
        basic.burst,
        basic.idle_then_burst,
        basic.many_tiny,
        basic.abort_after_prefill,
        basic.lying_max_tokens,
        basic.sybil,
    )
}


def make(name: str, rng: random.Random, parameters: Mapping[str, Any]) -> list[Arrival]:
    """The arrivals of workload ``name``; parameters are checked first (see :func:`checked`)."""
    right = checked(name, parameters)
    return WORKLOADS[name](rng, **right)


def checked(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` with their types made right; those that are not given stay away.

    Raises:
        ConfigError: an unknown workload or parameter, naming the known ones.
        pydantic.ValidationError: a wrong value.
    """
    known = parameters_of(name).model_fields
    if unknown := [key for key in parameters if key not in known]:
        raise ConfigError(f"workload {name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    model = parameters_of(name).model_validate(dict(parameters))
    return {key: getattr(model, key) for key in parameters}


@cache
def parameters_of(name: str) -> type[Strict]:
    """The parameters of a workload as a model, made from its signature.

    Raises:
        ConfigError: no such workload.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}; known are {', '.join(WORKLOADS)}")
    hints = get_type_hints(WORKLOADS[name], include_extras=True)
    parameters: dict[str, Any] = {
        key: (hints[key], ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(WORKLOADS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    made: type[Strict] = create_model(name, __base__=Strict, **parameters)
    return made
