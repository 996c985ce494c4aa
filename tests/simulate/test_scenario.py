"""Scenario files: what they may say, what is refused and how, and what becomes of them."""

from __future__ import annotations

import pickle
import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.errors import ConfigError
from fairserve.overrides import lay_over
from fairserve.simulate.scenario import BUILTIN, Scenario, read_scenario
from fairserve.simulate.setup import Fault
from fairserve.simulate.step_time import PRESETS
from fairserve.simulate.traces import write_trace
from fairserve.simulate.workloads import make

ROOT = Path(__file__).parents[2]
SMALL = 'duration_s = 30.0\n[workload]\nkind = "even"\nrate = 2.0\n'


def scenario(folder: Path, text: str = SMALL, *overrides: str) -> Scenario:
    path = folder / "small.toml"
    path.write_text(text)
    return read_scenario(path, overrides)


# ------------------------------------------------------------------------------------------------------ the packaged
@pytest.mark.parametrize("name", BUILTIN)
def test_every_packaged_scenario_reads_explains_itself_and_has_arrivals_inside_its_time(name: str) -> None:
    packaged = read_scenario(name)
    assert packaged.name == name and packaged.about and packaged.seed == 42
    arrivals = packaged.arrivals()
    assert len(arrivals) > 500
    assert arrivals[-1].arrival_s > 0.9 * packaged.duration_s
    largest = min(replica.model_len for replica in packaged.cluster.replica_setups())
    assert max(one.num_input + one.max_output for one in arrivals) <= largest
    assert arrivals == packaged.arrivals(seed=42)


def test_these_scenarios_are_packaged() -> None:
    assert set(BUILTIN) == {
        *("overload", "arena", "on_off_less", "dist_shift", "poisson_short_long"),
        *("fairserve", "shared_prefix", "cluster_skew", "crash"),
    }
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    assert "*.toml" in patterns


def test_a_scenario_survives_the_way_to_another_process() -> None:
    packaged = read_scenario("crash")
    assert pickle.loads(pickle.dumps(packaged)) == packaged


def test_the_papers_scenarios_run_on_the_papers_engine_with_the_papers_memory() -> None:
    for name in ("overload", "arena", "on_off_less", "dist_shift", "poisson_short_long"):
        cluster = read_scenario(name).cluster
        (replica,) = cluster.replica_setups()
        assert (cluster.engine, replica.kv_tokens) == ("paper", 10_000)
        assert replica.step_time == PRESETS["a10g-slora-llama2-7b"]


# ----------------------------------------------------------------------------------------------------------- reading
def test_the_least_a_scenario_says_is_how_long_and_which_workload(folder: Path) -> None:
    small = scenario(folder)
    assert (small.name, small.seed, small.fairness, small.dispatch) == ("small", 42, FairnessConfig(), DispatchConfig())
    assert len(small.cluster.replica_setups()) == 1
    assert len(small.arrivals()) == 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_the_live_settings_are_taken_as_they_are(folder: Path) -> None:
    text = SMALL + '[fairness]\npolicy = "fcfs"\n[fairness.cost]\noutput_weight = 3.0\n[dispatch]\nlookahead = 4\n'
    small = scenario(folder, text)
    assert (small.fairness.policy, small.fairness.cost.output_weight, small.dispatch.lookahead) == ("fcfs", 3.0, 4)


def test_overrides_lie_over_the_file(folder: Path) -> None:
    small = scenario(
        folder,
        SMALL + "[[faults]]\nat_s = 3\nkind = 'actor_crash'\n",
        *("seed=7", "workload.rate=4", "fairness.policy=lcf", "cluster.replicas=3", "cluster.num_ingress=2"),
        *("faults.0.at_s=9", "dispatch.reserve_output_tokens=null", "cluster.ingress_skew=[0.9, 0.1]"),
    )
    assert (small.seed, small.fairness.policy, len(small.cluster.replica_setups())) == (7, "lcf", 3)
    assert (small.faults[0].at_s, small.dispatch.reserve_output_tokens) == (9, None)
    assert small.cluster.ingress_shares("anybody") == [0.9, 0.1]
    assert len(small.arrivals()) == 120


