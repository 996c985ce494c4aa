"""The ablation on a cluster small enough for a test: what is compared, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import ablation
from benchmarks.ablation import (
    CLIENTS,
    GREEDY,
    HEADINGS,
    INGRESS,
    SYSTEMS,
    Row,
    claims,
    figures_of,
    job,
    row_of,
    shares,
)
from fairserve.config import DispatchConfig, FairnessConfig
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord

SECONDS = 20.0


def run(system: str, num_replicas: int = 2, ingress: str = "skewed", seconds: float = SECONDS) -> RunRecord:
    return job(num_replicas, ingress, SYSTEMS[system], 1, seconds).run()


def fake(system: str, num_replicas: int, worst_gaps: Sequence[float], bound: float = 50_000.0) -> Row:
    records = [
        RunRecord(str(num_replicas), "vtc", seed, 60.0, worst_gap=gap, bound=bound, num_replicas=num_replicas)
        for seed, gap in enumerate(worst_gaps)
    ]
    for record in records:
        record.unit = record.staleness = bound / 4
        record.service = [(at_s, dict.fromkeys(GREEDY, at_s)) for at_s in (0.0, 30.0, 60.0)]
    return row_of(num_replicas, "balanced", system, records)


def test_there_are_two_ingresses_for_eight_replicas_and_never_fewer() -> None:
    found = {num: ablation.scenario(num, "balanced", 60.0).cluster.num_ingress for num in (2, 8, 64)}
    assert found == {2: 2, 8: 2, 64: 16}


def test_skewed_every_client_has_an_ingress_of_its_own_that_most_of_its_requests_come_by() -> None:
    for num_replicas in (8, 64):
        cluster = ablation.scenario(num_replicas, "skewed", 60.0).cluster
        for client in CLIENTS:
            assert sorted(cluster.ingress_shares(client))[-1] == pytest.approx(0.9)
            assert sum(cluster.ingress_shares(client)) == pytest.approx(1.0)
    assert shares(1, 3) == pytest.approx([0.05, 0.9, 0.05])


def test_demand_grows_with_the_replicas_and_clients_stay_the_same() -> None:
    small, large = (ablation.scenario(num, "balanced", 60.0).arrivals(1) for num in (2, 8))
    assert {one.client for one in small} == {one.client for one in large} == set(CLIENTS)
    assert 3.6 < len(large) / len(small) < 4.4


def test_every_system_meets_the_same_requests_at_the_same_ingresses() -> None:
    jobs = [job(8, "skewed", system, 3, SECONDS) for system in SYSTEMS.values()]
    first, *others = (one.scenario.arrivals(one.seed) for one in jobs)
    assert all(other == first for other in others)


def test_long_and_short_requests_of_longshort_take_turns() -> None:
    lengths = [one.num_input for one in ablation.scenario(8, "balanced", 60.0).arrivals(1) if one.client == "longshort"]
    assert set(lengths[::2]) | set(lengths[1::2]) == {64, 1024}
    assert len(set(lengths[::2])) == 1


def test_one_authority_keeps_its_bound_and_a_smaller_gap_than_replicas_by_themselves() -> None:
    ours, alone = (figures_of(run(system, 8, seconds=30.0)) for system in ("central", "vtc @ round_robin"))
    assert ours["gap_to_bound"] is not None and ours["gap_to_bound"] < 1
    assert alone["bound"] is None and alone["staleness_share"] is None
    assert (ours["worst_gap"] or 0.0) < 0.7 * (alone["worst_gap"] or 0.0)


def test_reserving_half_of_the_answer_lets_more_run_at_a_time() -> None:
    whole, half = (figures_of(run(system)) for system in ("central, reserve all", "central"))
    assert (half["tokens_per_s"] or 0.0) > (whole["tokens_per_s"] or 0.0)


def test_jain_is_of_the_greedy_clients_after_the_warm_up() -> None:
    record = RunRecord("s", "vtc", 0, 60.0)
    start = dict.fromkeys(GREEDY, 100.0) | {"gold": 1_000.0}
    record.service = [(0.0, {}), (20.0, start), (60.0, {client: value + 50.0 for client, value in start.items()})]
    assert ablation.jain_of_greedy(record) == pytest.approx(1.0)
    record.service[-1][1]["gold"] = start["gold"]
    assert ablation.jain_of_greedy(record) == pytest.approx(3 / 4)


def test_a_gap_that_outgrows_the_cluster_is_told() -> None:
    level = [fake("ours", 2, [2_000.0, 2_200.0]), fake("ours", 8, [8_000.0, 9_000.0])]
    grown = [fake("ours", 2, [2_000.0, 2_200.0]), fake("ours", 8, [10_000.0, 11_000.0])]
    assert all(holds for _, holds in claims(level))
    told = dict(claims(grown))
    assert told["ours, balanced: gap / M does not grow with replicas: 0.105 on 2, 0.131 on 8"] is False


def test_one_run_past_its_bound_is_told_although_the_mean_is_not() -> None:
    (text, holds), *_ = claims([fake("ours", 2, [10_000.0, 60_000.0])])
    assert not holds and "120%" in text


def test_systems_without_an_authority_promise_nothing() -> None:
    assert claims([fake("vtc @ round_robin", 2, [10**9], bound=0.0)]) == []


def test_the_command_prints_systems_side_by_side_and_writes_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--replicas", "2", "--seconds", "15", "--seeds", "2", "--jobs", "1", "--out", str(tmp_path / "a.json")]
    code = ablation.main([*words, "--systems", "vtc @ round_robin", "ours", "--ingress", "balanced"])
    text = capsys.readouterr().out
    assert code in (0, 1) and code == ("MISSED" in text)
    assert all(heading in text for heading in HEADINGS.values())
    assert text.index("vtc @ round_robin") < text.index("ours")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["system"], len(row["runs"])) for row in rows] == [("vtc @ round_robin", 2), ("ours", 2)]
    assert INGRESS[0] == rows[0]["ingress"]


def test_the_gap_seen_counts_only_while_both_wait_for_a_first_token() -> None:
    def request(client: str, arrival_s: float, first_token_s: float | None) -> RequestRecord:
        arrival = Arrival(f"{client}{arrival_s}", arrival_s, client, 10, 10, 10)
        return RequestRecord(arrival, first_token_s=first_token_s)

    record = RunRecord("s", "vtc", 0, 6.0)
    # ann waits from 0 to 4 and again from 5 on; bob from 1 on.
    record.requests = [request("ann", 0.0, 2.5), request("bob", 1.0, None), request("ann", 2.0, 4.0)]
    record.requests.append(request("ann", 5.0, None))
    service = [(0, 0), (100, 0), (130, 0), (130, 20), (130, 25), (900, 25), (905, 25)]
    record.service = [(float(i), {"ann": float(a), "bob": float(b)}) for i, (a, b) in enumerate(service)]
    assert ablation.gap_seen(record) == 30.0
    record.service[4] = (4.0, {"ann": 130.0, "bob": 75.0})
    assert ablation.gap_seen(record) == 75.0


def test_ours_is_fairserve_as_it_comes() -> None:
    scenario = job(2, "balanced", SYSTEMS["ours"], 1, 60.0).scenario
    assert scenario.fairness == FairnessConfig()
    assert scenario.dispatch.reserve_output_tokens == DispatchConfig().reserve_output_tokens
