"""What a simulated cluster is made of. Plain values and factories; ``cluster.py`` runs it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from fairserve.config import CounterConfig
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest
from fairserve.errors import ConfigError
from fairserve.fairness.cost import CostFunction, WeightedTokens
from fairserve.fairness.policy import Policy
from fairserve.simulate.records import Arrival

Placement = Literal["central", "round_robin", "least_loaded", "d2lpm", "longest_prefix"]
"""central: fairserve, requests wait at the authority. The others push each request at once to a replica, whose own
queue orders it by its own counters; nobody shares anything. round_robin: each ingress in turn. least_loaded: fewest
requests. d2lpm: longest cached prefix, with a deficit per client and replica (arXiv 2501.14312, algorithm 2).
longest_prefix: where most of the prompt was sent before, if that is at least half of it, else fewest requests: what
routers that look at prefixes alone do, SGLang's among them."""

FaultKind = Literal["replica_crash", "replica_return", "actor_crash", "partition", "heal"]


class StepSeconds(Protocol):
    """What ``step_time.StepTime`` is to the cluster."""

    def seconds(
        self,
        num_decodes: int,
        decode_context_tokens: int,
        num_prefill_tokens: int,
        prefill_context_tokens: int = 0,
    ) -> float: ...


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """One replica. Numbers as in ``EngineConfig``."""

    step_time: StepSeconds
    kv_tokens: int = 10_000
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 16
    max_model_len: int | None = None
    """None: all of the KV cache."""
    prefix_cache_tokens: int = 0
    """0: no prefix cache. It takes nothing from ``kv_tokens``."""

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a replica's {name} must be at least 1, not {getattr(self, name)}")
        if self.kv_tokens < self.block_size:
            raise ConfigError(f"kv_tokens ({self.kv_tokens}) hold no block of {self.block_size} tokens")
        if self.prefix_cache_tokens < 0:
            raise ConfigError(f"prefix_cache_tokens must be at least 0, not {self.prefix_cache_tokens}")

    @property
    def model_len(self) -> int:
        """Tokens of prompt and output that one request may hold."""
        capacity = self.kv_tokens // self.block_size * self.block_size
        return capacity if self.max_model_len is None else min(capacity, self.max_model_len)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong, or comes right again, at ``at_s``.

    replica_crash: what runs there is lost; what has not started is sent anew by its caller. replica_return: it is back,
    empty. actor_crash: the authority is gone for ``actor_restart_s``. partition, heal: between one replica or router
    and the authority.
    """

    at_s: float
    kind: FaultKind
    target: str = ""
    """``replica-0``, ``router-1``; nothing for actor_crash."""
    with_snapshot: bool = True
    """actor_crash only: it comes back with its newest snapshot, or with nothing."""


@dataclass(frozen=True, slots=True)
class ClusterSetup:
    """A cluster and its surroundings. With the same arrivals, equal setups give equal runs."""

    replicas: tuple[ReplicaSetup, ...]
    make_policy: Callable[[], Policy]
    make_dispatcher: Callable[[int], Dispatcher] | None = None
    """By epoch: called again after each crash of the authority. Needed for placement central only."""
    make_book: Callable[[], LocalBook[GenerateRequest]] | None = None
    """A replica's local queue; None: ``LocalBook(make_policy(), cost)``."""
    cost: CostFunction = field(default_factory=WeightedTokens)
    group_weights: Mapping[str, float] = field(default_factory=dict)
    """Of the organisations that clients' paths begin with; 1 for one that is not named."""
    foretell: Callable[[Arrival], int | None] | None = None
    """``Submit.predicted_output`` of a request."""

    scenario: str = ""
    seed: int = 0
    duration_s: float = 600.0
    """Arrivals at or after it do not take part; what is not finished by then stays unfinished."""

    placement: Placement = "central"
    replica_quantum: float = 2_000.0
    """Placement d2lpm: Q_w, service / weight."""
    num_ingress: int = 1
    choose_ingress: Callable[[Arrival, random.Random], int] | None = None
    """For arrivals that do not say; None: any, evenly."""
    preempt_gap: float | None = None
    """See ``Batcher``. With placement central the dispatcher's limits say it."""

    network_delay_s: float = 0.0005
    """One way: router or replica to the authority, router to replica."""
    loss: float = 0.0
    """Chance that a call to the authority, or its reply, is lost."""
    report_every_steps: int | None = None
    """None: a report whenever there is news and none is in flight, as live. A number: after so many steps at the
    earliest, and when the replica has nothing to do."""
    jitter: float = 0.0
    """Each step's time is multiplied by a factor uniform in [1 - jitter, 1 + jitter]."""
    counter: CounterConfig = field(default_factory=CounterConfig)
    """Times of the protocol: call_timeout_s, poll_s, heartbeat_s, snapshot_s."""
    actor_restart_s: float = 1.0
    faults: Sequence[Fault] = ()

    max_watched: int = 64
    """Clients at a time whose gap is watched for ``RunRecord.worst_gap``."""
    sample_s: float = 1.0
    """Between samples of ``RunRecord.service``."""

    def __post_init__(self) -> None:
        if not self.replicas or self.num_ingress < 1:
            raise ConfigError(f"a cluster needs replicas and ingresses: {len(self.replicas)} and {self.num_ingress}")
        if self.placement not in get_args(Placement):
            raise ConfigError(f"unknown placement {self.placement!r}: known are {', '.join(get_args(Placement))}")
        if self.placement == "central" and self.make_dispatcher is None:
            raise ConfigError("placement central needs make_dispatcher")
        for name in ("duration_s", "sample_s", "replica_quantum"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name, below in (("loss", 1.0), ("jitter", 1.0), ("actor_restart_s", math.inf)):
            if not 0 <= getattr(self, name) < below:
                raise ConfigError(f"{name} must lie in [0, {below:g}), not {getattr(self, name)}")
        slack_s = self.counter.call_timeout_s - self.counter.poll_s
        if not 0 <= 2 * self.network_delay_s < slack_s:
            raise ConfigError(
                f"network_delay_s must lie in [0, {slack_s / 2:g}), not {self.network_delay_s}: there and back is to "
                "fit between poll_s and call_timeout_s"
            )
        if self.report_every_steps is not None and self.report_every_steps < 1:
            raise ConfigError(f"report_every_steps must be at least 1 or None, not {self.report_every_steps}")
        self._check_faults()

    def _check_faults(self) -> None:
        replicas = {f"replica-{i}" for i in range(len(self.replicas))}
        routers = {f"router-{i}" for i in range(self.num_ingress)}
        for fault in self.faults:
            if fault.kind not in get_args(FaultKind):
                raise ConfigError(f"unknown fault {fault.kind!r}: known are {', '.join(get_args(FaultKind))}")
            if not 0 <= fault.at_s < math.inf:
                raise ConfigError(f"a fault's at_s must be a number of seconds >= 0, not {fault.at_s}")
            known = replicas | routers if fault.kind in ("partition", "heal") else replicas
            if fault.kind == "actor_crash":
                known = {""}
            if fault.target not in known:
                names = ", ".join(sorted(known)) if known != {""} else "nothing"
                raise ConfigError(f"fault {fault.kind} cannot have the target {fault.target!r}: known are {names}")
            if self.placement != "central" and fault.kind in ("actor_crash", "partition", "heal"):
                raise ConfigError(f"placement {self.placement} has no authority for fault {fault.kind}")
