"""A scenario: a workload, a cluster and a policy in a small TOML file. ``BUILTIN`` names the packaged ones.

scenario = read_scenario("overload", ["fairness.policy=fcfs", "cluster.replicas=2"])
arrivals = scenario.arrivals()
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from fairserve.config import DispatchConfig, FairnessConfig, PositiveFloat, Strict
from fairserve.errors import ConfigError
from fairserve.overrides import lay_over, mistakes
from fairserve.simulate import workloads
from fairserve.simulate.records import Arrival
from fairserve.simulate.scenario_cluster import ClusterConfig, FaultConfig
from fairserve.simulate.workloads_basic import merge

_PACKAGED = resources.files("fairserve.simulate") / "scenarios"
BUILTIN = tuple(
    sorted(entry.name.removesuffix(".toml") for entry in _PACKAGED.iterdir() if entry.name.endswith(".toml"))
)

MIX = "mix"
"""The kind of workload that is made of others."""


class WorkloadConfig(Strict):
    """``kind`` is a name in ``workloads.WORKLOADS``, and the other keys are that workload's parameters; or it is mix,
    and ``parts`` is a list of such tables."""

    kind: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    parts: tuple[WorkloadConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, data: Any) -> Any:
        if isinstance(data, WorkloadConfig):
            return data
        if not isinstance(data, dict) or "kind" not in data:
            raise ValueError(f"a workload needs a kind; known are {MIX}, {', '.join(workloads.WORKLOADS)}")
        rest = {key: value for key, value in data.items() if key != "kind"}
        if data["kind"] != MIX:
            return {"kind": data["kind"], "parameters": rest}
        if list(rest) != ["parts"] or not rest["parts"]:
            raise ValueError(f"a {MIX} is made of its parts, a list of workloads, and has no other parameters")
        return data

    @model_validator(mode="after")
    def _known_parameters(self) -> WorkloadConfig:
        if self.kind != MIX:
            try:
                workloads.checked(self.kind, self.parameters)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            except ValidationError as error:
                raise ValueError(mistakes(error)) from None
        return self

    def arrivals(self, seed: str, duration_s: float) -> list[Arrival]:
        """The requests. A workload that has a ``duration_s`` or ``end_s`` of its own, and is not told it, gets
        ``duration_s``. Each part of a mix has its own chance: a part more changes nothing for the others."""
        if self.kind == MIX:
            return merge(*(part.arrivals(f"{seed}.{num}", duration_s) for num, part in enumerate(self.parts)))
        known = workloads.parameters_of(self.kind).model_fields
        ends: dict[str, Any] = {key: duration_s for key in ("duration_s", "end_s") if key in known}
        return workloads.make(self.kind, random.Random(seed), {**ends, **self.parameters})


class Scenario(Strict):
    """What is simulated."""

    name: str = ""
    """Left out: the file's."""
    about: str = ""
    """One sentence for lists."""
    seed: int = 42
    duration_s: PositiveFloat
    """Length of the run; requests that arrive later take no part. Also the length of a workload that states none."""
    workload: WorkloadConfig
    cluster: ClusterConfig = ClusterConfig()
    faults: tuple[FaultConfig, ...] = ()
    fairness: FairnessConfig = FairnessConfig()
    """The live configuration, as in `fairserve config`."""
    dispatch: DispatchConfig = DispatchConfig()
    """The live configuration."""

    @model_validator(mode="after")
    def _fits_together(self) -> Scenario:
        num_replicas = sum(replica.count for replica in self.cluster.replicas)
        for num, fault in enumerate(self.faults):
            for what, index, total in (
                ("replica", fault.replica, num_replicas),
                ("ingress", fault.ingress, self.cluster.num_ingress),
            ):
                if index is not None and index >= total:
                    raise ValueError(f"faults.{num}: no {what} {index}, there are {total}, numbered from 0")
            if self.cluster.placement != "central" and not fault.kind.startswith("replica_"):
                raise ValueError(f"faults.{num}: placement {self.cluster.placement} has no authority for {fault.kind}")
        if self.cluster.engine == "paper":
            allowed = {"replicas": num_replicas == 1, "num_ingress": self.cluster.num_ingress == 1}
            allowed |= {"placement": self.cluster.placement == "central", "faults": not self.faults}
            if wrong := [key for key, is_right in allowed.items() if not is_right]:
                raise ValueError(
                    f"engine paper is one replica behind one ingress, placement central, no faults; wrong: {wrong[0]}"
                )
        return self

    def arrivals(self, seed: int | None = None) -> list[Arrival]:
        """The requests, each at its ingress, for this seed (None: the scenario's own).

        Raises:
            ConfigError: a trace that cannot be read.
        """
        seed = self.seed if seed is None else seed
        arrivals = self.workload.arrivals(f"{seed} workload", self.duration_s)
        if self.cluster.num_ingress == 1:
            return arrivals
        rng, doors = random.Random(f"{seed} ingress"), range(self.cluster.num_ingress)
        shares = {client: self.cluster.ingress_shares(client) for client in {one.client for one in arrivals}}
        return [
            one if one.ingress is not None else replace(one, ingress=rng.choices(doors, shares[one.client])[0])
            for one in arrivals
        ]


def read_scenario(source: Path | str, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario of a packaged name or of a TOML file, with ``dotted.key=value`` words laid over it.

    Files that a scenario names (traces, step times) are looked for from its own folder; those that an override names,
    from the working directory.

    Raises:
        ConfigError: no such scenario, not TOML, an unknown or wrong setting; each is named.
    """
    name = str(source)
    if name in BUILTIN:
        text, folder = (_PACKAGED / f"{name}.toml").read_text(encoding="utf-8"), None
    elif name.endswith(".toml"):
        try:
            text, folder = Path(source).read_text(encoding="utf-8"), Path(source).parent
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from error
    else:
        raise ConfigError(f"unknown scenario {name!r}: give the path of a .toml file, or one of {', '.join(BUILTIN)}")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    data.setdefault("name", Path(name).name.removesuffix(".toml"))
    if folder is not None:
        _look_from(folder, data)
    for word in overrides:
        lay_over(data, word)
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {mistakes(error)}") from None


def _look_from(folder: Path, data: Any) -> None:
    """Make the paths in a scenario relative to its folder."""
    if isinstance(data, list):
        for entry in data:
            _look_from(folder, entry)
    elif isinstance(data, dict):
        for key, value in data.items():
            is_path = isinstance(value, str) and (
                key in ("file", "sessions_file") or (key == "step_time" and value.endswith(".json"))
            )
            if is_path and value:
                data[key] = str(folder / value)
            else:
                _look_from(folder, value)
