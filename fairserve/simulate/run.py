"""One scenario, one policy, one seed: a run. The configuration that decides here is the live one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pydantic import TypeAdapter, ValidationError

from fairserve.assembly import make_cost, make_dispatcher, make_local_book, policy_of
from fairserve.config import FairnessConfig
from fairserve.dispatch.capacity import Capacity
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.errors import ConfigError
from fairserve.overrides import mistakes
from fairserve.simulate.cluster import simulate
from fairserve.simulate.paper_engine import simulate_paper
from fairserve.simulate.records import PREFIX_BLOCK, Arrival, RunRecord
from fairserve.simulate.scenario import Scenario
from fairserve.simulate.setup import ClusterSetup, Placement

ORACLE_NOISE = 0.5
"""Of the noisy oracle: a length n is foretold as anything in [n / 2, 3 n / 2] (arXiv 2401.00588, section 5)."""


def label_of(scenario: Scenario) -> str:
    """How the run's row is called: policy, prediction, and where requests wait when that is not the authority."""
    fairness, cluster = scenario.fairness, scenario.cluster
    label: str = fairness.policy
    if fairness.policy == "rpm":
        label += f"({fairness.rpm_limit})"
    if fairness.prediction != "none":
        label += f"+{fairness.prediction}"
    return label if cluster.placement == "central" else f"{label} @ {cluster.placement}"


def with_policy(scenario: Scenario, word: str) -> Scenario:
    """The scenario under another policy: ``vtc``, ``vtc+moving_mean``, ``rpm(20)``, ``vtc@round_robin``.

    Raises:
        ConfigError: no such policy, prediction or placement.
    """
    name, _, placement = word.partition("@")
    name, _, prediction = name.strip().partition("+")
    name, _, limit = name.rstrip(")").partition("(")
    fairness = scenario.fairness.model_dump() | {"policy": name, "prediction": prediction or "none"}
    if limit:
        if name != "rpm" or not limit.isdigit():
            raise ConfigError(f"{word!r}: only rpm takes a number, its requests a minute, as in rpm(20)")
        fairness["rpm_limit"] = int(limit)
    cluster = scenario.cluster
    try:
        changed = FairnessConfig.model_validate(fairness)
        if placement:
            cluster = cluster.model_copy(
                update={"placement": TypeAdapter(Placement).validate_python(placement.strip())}
            )
    except ValidationError as error:
        raise ConfigError(f"policy {word!r}: {mistakes(error)}") from None
    return scenario.model_copy(update={"fairness": changed, "cluster": cluster})


def oracle(noise: float, seed: int) -> Callable[[Arrival], int | None]:
    """Foretells every length, off by at most ``noise`` of it."""
    if not noise:
        return lambda arrival: arrival.length
    # From the request's own name, so that it does not matter in which order the requests are asked for.
    return lambda arrival: round(
        arrival.length * (1 + noise * random.Random(f"{seed} {arrival.request_id}").uniform(-1, 1))
    )


def run(
    scenario: Scenario,
    seed: int | None = None,
    *,
    arrivals: Sequence[Arrival] | None = None,
    noise: float = 0.0,
    label: str | None = None,
    check: bool = False,
) -> RunRecord:
    """Simulate. ``arrivals`` replaces the scenario's workload; ``noise`` is that of prediction ``foretold``.

    Raises:
        ConfigError: a workload that cannot be made, or a request that no replica could hold.
    """
    seed = scenario.seed if seed is None else seed
    requests = list(scenario.arrivals(seed) if arrivals is None else arrivals)
    foretell = oracle(noise, seed) if scenario.fairness.prediction == "foretold" else None
    runner = _run_paper if scenario.cluster.engine == "paper" else _run_cluster
    record = runner(scenario, seed, requests, foretell, check)
    record.scenario, record.policy = scenario.name, label_of(scenario) if label is None else label
    return record


def _run_paper(
    scenario: Scenario,
    seed: int,
    arrivals: Sequence[Arrival],
    foretell: Callable[[Arrival], int | None] | None,
    check: bool,
) -> RunRecord:
    replica = scenario.cluster.replica_setups()[0]

    def dispatcher(capacity: Capacity) -> Dispatcher:
        return make_dispatcher(scenario.fairness, scenario.dispatch, epoch=1, capacity=capacity)

    return simulate_paper(
        arrivals,
        dispatcher,
        kv_tokens=replica.kv_tokens,
        step_time=replica.step_time,
        jitter=scenario.cluster.jitter,
        seed=seed,
        duration_s=scenario.duration_s,
        foretell=foretell or (lambda arrival: None),
        tracks_outputs=scenario.fairness.prediction != "none",
    )


def _run_cluster(
    scenario: Scenario,
    seed: int,
    arrivals: Sequence[Arrival],
    foretell: Callable[[Arrival], int | None] | None,
    check: bool,
) -> RunRecord:
    fairness, cluster = scenario.fairness, scenario.cluster
    dispatch = scenario.dispatch.model_copy(update={"prefix_block_tokens": PREFIX_BLOCK})
    setup = ClusterSetup(
        replicas=cluster.replica_setups(),
        make_policy=lambda: policy_of(fairness),
        make_dispatcher=lambda epoch: make_dispatcher(fairness, dispatch, epoch=epoch),
        make_book=lambda: make_local_book(fairness),
        cost=make_cost(fairness.cost),
        group_weights=fairness.group_weights,
        foretell=foretell,
        scenario=scenario.name,
        seed=seed,
        duration_s=scenario.duration_s,
        placement=cluster.placement,
        replica_quantum=fairness.replica_quantum,
        num_ingress=cluster.num_ingress,
        preempt_gap=scenario.dispatch.preempt_gap,
        network_delay_s=cluster.network_delay_s,
        loss=cluster.loss,
        report_every_steps=cluster.report_every_steps,
        jitter=cluster.jitter,
        actor_restart_s=cluster.actor_restart_s,
        faults=tuple(fault.fault for fault in scenario.faults),
    )
    return simulate(setup, arrivals, check=check)
