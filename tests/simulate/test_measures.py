"""The figures of a run: by hand, against the published tables, and where there is nothing to measure."""

from __future__ import annotations

import csv
import gzip
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from fairserve.errors import ConfigError
from fairserve.fairness.cost import ProfiledQuadratic
from fairserve.simulate.delays import Percentiles, percentiles
from fairserve.simulate.measures import Measures, figure_names, measure
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord
from fairserve.simulate.service_curves import Grid, ServiceCurves

RUNS = Path(__file__).resolve().parents[2].parent / "shared" / "traces" / "vtc_artifact_runs.csv.gz"


def served(
    client: str,
    arrival_s: float,
    first_s: float,
    finished_s: float,
    num_input: int = 100,
    num_output: int = 100,
    weight: float = 1.0,
    **more: Any,
) -> RequestRecord:
    """A finished request, granted halfway to its first token."""
    arrival = Arrival(f"{client}@{arrival_s}", arrival_s, client, num_input, num_output, num_output, weight)
    record = RequestRecord(
        arrival, "finished", (arrival_s + first_s) / 2, first_s, finished_s, num_input, 0, num_output
    )
    for name, value in more.items():
        setattr(record, name, value)
    return record


def turned_away(client: str, arrival_s: float, reason: str = "rate_limited", **more: Any) -> RequestRecord:
    arrival = Arrival(f"{client}@{arrival_s}", arrival_s, client, 100, 100, 100, **more)
    return RequestRecord(arrival, "refused", finished_s=arrival_s, reason=reason)


def waiting(client: str, arrival_s: float) -> RequestRecord:
    return RequestRecord(Arrival(f"{client}@{arrival_s}", arrival_s, client, 100, 100, 100))


def run_of(*requests: RequestRecord, duration_s: float = 120.0, **more: Any) -> RunRecord:
    return RunRecord("toy", "vtc", 1, duration_s, list(requests), **more)


# ------------------------------------------------------------------------------------------- VTC's differences, by hand

ONE_SAMPLE = Grid(30.0, 60.0, (60.0,))


def test_a_client_counts_with_what_it_lacks_to_the_best_served_or_to_its_own_demand() -> None:
    """In [30, 90]: a asks for 300 and gets 300; b asks for 300 and gets a third of it; c asks for nothing there and
    gets 60 that it asked for before."""
    run = run_of(
        served("a", 30, 40, 80),
        served("b", 50, 80, 110),
        served("c", 20, 30, 60, num_input=20, num_output=20),
    )
    samples = ServiceCurves(run).difference(ONE_SAMPLE)
    assert samples == pytest.approx([0 + (300 - 100) / 60 + 60 / 60])


def test_a_client_that_asks_for_little_lacks_little() -> None:
    run = run_of(served("a", 30, 40, 80), served("b", 30, 40, 80, num_input=10, num_output=10))
    assert ServiceCurves(run).difference(ONE_SAMPLE) == pytest.approx([0.0])


def test_accumulated_service_starts_when_the_warm_up_ends() -> None:
    """Before 30 s a has received 200 of its 300; after, each has 100 by 60 s and b 300 by 90 s."""
    run = run_of(served("a", 0, 10, 40), served("b", 0, 50, 80))
    accumulated = ServiceCurves(run).accumulated(Grid(30.0, 60.0, (60.0, 90.0)))
    assert accumulated == pytest.approx([0.0, 200.0])


def test_twice_the_service_at_twice_the_weight_is_no_difference() -> None:
    heavy = [served("a", 30, 40, 80, weight=2.0), served("a", 30, 40, 80, weight=2.0)]
    modest = [served("b", 30, 40, 80), served("b", 89, 95, 99)]
    curves = ServiceCurves(run_of(*heavy, *modest))
    assert curves.service_rate([60.0], 60.0)[:, 0] == pytest.approx([300 / 60, 300 / 60])
    assert curves.difference(ONE_SAMPLE) == pytest.approx([0.0])


def test_a_refused_request_is_demand_only_where_that_is_asked_for() -> None:
    run = run_of(served("a", 30, 40, 80), served("b", 30, 40, 80, 10, 10), turned_away("b", 45))
    curves = ServiceCurves(run)
    assert curves.difference(ONE_SAMPLE) == pytest.approx([0.0])
    assert curves.difference(ONE_SAMPLE, with_refused=True) == pytest.approx([270 / 60])


def test_a_client_whose_every_request_was_refused_is_not_the_least_served() -> None:
    run = run_of(served("a", 30, 40, 80), served("b", 30, 40, 80), turned_away("c", 45))
    assert ServiceCurves(run).accumulated(ONE_SAMPLE) == pytest.approx([0.0])


