"""What a scenario file says of the cluster and of what goes wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fairserve.config import NonNegativeFloat, PositiveInt, Strict
from fairserve.errors import ConfigError
from fairserve.simulate.setup import Fault, FaultKind, Placement, ReplicaSetup
from fairserve.simulate.step_time import COEFFICIENTS, StepTime

EVERYBODY = "*"
"""In ``ingress_skew``: the clients that are not named."""

Share = Annotated[float, Field(ge=0, le=1)]


def _skew(value: Any) -> Any:
    """A number, a list, or a table of either by client: all as a table of lists."""
    table = value if isinstance(value, Mapping) else {EVERYBODY: value}
    return {client: (share,) if isinstance(share, int | float) else share for client, share in table.items()}


def _step_time(value: str | dict[str, float]) -> StepTime:
    """A preset's name, a profile's path ending in .json, or the coefficients themselves, in seconds."""
    if isinstance(value, str):
        return StepTime.named(value)
    if unknown := [name for name in value if name not in COEFFICIENTS]:
        raise ConfigError(f"a step time has no {unknown[0]!r}; it has {', '.join(COEFFICIENTS)}")
    if "base_s" not in value:
        raise ConfigError("a step time needs base_s")
    return StepTime(**{name: float(seconds) for name, seconds in value.items()})  # type: ignore[arg-type] # not origin


def _known_step_time(value: str | dict[str, float]) -> str | dict[str, float]:
    try:
        _step_time(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


StepTimeSource = Annotated[str | dict[str, float], AfterValidator(_known_step_time)]


class ReplicaConfig(Strict):
    """A replica, or ``count`` equal ones. What is not given is as in [cluster]."""

    count: PositiveInt = 1
    kv_tokens: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    block_size: PositiveInt | None = None
    max_model_len: PositiveInt | None = None
    prefix_cache_tokens: Annotated[int, Field(ge=0)] | None = None
    step_time: StepTimeSource | None = None


class ClusterConfig(Strict):
    """The simulated cluster."""

    engine: Literal["fairserve", "paper"] = "fairserve"
    """fairserve: this project's continuous batching. paper: the engine that VTC was measured on, one replica."""
    placement: Placement = "central"
    """central: requests wait at the authority. The others push each one at once to a replica, whose own queue orders
    it: round_robin, least_loaded, d2lpm, longest_prefix."""
    replicas: Annotated[tuple[ReplicaConfig, ...], Field(min_length=1)] = (ReplicaConfig(),)
    """A number of equal replicas, or a list of tables."""
    kv_tokens: PositiveInt = 10_000
    """Tokens that the KV cache of one replica holds."""
    max_num_seqs: PositiveInt = 32
    """Requests that run at the same time on one replica."""
    max_num_batched_tokens: PositiveInt = 512
    """Tokens one step may compute."""
    block_size: PositiveInt = 16
    """Tokens in one KV block."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and output that one request may hold; left out: the whole KV cache."""
    prefix_cache_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of prompts that a replica remembers; 0: none. They take nothing from kv_tokens."""
    step_time: StepTimeSource = "a10g-llama2-7b"
    """A preset of step_time.PRESETS, a .json file of `fairserve profile`, or a table of its coefficients."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Each step's time is multiplied by a factor uniform in [1 - jitter, 1 + jitter]."""
    num_ingress: PositiveInt = 1
    """Doors that requests come in by, each with its own router."""
    ingress_skew: Annotated[dict[str, tuple[Share, ...]], BeforeValidator(_skew)] = Field(default_factory=dict)
    """Share of the arrivals that come in by the first ingress, or a list of shares, one for each of the first few; the
    rest goes evenly to the other ingresses. Or a table of either by client, with "*" for those it does not name."""
    network_delay_s: NonNegativeFloat = 0.0005
    """One way."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a call to the authority, or its reply, is lost."""
    report_every_steps: PositiveInt | None = None
    """Steps between two reports of a replica, at least; left out: whenever there is news and none is in flight."""
    actor_restart_s: NonNegativeFloat = 1.0
    """Seconds that the authority is gone after a crash."""

    @field_validator("replicas", mode="before")
    @classmethod
    def _a_number_of_equal_ones(cls, value: Any) -> Any:
        return ({"count": value},) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _shares_that_add_up(self) -> ClusterConfig:
        for client, shares in self.ingress_skew.items():
            if len(shares) > self.num_ingress:
                raise ValueError(
                    f"ingress_skew of {client} has {len(shares)} shares, but there are {self.num_ingress} ingresses"
                )
            total = sum(shares)
            if total > 1 + 1e-9 or (len(shares) == self.num_ingress and total < 1 - 1e-9):
                raise ValueError(f"ingress_skew of {client} adds up to {total:g}, not to 1")
        return self

    def replica_setups(self) -> tuple[ReplicaSetup, ...]:
        """Every replica, its own values laid over the cluster's."""
        setups = []
        for replica in self.replicas:
            own = {key: value for key, value in replica if value is not None and key != "count"}
            common = {key: getattr(self, key) for key in ReplicaConfig.model_fields if key != "count"}
            values = {**common, **own}
            values["step_time"] = _step_time(values["step_time"])
            setups += [ReplicaSetup(**values)] * replica.count
        return tuple(setups)

    def ingress_shares(self, client: str) -> list[float]:
        """The chance of each ingress for an arrival of ``client``."""
        shares = list(self.ingress_skew.get(client, self.ingress_skew.get(EVERYBODY, ())))
        others = self.num_ingress - len(shares)
        return shares + [max(0.0, 1 - sum(shares)) / others] * others if others else shares


class FaultConfig(Strict):
    """Something goes wrong, or comes right again, during the run."""

    at_s: NonNegativeFloat
    kind: FaultKind
    """replica_crash, replica_return: of a replica. actor_crash: of the authority, which comes back by itself.
    partition, heal: between a replica or an ingress and the authority."""
    replica: Annotated[int, Field(ge=0)] | None = None
    """Which replica, from 0."""
    ingress: Annotated[int, Field(ge=0)] | None = None
    """partition, heal: which ingress, from 0, instead of a replica."""
    with_snapshot: bool = True
    """actor_crash: whether the authority comes back with its newest snapshot or with nothing."""

    @model_validator(mode="after")
    def _one_victim(self) -> FaultConfig:
        if self.kind == "actor_crash":
            if (self.replica, self.ingress) != (None, None):
                raise ValueError("actor_crash has no replica and no ingress")
        elif self.kind in ("partition", "heal"):
            if (self.replica is None) == (self.ingress is None):
                raise ValueError(f"{self.kind} needs either a replica or an ingress")
        elif self.replica is None or self.ingress is not None:
            raise ValueError(f"{self.kind} needs a replica, and no ingress")
        return self

    @property
    def fault(self) -> Fault:
        """As the simulated cluster wants it."""
        target = f"replica-{self.replica}" if self.replica is not None else ""
        target = f"router-{self.ingress}" if self.ingress is not None else target
        return Fault(self.at_s, self.kind, target, self.with_snapshot)
