"""Rate limits against throttled interactions: what counts as wasted, what is claimed, what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import interactions
from benchmarks.interactions import OIT_POLICIES, Row, Task, busiest, claims, main, oit, rows_for, rpm, wasted
from fairserve.errors import ClientQueueFull, InteractionThrottled, RateLimited
from fairserve.simulate.records import Arrival, Outcome, RequestRecord, RunRecord
from fairserve.simulate.run import run
from fairserve.simulate.seeds import Estimate, Summary

Capture = pytest.CaptureFixture[str]


def call(task: str, index: int, outcome: Outcome = "finished", *, tokens: tuple[int, int] = (0, 0)) -> RequestRecord:
    arrival = Arrival(f"{task}.{index}", 0.0, "ann", 10, 5, 5, interaction=task, call_index=index)
    return RequestRecord(arrival, outcome, num_input=tokens[0], num_output=tokens[1])


def summary(**figures: float) -> Summary:
    """A row that has only what claims look at."""
    zeros = dict.fromkeys((*interactions.TURNED_AWAY, *interactions.WASTED), 0.0)
    return Summary("s", "p", (), {name: Estimate(value, None, 1) for name, value in (zeros | figures).items()})


def pair(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Summary]:
    return {oit(50): summary(**ours), rpm(50): summary(**theirs)}


# ------------------------------------------------------------------------------------------------------------- wasted
def test_what_was_computed_for_a_refused_interaction_is_wasted_before_and_after_the_refusal() -> None:
    calls = [call("cut", 0, tokens=(10, 5)), call("cut", 1, "refused"), call("cut", 2, tokens=(7, 3))]
    assert wasted([*calls, call("whole", 0, tokens=(100, 100))]) == (17, 8)


def test_an_interaction_that_never_began_wastes_nothing() -> None:
    assert wasted([call("never", 0, "refused"), call("never", 1, "cut")]) == (0, 0)


def test_a_refused_request_that_stands_alone_spoils_no_other() -> None:
    assert wasted([call("", 0, "refused"), call("", 1, tokens=(10, 5))]) == (0, 0)


def test_the_busiest_user_is_the_one_with_most_requests_the_first_by_name_of_equal_ones() -> None:
    by = [Arrival(str(i), 0.0, client, 1, 1, 1) for i, client in enumerate(("zoe", "bob", "ann", "zoe", "ann"))]
    assert busiest([RequestRecord(arrival) for arrival in by]) == "ann"


# --------------------------------------------------------------------------------------------------------------- rows
def test_rpm_and_oit_are_compared_at_the_same_limit_and_the_others_have_none() -> None:
    limits = {}
    for row in rows_for([20, 50]):
        fairness = row.scenario(2, None).fairness
        limits[row.name] = fairness.throttle.client_limit, fairness.rpm_limit if fairness.policy == "rpm" else None
    assert limits["fcfs"] == limits["vtc"] == (None, None)
    for limit in (20, 50):
        assert limits[rpm(limit)] == (None, limit)
        assert all(limits[oit(limit, policy)] == (limit, None) for policy in OIT_POLICIES)
    assert len(limits) == len(rows_for([20, 50]))


@pytest.fixture(scope="module")
def crowded() -> dict[str, RunRecord]:
    """Three hundred calls for one replica, under a limit and behind short queues."""
    rows = [Row("rpm", "rpm(20)", 20), Row("oit", "wsc+moving_mean", 20, is_throttled=True)]
    rows.append(Row("short", "wsc+moving_mean", 20, is_throttled=True, max_waiting=3))
    return {row.name: run(row.scenario(1, 300), 1) for row in rows}


def reasons(record: RunRecord) -> set[str]:
    return {request.reason for request in record.requests} - {""}


def test_each_row_refuses_for_its_own_reason(crowded: dict[str, RunRecord]) -> None:
    assert reasons(crowded["rpm"]) == {RateLimited.reason}
    assert reasons(crowded["oit"]) == {InteractionThrottled.reason}
    assert ClientQueueFull.reason in reasons(crowded["short"])


def test_every_run_goes_on_until_all_calls_are_over(crowded: dict[str, RunRecord]) -> None:
    assert not [
        request for record in crowded.values() for request in record.requests if request.outcome == "unfinished"
    ]


def test_throttled_interactions_waste_nothing_and_rate_limits_do(crowded: dict[str, RunRecord]) -> None:
    assert wasted(crowded["oit"].requests) == (0, 0)
    assert min(wasted(crowded["rpm"].requests)) > 0


def test_a_full_queue_wastes_what_it_refuses_in_the_middle_of_and_that_is_counted(
    crowded: dict[str, RunRecord],
) -> None:
    record = crowded["short"]
    late = [request for request in record.requests if request.outcome == "refused" and request.arrival.call_index]
    assert late and {request.reason for request in late} == {ClientQueueFull.reason}
    assert sum(wasted(record.requests)) > 0


@pytest.mark.parametrize("name", ["rpm", "oit", "short"])
def test_the_simulated_cluster_counts_the_same_waste(crowded: dict[str, RunRecord], name: str) -> None:
    assert sum(wasted(crowded[name].requests)) == crowded[name].num_wasted_tokens


def test_fairness_is_measured_while_calls_come_and_waste_until_the_end() -> None:
    done = Task(Row("rpm", "rpm(20)", 20), 1, 1, 300).run()
    assert done.measures.duration_s == interactions.BUSY_S
    assert done.extras["wasted prompt"] > 0 and done.extras["load"] > 0.5


# ------------------------------------------------------------------------------------------------------------- claims
@pytest.mark.parametrize(
    ("ours", "theirs", "kept"),
    [
        ({}, {"wasted prompt": 5.0, "num_throttled_interactions": 3.0}, [True, True]),
        ({"wasted prompt": 0.2}, {"num_throttled_interactions": 3.0}, [False, True]),
        ({"wasted output": 0.2}, {"num_throttled_interactions": 3.0}, [False, True]),
        ({"num_throttled_interactions": 10.0}, {"num_throttled_interactions": 100.0}, [True, True]),
        ({"num_throttled_interactions": 10.1}, {"num_throttled_interactions": 100.0}, [True, False]),
        (
            {"num_throttled_interactions": 10.0},
            {"num_throttled_interactions": 50.0, "num_cut_interactions": 50.0},
            [True, True],
        ),
        ({"num_cut_interactions": 11.0}, {"num_throttled_interactions": 100.0}, [True, False]),
    ],
)
def test_no_waste_and_ten_times_fewer_are_kept_and_anything_less_is_missed(
    ours: dict[str, float], theirs: dict[str, float], kept: list[bool]
) -> None:
    assert [claim.kept for claim in claims(pair(ours, theirs), [50])] == kept


def test_a_claim_says_both_numbers() -> None:
    made = claims(pair({"num_throttled_interactions": 8.0}, {"num_throttled_interactions": 20.0}), [50])
    assert "8.0 interactions ended under OIT, 20.0 under RPM: 2.5 times fewer" in made[1].text
    assert "none at all" in claims(pair({}, {"num_throttled_interactions": 20.0}), [50])[1].text


# ------------------------------------------------------------------------------------------------------------- command
def test_the_command_prints_tables_writes_its_data_and_exits_as_the_claims_say(tmp_path: Path, capsys: Capture) -> None:
    words = ["--seeds", "1", "--jobs", "1", "--limits", "20", "--replicas", "1", "--requests", "300"]
    code = main([*words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == (1 if "MISSED" in printed else 0)
    assert "== 1 replicas, load " in printed and "not over after" not in printed
    assert all(f"\n{row.name} " in printed for row in rows_for([20]))
    data = json.loads((tmp_path / "out" / "interactions.json").read_text())
    (load,) = data["replicas"].values()
    assert [row.name for row in rows_for([20])] == list(load["rows"])
    assert printed.count("MISSED") == sum(not claim["kept"] for claim in load["claims"])
    assert load["rows"]["fcfs"]["num_unfinished"]["mean"] == 0
    assert data["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limits", "20,x"], "--limits is a list of different whole numbers"),
        (["--limits", "20,20"], "--limits is a list"),
        (["--replicas", "0"], "--replicas is a list"),
        (["--seeds", "0"], "must be at least 1, not 0 and 2"),
        (["--requests", "-4", "--jobs", "1"], "num_requests"),
    ],
)
def test_wrong_options_are_named(words: list[str], message: str, capsys: Capture) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
