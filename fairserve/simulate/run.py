"""One scenario, one policy, one seed: a run. The configuration that decides here is the live one."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from pydantic import ValidationError

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
from fairserve.simulate.scenario_cluster import ClusterConfig
from fairserve.simulate.setup import ClusterSetup

ORACLE_NOISE = 0.5
"""Of the noisy oracle: a length n is foretold as anything in [n / 2, 3 n / 2] (arXiv 2401.00588, section 5)."""


_WORD = re.compile(
    r"(?P<policy>\w+)(\((?P<limit>[0-9]+)\))?(\+(?P<prediction>\w+))?(\s*@\s*(?P<placement>\w+))?", re.ASCII
)


def label_of(scenario: Scenario) -> str:
    """How the run's row is called: policy, prediction, and where requests wait when that is not the authority, who
    alone predicts."""
    fairness, cluster = scenario.fairness, scenario.cluster
    label: str = fairness.policy
    if fairness.policy == "rpm":
        label += f"({fairness.rpm_limit})"
    if cluster.placement != "central":
        return f"{label} @ {cluster.placement}"
    return label if fairness.prediction == "none" else f"{label}+{fairness.prediction}"


def with_policy(scenario: Scenario, word: str) -> Scenario:
    """The scenario under another policy: ``vtc``, ``vtc+moving_mean``, ``rpm(20)``, ``vtc@round_robin``. A word without
    a prediction means none; without a placement, the scenario's.

    Raises:
        ConfigError: no such policy, prediction or placement, or one that does not go with the scenario.
    """
    parts = _WORD.fullmatch(word.strip())
    if parts is None:
        raise ConfigError(f"policy {word!r} is not like vtc, vtc+moving_mean, rpm(20) or vtc@round_robin")
    fairness = scenario.fairness.model_dump() | {
        "policy": parts["policy"],
        "prediction": parts["prediction"] or "none",
    }
    if parts["limit"]:
        if parts["policy"] != "rpm":
            raise ConfigError(f"policy {word!r}: only rpm takes a number, its requests a minute, as in rpm(20)")
        fairness["rpm_limit"] = int(parts["limit"])
    cluster = dict(scenario.cluster)
    if parts["placement"]:
        cluster["placement"] = parts["placement"]
    try:
        changed = Scenario.model_validate(
            dict(scenario)
            | {"fairness": FairnessConfig.model_validate(fairness), "cluster": ClusterConfig.model_validate(cluster)}
        )
    except ValidationError as error:
        raise ConfigError(f"policy {word!r}: {mistakes(error)}") from None
    if parts["prediction"] not in (None, "none") and changed.cluster.placement != "central":
        raise ConfigError(f"policy {word!r}: only the authority predicts, with placement central")
    return changed


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
        ConfigError: a workload that cannot be made, a request that no replica could hold, or policy rpm where requests
            do not pass the authority: nobody would be refused.
    """
    if scenario.fairness.policy == "rpm" and scenario.cluster.placement != "central":
        raise ConfigError(
            f"policy rpm refuses at the authority: placement must be central, not {scenario.cluster.placement}"
        )
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
