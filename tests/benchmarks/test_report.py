"""From records and samples to table, sentences and chart."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import demo
from benchmarks.chart import draw
from benchmarks.load import Record, Run
from benchmarks.measures import PolicyRun, Quantile, figures_of, quantile, queueing, service_curve, time_to_first_token
from benchmarks.table import claims, median_interval, policy_table, tokens_claim
from benchmarks.workload import CLIENTS, GREEDY, ON_OFF, STEADY


def sample(t_s: float, service: float, worst_gap: float = 50.0) -> dict[str, Any]:
    """Every client got ``service`` so far, half of it as input tokens."""
    each = {"weight": 1.0, "service": service, "num_input": service / 2, "num_output": service / 4}
    return {"t_s": t_s, "clients": dict.fromkeys(CLIENTS, each), "bound": 100.0, "worst_gap": worst_gap}


def run_of(policy: str, ttft_s: float, service: float = 400.0, worst_gap: float = 50.0) -> PolicyRun:
    """Each client sends three requests; the first text comes after ``ttft_s``."""
    records = [
        Record(client, submit_s, submit_s + ttft_s, submit_s + ttft_s + 1, 10, 20, queue_s=ttft_s / 2)
        for client in CLIENTS
        for submit_s in (0.0, 1.0, 2.0)
    ]
    return PolicyRun(policy, Run(10.0, records, [sample(0.0, 40.0), sample(10.0, 40.0 + service, worst_gap)]))


def printed(renderable: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_nearest_rank_is_a_value_that_happened() -> None:
    values = [(float(i), False) for i in range(1, 101)]
    assert quantile(values, 0.5) == Quantile(50.0)
    assert quantile(values, 0.99) == Quantile(99.0)
    assert quantile(values[:1], 0.99) == Quantile(1.0)
    assert quantile([], 0.5) is None


def test_a_request_without_a_first_token_counts_with_its_age() -> None:
    waiting, served, refused = Record("a", 2.0), Record("a", 1.0, first_s=4.0), Record("a", 0.0, error="HTTP 429")
    assert time_to_first_token([waiting, served, refused], 10.0) == [(8.0, True), (3.0, False)]
    assert str(quantile([(8.0, True)], 0.5)) == ">8.00"


def test_queueing_is_left_open_where_the_server_reports_none() -> None:
    assert queueing([Record("a", 0.0, first_s=1.0)], 10.0) == []
    assert queueing([Record("a", 0.0, first_s=1.0, queue_s=0.5), Record("a", 4.0)], 10.0) == [(0.5, False), (6.0, True)]


def test_service_and_tokens_are_the_counter_actors_from_start_to_end() -> None:
    figures = figures_of(run_of("vtc", 1.0, service=400.0))
    row = figures.of(STEADY)
    assert (row.service, row.num_input, row.num_output) == (400.0, 200, 100)
    assert figures.tokens_per_s == pytest.approx(3 * 300 / 10)
    assert (figures.worst_gap, figures.bound) == (50.0, 100.0)


def test_without_a_counter_actor_the_reported_usage_stands_in() -> None:
    made = run_of("vtc", 1.0)
    made.run.samples.clear()
    figures = figures_of(made)
    assert (figures.of(GREEDY).num_input, figures.of(GREEDY).num_output, figures.of(GREEDY).service) == (30, 60, 150)
    assert figures.bound is None
    assert service_curve(made.run, GREEDY) == ([0.0, 2.0, 3.0, 4.0], [0.0, 50.0, 100.0, 150.0])


def test_the_curve_starts_at_nothing_whatever_the_warm_up_used() -> None:
    assert service_curve(run_of("vtc", 1.0).run, ON_OFF) == ([0.0, 10.0], [0.0, 400.0])


def test_the_table_has_a_row_for_every_client_and_the_bound_below() -> None:
    text = printed(policy_table(figures_of(run_of("vtc", 1.5))))
    assert all(client in text for client in CLIENTS)
    assert "1.50" in text and "0.75" in text
    assert "worst service gap while both were backlogged 50, VTC's bound 100" in text


def test_a_client_that_sent_nothing_has_an_empty_row() -> None:
    made = PolicyRun("vtc", Run(10.0, [], []))
    assert "-" in printed(policy_table(figures_of(made)))
    assert not any(claim.kept for claim in claims(figures_of(made), figures_of(made))[:2])


def test_five_times_better_is_kept_and_four_times_is_missed() -> None:
    fcfs = figures_of(run_of("fcfs", 5.0))
    assert [claim.kept for claim in claims(fcfs, figures_of(run_of("vtc", 1.0)))] == [True, True, True, True]
    assert [claim.kept for claim in claims(fcfs, figures_of(run_of("vtc", 1.25)))] == [False, False, True, True]


def test_a_gap_above_the_bound_is_missed() -> None:
    made = claims(figures_of(run_of("fcfs", 5.0)), figures_of(run_of("vtc", 1.0, worst_gap=101.0)))
    assert [claim.kept for claim in made] == [True, True, True, False]


def test_the_ratio_of_several_pairs_is_their_median_with_each_one_shown() -> None:
    claim = tokens_claim([(100.0, 99.0), (100.0, 90.0), (100.0, 98.0)])
    assert claim.kept
    assert "median 98.0% of 99.0%, 90.0%, 98.0%" in claim.text
    assert not tokens_claim([(100.0, 96.0)]).kept


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    draw([run_of("fcfs", 5.0), run_of("vtc", 1.0)], tmp_path / "new" / "chart.png")
    assert (tmp_path / "new" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_writes_chart_and_data_and_says_whether_all_was_kept(tmp_path: Path) -> None:
    runs = [run_of("fcfs", 5.0), run_of("vtc", 1.0), run_of("vtc", 1.0), run_of("fcfs", 5.0)]
    console = Console(width=160, record=True, quiet=False)
    assert demo.report(runs, {"seed": 5}, console, tmp_path)
    data = json.loads((tmp_path / "demo.json").read_text())
    assert [one["policy"] for one in data["runs"]] == ["fcfs", "vtc", "vtc", "fcfs"]
    assert data["machine"]["cores"] >= 1
    assert data["settings"] == {"seed": 5}
    assert "2 alternating pairs" in console.export_text()
    assert not demo.report([run_of("fcfs", 1.0), run_of("vtc", 1.0)], {}, console, tmp_path)


def test_the_interval_of_a_median_leaves_out_as_many_at_either_end_as_its_confidence_allows() -> None:
    ratios = [0.90, 0.97, 0.98, 0.99, 1.0, 1.0, 1.01, 1.02, 1.03, 1.2]
    low, high, confidence = median_interval(ratios) or (0.0, 0.0, 0.0)
    assert (low, high) == (0.97, 1.03), "of ten values the second and the ninth"
    assert confidence == pytest.approx(1 - 2 * 11 / 1024)
    claim = tokens_claim([(100.0, 100 * ratio) for ratio in ratios])
    assert "97.0% to 103.0% (98% confidence)" in claim.text
    assert median_interval(ratios[:5]) is None and "confidence" not in tokens_claim([(1.0, 1.0)] * 2).text