def test_a_caller_that_leaves_demands_no_more_than_it_stayed_for() -> None:
    left = RequestRecord(
        Arrival("left", 31.0, "b", 100, 500, 500, cancel_after=10), "cancelled", 31.0, 40.0, 50.0, 100, 0, 10
    )
    assert ServiceCurves(run_of(served("a", 30, 40, 80), left)).difference(ONE_SAMPLE) == pytest.approx([0.0])


def test_an_unfinished_request_has_received_what_its_record_says() -> None:
    running = RequestRecord(Arrival("r", 60.0, "a", 100, 500, 500), "unfinished", 60.0, 80.0, None, 100, 0, 50)
    assert ServiceCurves(run_of(running)).delivered([80.0, 100.0, 120.0])[0] == pytest.approx([0.0, 100.0, 200.0])


def test_a_request_of_one_token_is_received_when_it_comes() -> None:
    curves = ServiceCurves(run_of(served("a", 30, 40, 40, num_output=1)))
    assert curves.delivered([39.9, 40.1])[0] == pytest.approx([0.0, 102.0])


def test_cached_input_is_neither_service_nor_demand() -> None:
    curves = ServiceCurves(run_of(served("a", 30, 40, 80, num_cached=60)))
    assert curves.delivered([120.0])[0, 0] == pytest.approx(240.0)
    assert curves.demand_rate([60.0], 60.0)[0, 0] == pytest.approx(240 / 60)


def test_another_cost_function_measures_in_its_own_units() -> None:
    curves = ServiceCurves(run_of(served("a", 30, 40, 80)), ProfiledQuadratic())
    assert curves.delivered([120.0])[0, 0] == pytest.approx(ProfiledQuadratic().service(100, 100))


def test_the_grid_is_the_artifacts_at_600_s_and_fits_into_a_short_run() -> None:
    grid = Grid.of(600.0)
    assert (grid.warm_up_s, grid.window_s, len(grid.times_s)) == (30.0, 60.0, 19)
    assert grid.times_s[0] == pytest.approx(58.5) and grid.times_s[-1] == pytest.approx(571.5)
    short = Grid.of(40.0)
    assert (short.warm_up_s, short.window_s) == (10.0, 20.0)
    assert all(10 < time_s < 40 for time_s in short.times_s)
    assert Grid.of(3600.0).window_s == 60.0


