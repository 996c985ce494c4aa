"""Small simulated clusters: a step time that can be reckoned by hand, and requests with few words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fairserve.assembly import make_cost, make_dispatcher, make_local_book, policy_of
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.simulate.cluster import ClusterSetup, ReplicaSetup
from fairserve.simulate.records import Arrival, RunRecord


@dataclass(frozen=True)
class Plain:
    """A step takes 20 ms, and 0.1 ms more for each prompt token."""

    base_s: float = 0.02
    per_prefill_token_s: float = 0.0001

    def seconds(
        self,
        num_decodes: int,
        decode_context_tokens: int,
        num_prefill_tokens: int,
        prefill_context_tokens: int = 0,
    ) -> float:
        return self.base_s + self.per_prefill_token_s * num_prefill_tokens


REPLICA = ReplicaSetup(Plain(), kv_tokens=1_600, max_num_seqs=4, max_num_batched_tokens=128)


def cluster(
    policy: str = "vtc",
    *,
    num_replicas: int = 1,
    replica: ReplicaSetup = REPLICA,
    fairness: dict[str, Any] | None = None,
    dispatch: dict[str, Any] | None = None,
    **more: Any,
) -> ClusterSetup:
    """Of equal replicas; all of max_output reserved unless ``dispatch`` says otherwise."""
    one = FairnessConfig.model_validate({"policy": policy, "prediction": "none", **(fairness or {})})
    two = DispatchConfig.model_validate({"reserve_output_tokens": None, **(dispatch or {})})
    setup = ClusterSetup(
        replicas=(replica,) * num_replicas,
        make_policy=lambda: policy_of(one),
        make_dispatcher=lambda epoch: make_dispatcher(one, two, epoch=epoch),
        make_book=lambda: make_local_book(one),
        cost=make_cost(one.cost),
        group_weights=one.group_weights,
        duration_s=100.0,
    )
    return replace(setup, **more)


def one(request_id: str = "r", client: str = "ann", at_s: float = 0.0, **more: Any) -> Arrival:
    """40 tokens in, 20 out."""
    numbers = {"num_input": 40, "num_output": 20, "max_output": 20} | more
    return Arrival(request_id, at_s, client, **numbers)


def stream(client: str, num: int, every_s: float, **more: Any) -> list[Arrival]:
    """One client's equal requests, evenly spaced from 0 on."""
    return [one(f"{client}-{i}", client, i * every_s, **more) for i in range(num)]


def crowd(seed: int, num: int = 150, per_s: float = 20.0, cancels: float = 0.2) -> list[Arrival]:
    """Requests of three clients, of all lengths, some of them cancelled: at once, or after a few tokens."""
    rng = random.Random(seed)
    arrivals, at_s = [], 0.0
    for i in range(num):
        at_s += rng.expovariate(per_s)
        num_output = rng.randint(1, 40)
        cancel_after = rng.choice([0, 1, 5]) if rng.random() < cancels else None
        max_output = num_output + rng.randint(0, 10)
        numbers = {"num_input": rng.randint(1, 200), "num_output": num_output, "max_output": max_output}
        arrivals.append(one(f"r{i}", rng.choice(["ann", "bob", "cyd"]), at_s, cancel_after=cancel_after, **numbers))
    return arrivals


def outcomes(record: RunRecord) -> dict[str, int]:
    """How many requests ended how."""
    counts: dict[str, int] = {}
    for request in record.requests:
        counts[request.outcome] = counts.get(request.outcome, 0) + 1
    return counts


def served(record: RunRecord, until_s: float) -> dict[str, float]:
    """Service / weight delivered to each client by then."""
    return max((sample for sample in record.service if sample[0] <= until_s), key=lambda sample: sample[0])[1]


def at_ingress(arrivals: Iterable[Arrival], choose: Callable[[Arrival], int]) -> list[Arrival]:
    return [replace(arrival, ingress=choose(arrival)) for arrival in arrivals]