@pytest.mark.parametrize("word", ["faults.1.at_s=3", "faults.x.at_s=3", "faults.-1.at_s=3"])
def test_an_override_of_no_entry_says_how_many_there_are(word: str) -> None:
    with pytest.raises(ConfigError, match="names no entry of a list of 1, numbered from 0"):
        lay_over({"faults": [{}]}, word)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("seed", "'seed' is not key=value"),
        ("duration_s.x=1", "duration_s holds a value, not a group"),
        ("sede=1", "Scenario has no field 'sede': did you mean 'seed'?"),
        ("duration_s=0", "duration_s: Input should be greater than 0"),
        ("workload.kind=evn", "workload: unknown workload 'evn'; known are overload, "),
        ("workload.ratez=1", "workload: workload even has no parameter 'ratez'; it has client, rate, "),
        ("workload.rate=-1", "workload: rate: Input should be greater than 0"),
        ("workload={}", "workload: a workload needs a kind; known are mix, overload, "),
        ("workload={kind: mix}", "workload: a mix is made of its parts"),
        ("workload={kind: mix, parts: [{kind: even}], rate: 1}", "workload: a mix is made of its parts"),
        ("workload={kind: mix, parts: [{kind: even, ratez: 1}]}", "workload.parts.0: workload even has no parameter"),
        ("cluster.replicas=0", "cluster.replicas.0.count: Input should be greater than 0"),
        ("cluster.replicas=[]", "cluster.replicas: Tuple should have at least 1 item"),
        ("cluster.replicas=[{kv_token: 5}]", "cluster.replicas.0: ReplicaConfig has no field 'kv_token': did you"),
        ("cluster.step_time=a10", "cluster.step_time: unknown step time 'a10': give the path of a .json file, or one"),
        ("cluster.step_time={base_s: 0.1, bsae_s: 1}", "a step time has no 'bsae_s'; it has base_s, "),
        ("cluster.step_time={per_decode_s: 0.1}", "a step time needs base_s"),
        ("cluster.engine=vllm", "cluster.engine: Input should be 'fairserve' or 'paper'"),
        ("cluster.placement=random", "cluster.placement: Input should be 'central', 'round_robin'"),
        ("cluster.jitter=1", "cluster.jitter: Input should be less than 1"),
        ("cluster.loss=1", "cluster.loss: Input should be less than 1"),
        ("cluster.ingress_skew=[0.5, 0.5]", "ingress_skew of * has 2 shares, but there are 1 ingresses"),
        ("cluster.ingress_skew={x: 0.5}", "ingress_skew of x adds up to 0.5, not to 1"),
        ("cluster={num_ingress: 3, ingress_skew: [0.7, 0.7]}", "ingress_skew of * adds up to 1.4, not to 1"),
        ("fairness.policy=best", "fairness.policy: Input should be "),
    ],
)
def test_a_wrong_setting_is_refused_by_name_with_what_is_allowed(folder: Path, word: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scenario(folder, SMALL, word)
    assert complaint in str(caught.value)


def test_a_scenario_that_is_not_there_or_is_not_toml_is_named(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown scenario 'overlaod': give the path of a .toml file, or one of arena"
    ):
        read_scenario("overlaod")
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml: No such file"):
        read_scenario(folder / "none.toml")
    with pytest.raises(ConfigError, match=r"small.toml is not TOML"):
        scenario(folder, "duration_s = ")


# ---------------------------------------------------------------------------------------------------------- workloads
def test_a_workload_lasts_as_long_as_the_scenario_unless_it_says(folder: Path) -> None:
    assert scenario(folder, SMALL, "duration_s=10").arrivals()[-1].arrival_s < 10
    assert len(scenario(folder, SMALL, "workload.end_s=5").arrivals()) == 10
    assert len(scenario(folder, SMALL, "workload={kind: fairserve, num_requests: 100}").arrivals()) == 100
    assert scenario(folder, SMALL, "workload={kind: overload}").arrivals()[-1].arrival_s < 31


def test_the_seed_is_the_only_chance(folder: Path) -> None:
    small = scenario(folder, SMALL, "workload.kind=poisson")
    assert small.arrivals() == small.arrivals(seed=42)
    assert small.arrivals() != small.arrivals(seed=43)


def test_a_part_more_in_a_mix_changes_nothing_for_the_others(folder: Path) -> None:
    one = "workload={kind: mix, parts: [{kind: poisson, client: a}]}"
    two = "workload={kind: mix, parts: [{kind: poisson, client: a}, {kind: burst, client: b, num_requests: 5}]}"
    alone, together = scenario(folder, SMALL, one).arrivals(), scenario(folder, SMALL, two).arrivals()
    assert [arrival for arrival in together if arrival.client == "a"] == alone
    assert Counter(arrival.client for arrival in together)["b"] == 5


def test_equal_parts_of_a_mix_are_two_draws_with_ids_of_their_own(folder: Path) -> None:
    part = "{kind: poisson, client: a}"
    arrivals = scenario(folder, SMALL, f"workload={{kind: mix, parts: [{part}, {part}]}}").arrivals()
    assert len({one.request_id for one in arrivals}) == len(arrivals) == len({one.arrival_s for one in arrivals})


def test_a_trace_is_found_from_the_scenarios_folder_and_cut_at_its_end(folder: Path) -> None:
    arrivals = make("even", random.Random(0), {"rate": 1.0, "end_s": 90.0})
    (folder / "data").mkdir()
    write_trace(arrivals, folder / "data" / "t.csv")
    text = 'duration_s = 30.0\n[workload]\nkind = "trace"\nfile = "data/t.csv"\n'
    assert scenario(folder, text).arrivals() == arrivals[:30]
    mix = 'duration_s = 30.0\n[workload]\nkind = "mix"\n[[workload.parts]]\nkind = "trace"\nfile = "data/t.csv"\n'
    assert scenario(folder, mix).arrivals() == arrivals[:30]
    assert scenario(folder, text, "workload.time_scale=0.5").arrivals()[-1].arrival_s > 29
    with pytest.raises(ConfigError, match=r"cannot read the trace data/none\.csv"):
        scenario(folder, text, "workload.file=data/none.csv").arrivals()


# ------------------------------------------------------------------------------------------------------------ cluster
def test_replicas_may_differ_and_take_the_rest_from_the_cluster(folder: Path) -> None:
    text = (
        SMALL + "[cluster]\nmax_num_seqs = 7\n[[cluster.replicas]]\ncount = 2\n[[cluster.replicas]]\nkv_tokens = 500\n"
    )
    text += "step_time = { base_s = 0.5 }\n"
    first, second, third = scenario(folder, text).cluster.replica_setups()
    assert first == second
    assert [replica.max_num_seqs for replica in (first, third)] == [7, 7]
    assert [replica.kv_tokens for replica in (first, third)] == [10_000, 500]
    assert third.step_time.seconds(1, 10, 0) == 0.5


def test_a_profile_is_found_from_the_scenarios_folder(folder: Path) -> None:
    PRESETS["cpu-smollm2-135m"].save(folder / "mine.json")
    small = scenario(folder, SMALL + '[cluster]\nstep_time = "mine.json"\n')
    assert small.cluster.replica_setups()[0].step_time == PRESETS["cpu-smollm2-135m"]


@pytest.mark.parametrize(
    ("skew", "shares"),
    [
        ("{}", [1 / 3, 1 / 3, 1 / 3]),
        ("0.8", [0.8, 0.1, 0.1]),
        ("[0.5, 0.4]", [0.5, 0.4, 0.1]),
        ("[0, 1, 0]", [0, 1, 0]),
        ("{x: 0.8}", [0.8, 0.1, 0.1]),
        ("{y: 0.8}", [1 / 3, 1 / 3, 1 / 3]),
        ("{'*': [0, 1], x: [0.2, 0.2]}", [0.2, 0.2, 0.6]),
        ("{'*': [0, 1]}", [0, 1, 0]),
    ],
)
def test_arrivals_come_in_where_the_skew_sends_them(folder: Path, skew: str, shares: list[float]) -> None:
    overrides = ["workload.client=x", "workload.rate=100", "cluster.num_ingress=3", f"cluster.ingress_skew={skew}"]
    small = scenario(folder, SMALL, *overrides)
    assert small.cluster.ingress_shares("x") == pytest.approx(shares)
    num = Counter(one.ingress for one in small.arrivals())
    assert [num[door] / 3000 for door in range(3)] == pytest.approx(shares, abs=0.03)


def test_ingresses_do_not_change_what_arrives(folder: Path) -> None:
    one = scenario(folder, SMALL).arrivals()
    two = scenario(folder, SMALL, "cluster.num_ingress=2").arrivals()
    assert [(arrival.request_id, arrival.arrival_s) for arrival in one] == [
        (arrival.request_id, arrival.arrival_s) for arrival in two
    ]
    assert {arrival.ingress for arrival in one} == {None}
    assert {arrival.ingress for arrival in two} == {0, 1}


# ------------------------------------------------------------------------------------------------------------- faults
def fault(folder: Path, **fields: Any) -> Fault:
    words = ["cluster.replicas=2", "cluster.num_ingress=2", "faults=[{}]"]
    words += [f"faults.0.{key}={value}" for key, value in fields.items()]
    return scenario(folder, SMALL, *words).faults[0].fault


def test_a_fault_names_its_victim_as_the_cluster_does(folder: Path) -> None:
    assert fault(folder, at_s=3, kind="replica_crash", replica=1) == Fault(3, "replica_crash", "replica-1")
    assert fault(folder, at_s=3, kind="partition", ingress=0) == Fault(3, "partition", "router-0")
    assert fault(folder, at_s=3, kind="actor_crash", with_snapshot="false") == Fault(3, "actor_crash", "", False)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "actor_crash", "replica": 0}, "faults.0: actor_crash has no replica and no ingress"),
        ({"kind": "replica_crash"}, "faults.0: replica_crash needs a replica"),
        ({"kind": "replica_return", "ingress": 0}, "faults.0: replica_return needs a replica"),
        ({"kind": "partition"}, "faults.0: partition needs either a replica or an ingress"),
        ({"kind": "heal", "replica": 0, "ingress": 0}, "faults.0: heal needs either a replica or an ingress"),
        ({"kind": "replica_crash", "replica": 2}, "faults.0: no replica 2, there are 2, numbered from 0"),
        ({"kind": "partition", "ingress": 5}, "faults.0: no ingress 5, there are 2, numbered from 0"),
        ({"kind": "flood"}, "faults.0.kind: Input should be 'replica_crash', "),
    ],
)
def test_a_fault_without_its_victim_is_refused(folder: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fault(folder, at_s=3, **fields)
    assert complaint in str(caught.value)


def test_only_a_central_placement_has_an_authority_to_lose(folder: Path) -> None:
    words = [
        "cluster.placement=round_robin",
        "cluster.replicas=2",
        "faults=[{at_s: 1, kind: replica_crash, replica: 0}]",
    ]
    assert scenario(folder, SMALL, *words).faults
    with pytest.raises(ConfigError, match=r"faults\.0: placement round_robin has no authority for actor_crash"):
        scenario(folder, SMALL, *words[:2], "faults=[{at_s: 1, kind: actor_crash}]")


@pytest.mark.parametrize(
    "word",
    [
        "cluster.replicas=2",
        "cluster.num_ingress=2",
        "cluster.placement=round_robin",
        "faults=[{at_s: 1, kind: actor_crash}]",
    ],
)
def test_the_papers_engine_is_one_replica_behind_one_door(folder: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="engine paper is one replica behind one ingress") as caught:
        scenario(folder, SMALL, "cluster.engine=paper", word)
    assert word.split("=")[0].split(".")[-1] in str(caught.value).split("wrong: ")[1]
