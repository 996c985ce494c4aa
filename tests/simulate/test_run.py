"""One scenario under one policy with one seed: which policy a word means, and what becomes of the requests."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from fairserve.config import FairnessConfig
from fairserve.errors import ConfigError
from fairserve.simulate.measures import measure
from fairserve.simulate.records import Arrival, RunRecord
from fairserve.simulate.run import label_of, oracle, run, with_policy
from fairserve.simulate.scenario import Scenario, read_scenario
from tests.simulate.cluster_kit import one, outcomes, stream

SMALL = """
duration_s = 20.0
[workload]
kind = "mix"
parts = [
  { kind = "even", client = "greedy", rate = 5.0, num_input = 128, num_output = 20 },
  { kind = "even", client = "modest", rate = 0.7, num_input = 128, num_output = 20 },
]
[cluster]
replicas = 2
max_num_seqs = 4
step_time = { base_s = 0.1, per_prefill_token_s = 0.0001 }
[fairness]
quantum = 700.0
prediction = "none"
"""
"""There is room for 4 requests/s."""
CLIENTS = {"greedy", "modest"}
POLICIES = get_args(FairnessConfig.model_fields["policy"].annotation)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    path = tmp_path_factory.mktemp("scenario") / "small.toml"
    path.write_text(SMALL)
    return read_scenario(path)


def scenario(folder: Path, *overrides: str) -> Scenario:
    path = folder / "small.toml"
    path.write_text(SMALL)
    return read_scenario(path, overrides)


def plain(record: RunRecord) -> RunRecord:
    return replace(record, wall_s=0.0)


def waits(record: RunRecord) -> dict[str, float]:
    """Mean seconds from arrival to grant, by client, of requests that were granted."""
    found: dict[str, list[float]] = {}
    for request in record.requests:
        if request.granted_s is not None:
            found.setdefault(request.arrival.client, []).append(request.granted_s - request.arrival.arrival_s)
    return {client: sum(each) / len(each) for client, each in found.items()}


# ------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_of_the_configuration_serves_and_charges_to_the_token(small: Scenario, policy: str) -> None:
    record = run(with_policy(small, policy), check=True)
    assert record.policy == ("rpm(60)" if policy == "rpm" else policy)
    assert outcomes(record)["finished"] > 30
    assert {request.arrival.client for request in record.requests if request.outcome == "finished"} == CLIENTS


@pytest.mark.parametrize(
    "word",
    [
        *("vtc", "fcfs", "rpm(20)", "vtc+moving_mean", "wsc+foretold", "rpm(5)+moving_mean"),
        *("vtc @ round_robin", "fcfs @ least_loaded", "dlpm @ d2lpm"),
    ],
)
def test_a_label_is_a_word_that_means_the_same_policy(small: Scenario, word: str) -> None:
    changed = with_policy(small, word)
    assert label_of(changed) == word
    assert with_policy(changed, label_of(changed)) == changed
    assert with_policy(small, word.replace(" ", "")) == changed


def test_a_word_changes_the_policy_and_nothing_else(small: Scenario) -> None:
    changed = with_policy(small, "rpm(7)+moving_mean@central")
    fairness = small.fairness.model_copy(update={"policy": "rpm", "rpm_limit": 7, "prediction": "moving_mean"})
    assert changed == small.model_copy(update={"fairness": fairness})
    assert changed.fairness.quantum == 700.0


def test_a_word_without_a_prediction_means_none_and_without_a_placement_the_scenarios(tmp_path: Path) -> None:
    base = scenario(tmp_path, "fairness.prediction=moving_mean", "cluster.placement=least_loaded")
    changed = with_policy(base, "vtc")
    assert (changed.fairness.prediction, changed.cluster.placement) == ("none", "least_loaded")
    assert with_policy(base, "rpm").fairness.rpm_limit == base.fairness.rpm_limit


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("best", "policy: Input should be 'vtc', 'wsc'"),
        ("vtc+magic", "prediction: Input should be 'none', 'moving_mean' or 'foretold'"),
        ("vtc@nowhere", "placement: Input should be 'central', 'round_robin'"),
        ("rpm(0)", "rpm_limit: Input should be greater than 0"),
        ("vtc(3)", "only rpm takes a number"),
        ("vtc+moving_mean@round_robin", "only the authority predicts"),
        *((word, "is not like vtc, vtc[+]moving_mean") for word in ("", "rpm(", "rpm()", "rpm(20", "rpm(x)", "rpm(²)")),
        *((word, "is not like") for word in ("vtc)", "vtc+", "vtc@", "@central", "vtc@central+moving_mean", "v t c")),
    ],
)
def test_a_wrong_word_is_refused_with_what_would_be_right(small: Scenario, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)policy .*{message}"):
        with_policy(small, word)


@pytest.mark.parametrize(("name", "message"), [("overload", "engine paper is one replica"), ("crash", "no authority")])
def test_a_placement_that_does_not_go_with_the_scenario_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"vtc@round_robin.*{message}"):
        with_policy(read_scenario(name), "vtc@round_robin")


def test_rpm_is_refused_where_nobody_would_enforce_it(small: Scenario) -> None:
    with pytest.raises(ConfigError, match="placement must be central, not round_robin"):
        run(with_policy(small, "rpm(5)@round_robin"))


# --------------------------------------------------------------------------------------------------------------- runs
def test_the_record_says_which_scenario_policy_and_seed_it_is_of(small: Scenario) -> None:
    record = run(small, 7, label="mine")
    assert (record.scenario, record.policy, record.seed, record.duration_s) == ("small", "mine", 7, 20.0)
    assert run(small).seed == small.seed


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small: Scenario) -> None:
    first, again, other = (run(small, seed) for seed in (1, 1, 2))
    assert plain(first) == plain(again)
    assert first.requests != other.requests


def test_the_modest_client_waits_less_under_vtc_than_under_fcfs(small: Scenario) -> None:
    vtc, fcfs = (waits(run(with_policy(small, word))) for word in ("vtc", "fcfs"))
    assert vtc["modest"] < fcfs["modest"] / 5
    assert vtc["greedy"] > fcfs["greedy"]


def test_rpm_accepts_its_number_of_each_client_and_refuses_the_rest(small: Scenario) -> None:
    record = run(with_policy(small, "rpm(9)"))
    refused = [request for request in record.requests if request.outcome == "refused"]
    assert {request.reason for request in refused} == {"rate_limited"}
    assert {client.client: client.num_requests - client.num_refused for client in measure(record).clients} == {
        "greedy": 9,
        "modest": 9,
    }


@pytest.mark.parametrize("placement", ["round_robin", "least_loaded", "d2lpm"])
def test_requests_may_go_straight_to_a_replica(small: Scenario, placement: str) -> None:
    record = run(with_policy(small, f"vtc@{placement}"), check=True)
    assert record.policy == f"vtc @ {placement}"
    assert outcomes(record)["finished"] > 30
    assert all(request.granted_s == request.arrival.arrival_s for request in record.requests)


def test_limits_of_the_live_configuration_hold_in_a_run(tmp_path: Path) -> None:
    record = run(scenario(tmp_path, "dispatch.max_waiting_per_client=4"))
    assert {request.reason for request in record.requests if request.outcome == "refused"} == {"client_queue_full"}
    assert outcomes(record)["refused"] > 20


def test_given_arrivals_stand_in_for_the_workload(small: Scenario) -> None:
    given = [*stream("ann", 3, 0.1), one("late", "bob", 19.9)]
    record = run(small, arrivals=given)
    assert [request.arrival for request in record.requests] == given


def test_a_request_that_no_replica_could_hold_is_named(small: Scenario) -> None:
    with pytest.raises(ConfigError, match="request big has 10000 input"):
        run(small, arrivals=[one("big", num_input=10_000)])


@pytest.mark.parametrize(
    ("override", "has_throttled"), [("fairness.throttle.client_limit=5", True), ("fairness.policy=vtc", False)]
)
def test_interactions_are_throttled_as_live(tmp_path: Path, override: str, has_throttled: bool) -> None:
    flood = [one(f"r{i}", "ann", i * 0.1, num_output=60, max_output=60, interaction=f"task-{i}") for i in range(150)]
    record = run(scenario(tmp_path, override), arrivals=flood)
    assert ("interaction_throttled" in {request.reason for request in record.requests}) == has_throttled


# --------------------------------------------------------------------------------------------------- the paper's engine
def test_the_papers_engine_runs_a_scenario_to_its_last_request() -> None:
    scenario = read_scenario("overload", ["workload.duration_s=40", "duration_s=60"])
    record = run(with_policy(scenario, "vtc"), check=True)
    assert (record.scenario, record.policy, record.duration_s) == ("overload", "vtc", 60.0)
    assert outcomes(record) == {"finished": len(scenario.arrivals())}
    assert {request.replica for request in record.requests} == {"a10g"}


def test_the_papers_engine_has_the_memory_and_the_steps_of_the_scenario() -> None:
    words = ["workload.duration_s=30", "duration_s=60"]
    normal, small, slow = (
        run(read_scenario("overload", [*words, *more]))
        for more in ([], ["cluster.kv_tokens=3_000"], ["cluster.step_time={base_s: 0.2}"])
    )
    ends = [max(request.finished_s or 0.0 for request in record.requests) for record in (normal, small, slow)]
    assert ends[1] > 1.2 * ends[0] and ends[2] > 1.2 * ends[0]


def test_the_papers_engine_refuses_what_it_does_not_know() -> None:
    scenario = read_scenario("overload")
    with pytest.raises(ConfigError, match="part of an interaction"):
        run(scenario, arrivals=[one(interaction="task")])
    with pytest.raises(ConfigError, match="is cancelled"):
        run(scenario, arrivals=[one(cancel_after=3)])


# ------------------------------------------------------------------------------------------------------------- oracle
def requests_of(num: int) -> list[Arrival]:
    rng = random.Random(5)
    return [one(f"r{i}", num_output=rng.randint(1, 400), max_output=300) for i in range(num)]


def test_an_oracle_without_noise_knows_where_each_answer_ends() -> None:
    foretell = oracle(0.0, 3)
    assert all(foretell(each) == min(each.num_output, 300) for each in requests_of(50))


def test_a_noisy_oracle_is_off_by_at_most_its_noise_and_on_both_sides() -> None:
    foretell = oracle(0.5, 3)
    found = [(foretell(each) or 0) / each.length for each in requests_of(500) if each.length > 50]
    assert 0.48 < min(found) < 0.6 and 1.4 < max(found) < 1.52
    assert 0.95 < sum(found) / len(found) < 1.05


def test_what_a_noisy_oracle_says_of_a_request_depends_on_the_seed_and_not_on_the_order() -> None:
    given = requests_of(50)
    said = {each.request_id: oracle(0.5, 3)(each) for each in given}
    assert said == {each.request_id: oracle(0.5, 3)(each) for each in reversed(given)}
    assert said != {each.request_id: oracle(0.5, 4)(each) for each in given}


@pytest.mark.parametrize("engine", ["fairserve", "paper"])
def test_noise_reaches_whoever_believes_the_oracle_and_nobody_else(small: Scenario, engine: str) -> None:
    base = small
    if engine == "paper":
        base = read_scenario("overload", ["workload.duration_s=30", "duration_s=40"])

    def granted(**more: Any) -> list[float | None]:
        chosen = with_policy(base, more.pop("word", "vtc"))
        return [request.granted_s for request in run(chosen, **more).requests]

    assert granted() == granted(noise=0.9)
    exact, noisy = granted(word="vtc+foretold"), granted(word="vtc+foretold", noise=0.9)
    assert exact != granted()
    assert exact != noisy