@pytest.mark.parametrize("duration_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_run_without_length_is_refused(duration_s: float) -> None:
    with pytest.raises(ConfigError, match="duration_s must be a positive number"):
        measure(run_of(duration_s=duration_s))


# ------------------------------------------------------------------------------------------------- the published tables

ARENA = {  # max, avg, var, tokens/s, refused
    "FCFS": (759.97, 433.53, 32112, 777, 0),
    "LCF": (750.49, 323.82, 29089, 778, 0),
    "VTC": (368.40, 251.66, 6549, 779, 0),
    "VTC_predict": (365.47, 240.33, 5322, 773, 0),
    "VTC_oracle": (329.46, 227.51, 4476, 781, 0),
    "LShare/rpm5": (143.86, 83.58, 1020, 340, 919),
    "LShare/rpm20": (446.76, 195.71, 7450, 694, 342),
    "LShare/rpm30": (693.66, 309.45, 24221, 747, 176),
}
OVERLOAD = {  # max, avg, var, tokens/s, accumulated
    "FCFS": (447.37, 439.00, 31, 876, 237_738),
    "VTC": (192.88, 103.77, 6981, 893, 9_050),
    "VTC_pred_50": (33.98, 12.54, 112, 904, 1_789),
    "VTC_oracle": (5.87, 0.51, 1.7, 895, 377),
}


@pytest.fixture(scope="module")
def published() -> dict[str, list[RequestRecord]]:
    """Every stored run of the artifact; a request that was turned away has -1 for both delays."""
    if not RUNS.exists():
        pytest.skip("needs the artifact's stored runs")
    runs: dict[str, list[RequestRecord]] = defaultdict(list)
    with gzip.open(RUNS, "rt") as file:
        for row in csv.DictReader(file):
            if not row["run"].endswith((":real", ":overload")):
                continue
            at, num_input, num_output = float(row["req_time"]), int(row["prompt_len"]), int(row["output_len"])
            ours = runs[row["run"]]
            if row["ttft_s"] == "-1":
                arrival = Arrival(str(len(ours)), at, row["client"], num_input, num_output, num_output)
                ours.append(RequestRecord(arrival, "refused", finished_s=at, reason="rate_limited"))
            else:
                first_s, finished_s = at + float(row["ttft_s"]), at + float(row["latency_s"])
                ours.append(served(row["client"], at, first_s, finished_s, num_input, num_output))
    return runs


def of_published(runs: dict[str, list[RequestRecord]], name: str) -> Measures:
    return measure(RunRecord(name, name, 42, 600.0, runs[name]))


def assert_printed_as(found: Measures, row: tuple[float, ...]) -> None:
    """To the last digit that is printed; the table rounds some and cuts others."""
    assert found.difference is not None
    assert (found.difference.max, found.difference.avg) == pytest.approx(row[:2], abs=0.01)
    assert (found.difference.var, found.tokens_per_s) == pytest.approx(row[2:4], abs=0.5)


@pytest.mark.parametrize("scheduler", ARENA)
def test_the_arena_table_comes_out_of_the_stored_runs(
    published: dict[str, list[RequestRecord]], scheduler: str
) -> None:
    found = of_published(published, f"{scheduler}:real")
    assert_printed_as(found, ARENA[scheduler])
    assert found.num_refused == ARENA[scheduler][4]


@pytest.mark.parametrize("scheduler", OVERLOAD)
def test_the_overload_table_comes_out_of_the_stored_runs(
    published: dict[str, list[RequestRecord]], scheduler: str
) -> None:
    found = of_published(published, f"{scheduler}:overload")
    assert_printed_as(found, OVERLOAD[scheduler])
    assert found.accumulated_difference == pytest.approx(OVERLOAD[scheduler][4], abs=0.5)


def test_with_refused_demand_a_low_limit_is_no_longer_the_fairest(published: dict[str, list[RequestRecord]]) -> None:
    rpm, vtc = of_published(published, "LShare/rpm5:real"), of_published(published, "VTC:real")
    assert rpm.difference is not None and rpm.difference_with_refused is not None
    assert vtc.difference is not None and vtc.difference_with_refused is not None
    assert rpm.difference.avg < vtc.difference.avg / 2
    assert rpm.difference_with_refused.avg > vtc.difference_with_refused.avg


# ------------------------------------------------------------------------------------------------------------- the rest


def test_percentiles_are_of_nearest_rank() -> None:
    assert percentiles([float(value) for value in range(100, 0, -1)]) == Percentiles(50.0, 90.0, 99.0, 100, 0)
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 3.0, 1, 0)
    assert percentiles([1.0, 2.0, 3.0]) == Percentiles(2.0, 3.0, 3.0, 3, 0)
    assert percentiles([]) is None


def test_a_request_that_still_waits_counts_with_its_age() -> None:
    found = measure(run_of(served("a", 0, 2, 10), waiting("a", 20)))
    assert found.ttft == Percentiles(2.0, 100.0, 100.0, 2, 1)
    assert found.latency == Percentiles(10.0, 100.0, 100.0, 2, 1)
    assert found.queueing == Percentiles(1.0, 100.0, 100.0, 2, 1)
    assert found.num_unfinished == 1


def test_who_was_refused_or_left_early_has_no_delay() -> None:
    left = RequestRecord(Arrival("l", 5.0, "a", 9, 9, 9, cancel_after=0), "cancelled", 8.0, None, 8.0)
    found = measure(run_of(turned_away("a", 1), left))
    assert (found.ttft, found.latency) == (None, None)
    assert found.queueing == Percentiles(3.0, 3.0, 3.0, 1, 0)


def test_delays_and_tokens_are_told_per_client() -> None:
    found = measure(run_of(served("a", 0, 2, 10), served("b", 0, 8, 20, 10, 30), turned_away("b", 3)))
    a, b = found.of("a"), found.of("b")
    assert a.ttft is not None and b.ttft is not None and b.latency is not None
    assert (a.ttft.p50, b.ttft.p50, b.latency.p99) == (2.0, 8.0, 20.0)
    assert (b.num_requests, b.num_finished, b.num_refused) == (2, 1, 1)
    assert (b.num_input, b.num_output, b.service) == (10, 30, 70.0)
    with pytest.raises(KeyError):
        found.of("c")


def test_tokens_per_s_counts_until_the_last_finish() -> None:
    drained = measure(run_of(served("a", 0, 2, 10), served("a", 0, 100, 200)))
    assert (drained.tokens_per_s, drained.output_tokens_per_s) == (400 / 200, 200 / 200)
    early = measure(run_of(served("a", 0, 2, 50)))
    assert early.tokens_per_s == 200 / 50
    still_open = measure(run_of(served("a", 0, 2, 50), waiting("a", 60)))
    assert still_open.tokens_per_s == 200 / 120


def test_refusals_are_counted_by_reason_and_by_where_they_hit_an_interaction() -> None:
    never_sent = Arrival("x", 9.0, "a", 100, 100, 100, interaction="begun", call_index=2)
    found = measure(
        run_of(
            turned_away("a", 1, interaction="never", call_index=0),
            turned_away("b", 1, interaction="never", call_index=0),
            served("a", 2, 3, 4),
            turned_away("a", 5, "client_queue_full", interaction="begun", call_index=1),
            RequestRecord(never_sent, "cut"),
            turned_away("a", 7),
            num_wasted_tokens=200,
        )
    )
    assert found.refused == {"client_queue_full": 1, "rate_limited": 3}
    assert (found.num_refused, found.num_cut, found.num_wasted_tokens) == (4, 1, 200)
    assert (found.num_throttled_interactions, found.num_cut_interactions) == (2, 1)


def test_jain_compares_only_clients_that_had_something_waiting_all_along() -> None:
    """After 30 s the two that always wait receive 300 and 100; the third sleeps most of the time and got more. What
    the modest one received before 30 s does not help it."""
    requests = [
        served("modest", 0, 1, 29),
        served("greedy", 0, 30, 90),
        served("modest", 0, 30, 90, num_input=40, num_output=30),
        served("sleeper", 80, 81, 90, num_input=900),
        waiting("greedy", 1),
        waiting("modest", 2),
    ]
    found = measure(run_of(*requests))
    assert found.num_backlogged == 2
    assert found.jain == pytest.approx(400**2 / (2 * (300**2 + 100**2)))
    assert found.of("sleeper").waiting_share == pytest.approx(0.5 / 90)


def test_waiting_requests_that_overlap_count_their_time_once() -> None:
    found = measure(run_of(served("a", 30, 90, 91), served("a", 40, 50, 51), served("a", 100, 118, 119)))
    assert found.of("a").waiting_share == pytest.approx((30 + 9) / 90)
    assert (found.num_backlogged, found.jain) == (0, None)


def test_capacity_is_shared_out_over_replicas_and_the_time_that_the_run_really_took() -> None:
    found = measure(run_of(served("a", 0, 2, 200), num_replicas=2, busy_s=300.0, idle_while_waiting_s=40.0))
    assert (found.utilisation, found.idle_share) == (300 / 400, 40 / 400)


def test_the_gap_is_told_beside_its_bound_where_there_is_one() -> None:
    found = measure(run_of(served("a", 0, 2, 10), worst_gap=50.0, bound=200.0))
    assert (found.bound, found.gap_to_bound) == (200.0, 0.25)
    without = measure(run_of(served("a", 0, 2, 10), worst_gap=50.0))
    assert (without.worst_gap, without.bound, without.gap_to_bound) == (50.0, None, None)


def test_a_run_in_which_nothing_happened_has_no_figures_rather_than_wrong_ones() -> None:
    for found in (measure(run_of()), measure(run_of(turned_away("a", 1)))):
        figures = found.figures()
        empty = ("difference.avg", "accumulated_difference", "jain", "ttft.p50", "latency.p99", "cached_share")
        assert [figures[name] for name in empty] == [None] * len(empty)
        assert figures["tokens_per_s"] == 0.0
        assert all(value == value for value in figures.values())


def test_every_figure_goes_by_its_name() -> None:
    figures = measure(run_of(served("a", 0, 2, 10), turned_away("a", 1))).figures()
    assert list(figures) == [*figure_names(), "refused.rate_limited"]
    assert (figures["ttft.p50"], figures["num_requests"], figures["refused.rate_limited"]) == (2.0, 2.0, 1.0)


@pytest.mark.parametrize(("num_requests", "limit_s"), [(1_500, 0.05), (5_700, 0.15)])
def test_measuring_takes_milliseconds(num_requests: int, limit_s: float) -> None:
    chance = random.Random(7)
    requests = [
        served(f"c{chance.randrange(27)}", at, at + 50 * chance.random(), at + 60 + chance.random())
        for at in sorted(600 * chance.random() for _ in range(num_requests))
    ]
    run = run_of(*requests, duration_s=600.0)
    taken = []
    for _ in range(5):
        before = time.process_time()
        measure(run)
        taken.append(time.process_time() - before)
    assert min(taken) < limit_s
