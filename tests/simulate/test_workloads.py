"""VTC's published arrivals request for request, profiles within tolerance, adversaries true to their names."""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import pytest
from pydantic import ValidationError

from fairserve.errors import ConfigError
from fairserve.simulate import workloads_basic as basic
from fairserve.simulate.records import PREFIX_BLOCK, Arrival
from fairserve.simulate.traces import read_trace
from fairserve.simulate.workloads import WORKLOADS, make, parameters_of
from fairserve.simulate.workloads_arena import CLIENTS, INPUTS, LEVELS, OUTPUTS, arena
from fairserve.simulate.workloads_fairserve import APPLICATIONS, fairserve
from fairserve.simulate.workloads_prefix import Text, shared_prefix, tree_of_thought
from fairserve.simulate.workloads_vtc import dist_shift, overload, overload_weighted

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"
RUNS = TRACES / "vtc_artifact_runs.csv.gz"
ARENA = TRACES / "vtc_arena_27clients_600s.csv.gz"
NEED_A_FILE = {"trace", "composed", "servegen"}
WITHOUT_CHANCE = {"increase", "burst", "ramp"}
PUBLISHED = {name for name in WORKLOADS if "published" in parameters_of(name).model_fields}


def made(name: str, seed: int = 0, **parameters: Any) -> list[Arrival]:
    """By name, as scenarios make them."""
    return make(name, random.Random(seed), parameters)


def by_client(arrivals: Sequence[Arrival]) -> dict[str, list[Arrival]]:
    clients: dict[str, list[Arrival]] = defaultdict(list)
    for one in arrivals:
        clients[one.client].append(one)
    return clients


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


# ------------------------------------------------------------------------------------------------------- all of them
SMALL: dict[str, dict[str, Any]] = {
    "fairserve": {"num_requests": 1_000},
    "many_tiny": {"end_s": 60.0},
    "shared_prefix": {"end_s": 200.0},
}


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - NEED_A_FILE))
def test_every_workload_is_in_order_with_unique_ids_and_repeats_with_its_seed(name: str) -> None:
    arrivals = made(name, **SMALL.get(name, {}))
    keys = [(one.arrival_s, one.request_id) for one in arrivals]
    assert keys == sorted(keys)
    assert len({one.request_id for one in arrivals}) == len(arrivals) > 0
    assert all(one.arrival_s >= 0 and one.num_input >= 1 and one.num_output >= 1 for one in arrivals)
    assert arrivals == made(name, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - NEED_A_FILE - WITHOUT_CHANCE - PUBLISHED))
def test_another_seed_makes_another_workload(name: str) -> None:
    assert made(name, 1, **SMALL.get(name, {})) != made(name, 2, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_arrivals_are_the_same_for_every_seed_and_others_are_drawn_on_demand(name: str) -> None:
    assert made(name, 1) == made(name, 2)
    others = made(name, 1, published=False)
    assert others not in (made(name, 1), made(name, 2, published=False))
    assert len(others) == pytest.approx(len(made(name)), rel=0.1)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_says_what_it_is(name: str) -> None:
    assert (WORKLOADS[name].__doc__ or "").strip()


# -------------------------------------------------------------------------------------------------------------- VTC
@cache
def published_runs() -> dict[str, dict[str, list[tuple[float, int, int]]]]:
    """run -> client -> (arrival_s to 0.1 ms, input, output), in order."""
    if not RUNS.exists():
        pytest.skip("the published runs are not here")
    runs: dict[str, dict[str, list[tuple[float, int, int]]]] = defaultdict(lambda: defaultdict(list))
    with gzip.open(RUNS, "rt") as file:
        for row in csv.DictReader(file):
            request = float(row["req_time"]), int(row["prompt_len"]), int(row["output_len"])
            runs[row["run"]][f"client-{row['client']}"].append(request)
    return runs


@pytest.mark.parametrize(
    ("run", "name", "parameters"),
    [
        ("VTC:overload", "overload", {}),
        ("FCFS:overload", "overload", {"duration_s": 600}),
        ("VTC:proportional", "proportional", {}),
        ("VTC:on_off_less", "on_off_less", {}),
        ("VTC:on_off_overload", "on_off_overload", {}),
        ("VTC:increase", "increase", {}),
        ("VTC:dist_shift", "dist_shift", {}),
        ("VTC:overload-multi", "overload_multi", {}),
        ("WVTC:overload-weighted", "overload_weighted", {"rates": (0.4, 0.8, 1.2, 1.6)}),
        ("VTC:poisson_short_long", "poisson_short_long", {}),
        ("VTC:poisson_short_long_2", "poisson_short_long_2", {}),
        ("FCFS:poisson_short_long_2", "poisson_short_long_2", {"duration_s": 300}),
        ("VTC:poisson_on_off_overload", "poisson_on_off_overload", {}),
        ("sec6.4/65000/VTC-512:overload-s4", "overload", {"rates": (2, 4), "lengths": (512, 512), "duration_s": 600}),
    ],
)
def test_the_arrivals_are_those_of_the_published_run(run: str, name: str, parameters: dict[str, Any]) -> None:
    ours = {
        client: [(round(one.arrival_s, 4), one.num_input, one.num_output) for one in mine]
        for client, mine in by_client(made(name, **parameters)).items()
    }
    assert ours == {client: sorted(theirs) for client, theirs in published_runs()[run].items()}


def test_a_client_of_the_paper_starts_after_one_to_two_intervals_and_overruns_the_end() -> None:
    clients = by_client(overload(random.Random(0)))
    assert [round(mine[0].arrival_s, 4) for mine in clients.values()] == [0.6502, 0.9164]
    assert [round(clients[f"client-{num}"][-1].arrival_s, 4) for num in (0, 1)] == [360.2497, 360.3169]
    assert [len(clients[f"client-{num}"]) for num in (0, 1)] == [540, 1080]


@pytest.mark.parametrize("name", ["on_off_less", "on_off_overload", "poisson_on_off_overload"])
def test_client_0_of_an_on_off_workload_is_silent_in_odd_minutes_and_client_1_is_not(name: str) -> None:
    clients = by_client(made(name))
    assert {int(one.arrival_s // 60) % 2 for one in clients["client-0"]} == {0}
    assert {int(one.arrival_s // 60) for one in clients["client-1"]} >= set(range(10))


def test_demand_shifts_at_each_third() -> None:
    arrivals = dist_shift(random.Random(0))
    num = Counter((one.client, min(2, int(one.arrival_s // 300))) for one in arrivals)
    assert [num["client-0", third] for third in range(3)] == [89, 299, 151]
    assert [num["client-1", third] for third in range(3)] == [599, 300, 451]


def test_the_weighted_workload_asks_equally_for_every_weight() -> None:
    clients = by_client(overload_weighted(random.Random(0)))
    assert {client: {one.weight for one in mine} for client, mine in clients.items()} == {
        f"client-{num}": {num + 1.0} for num in range(4)
    }
    assert {len(mine) for mine in clients.values()} == {360}


def test_weights_must_be_as_many_as_clients() -> None:
    with pytest.raises(ConfigError, match="3 weights for the 2 clients"):
        overload(random.Random(0), weights=(1, 2, 3))


# ------------------------------------------------------------------------------------------------------------ arena
def test_the_synthetic_arena_has_the_published_clients_lengths_and_skew() -> None:
    for seed in range(3):
        arrivals = arena(random.Random(seed))
        clients = by_client(arrivals)
        assert [len(clients[f"client-{num}"]) for num in range(27)] == [num for num, _, _ in CLIENTS]
        assert len(arrivals) == 1500 and max(one.arrival_s for one in arrivals) < 600
        assert mean(one.num_input for one in arrivals) == pytest.approx(136, rel=0.12)
        assert mean(one.num_output for one in arrivals) == pytest.approx(256, rel=0.08)
        service = sorted(sum(one.num_input + 2 * one.num_output for one in mine) for mine in clients.values())
        assert service[-1] / sum(service) == pytest.approx(0.20, abs=0.025)  # the trace: 0.22
        gini = sum((2 * rank - 26) * one for rank, one in enumerate(service)) / 27 / sum(service)
        assert gini == pytest.approx(0.60, abs=0.025)  # the trace: 0.63


def test_arena_clients_come_and_go_when_they_did() -> None:
    clients = by_client(arena(random.Random(0)))
    assert min(one.arrival_s for one in clients["client-1"]) > 206
    assert max(one.arrival_s for one in clients["client-18"]) < 150


def test_the_arena_can_be_made_busier_and_longer() -> None:
    arrivals = arena(random.Random(0), rate=5.0, duration_s=1200)
    assert len(arrivals) == 6000
    assert 1190 < arrivals[-1].arrival_s < 1200


def test_the_quantiles_written_down_are_those_of_the_trace() -> None:
    if not ARENA.exists():
        pytest.skip("the arena trace is not here")
    trace = read_trace(ARENA)
    for written, lengths in ((INPUTS, [one.num_input for one in trace]), (OUTPUTS, [one.num_output for one in trace])):
        for level, length in zip(LEVELS, written, strict=True):
            assert percentile(lengths, level) == pytest.approx(length, rel=0.05, abs=1.5)
    times = sorted(([one.arrival_s for one in mine] for mine in by_client(trace).values()), key=len, reverse=True)
    assert [len(mine) for mine in times] == [num for num, _, _ in CLIENTS]
    assert sorted((len(mine), round(mine[0])) for mine in times) == sorted((num, first) for num, first, _ in CLIENTS)


def test_the_arena_trace_itself_replays_from_its_file() -> None:
    if not ARENA.exists():
        pytest.skip("the arena trace is not here")
    arrivals = made("arena", file=str(ARENA), duration_s=300.0)
    assert arrivals == [one for one in read_trace(ARENA) if one.arrival_s < 300]
    assert len(made("arena", file=str(ARENA), duration_s=300.0, rate=5.0)) > 1400


# -------------------------------------------------------------------------------------------------------- FairServe
@pytest.mark.parametrize("seed", range(3))
def test_the_synthetic_copilot_has_the_published_profile(seed: int) -> None:
    arrivals = fairserve(random.Random(seed), length_divisor=1.0, max_tokens=10**9)
    prompts, outputs = [one.num_input for one in arrivals], [one.num_output for one in arrivals]
    users = Counter(one.client for one in arrivals)
    calls = Counter(one.interaction for one in arrivals)
    calls_per_request = [calls[one.interaction] for one in arrivals]
    assert (len(arrivals), arrivals[-1].arrival_s < 72) == (10_000, True)
    assert (len(users), len(calls)) == (pytest.approx(1_358, rel=0.01), pytest.approx(5_251, rel=0.01))
    assert mean(prompts) == pytest.approx(5_809, rel=0.05)
    assert median(prompts) == pytest.approx(3_573, rel=0.05)
    assert percentile(prompts, 0.99) == pytest.approx(33_639, rel=0.2)
    assert mean(outputs) == pytest.approx(109, rel=0.1)
    assert median(outputs) == pytest.approx(31, rel=0.12)
    assert percentile(outputs, 0.99) == pytest.approx(1_172, rel=0.2)
    assert median(calls_per_request) == 3
    assert mean(calls_per_request) == pytest.approx(12, rel=0.05)
    assert percentile(calls_per_request, 0.99) == 288
    assert users.most_common(1)[0][1] / 10_000 == pytest.approx(0.21, abs=0.005)
    assert median(users.values()) == 4
    applications = Counter(one.application for one in arrivals)
    assert len(applications) == 23
    for application in APPLICATIONS[:5]:
        mine = [one for one in arrivals if one.application == application.name]
        assert len(mine) == pytest.approx(application.num_requests, rel=0.02)
        assert mean(one.num_input for one in mine) == pytest.approx(application.prompt_mean, rel=0.15)
        assert mean(one.num_output for one in mine) == pytest.approx(application.output_mean, rel=0.3)


def test_the_copilot_runs_with_lengths_divided_by_eight_and_nothing_too_long_or_clipped() -> None:
    lengths = [one.num_input + one.num_output for one in fairserve(random.Random(0), max_tokens=4_000)]
    assert max(lengths) <= 4_000
    assert Counter(lengths)[4_000] <= 2
    prompts = [one.num_input for one in fairserve(random.Random(0))]
    assert median(prompts) == pytest.approx(3_573 / 8, rel=0.05)
    assert mean(prompts) == pytest.approx(5_809 / 8, rel=0.05)


def test_calls_of_an_interaction_follow_each_other_in_one_users_one_application() -> None:
    calls: dict[str, list[Arrival]] = defaultdict(list)
    for one in fairserve(random.Random(0), num_requests=2_000):
        calls[one.interaction].append(one)
    for interaction in calls.values():
        assert [one.call_index for one in interaction] == list(range(len(interaction)))
        times = [one.arrival_s for one in interaction]
        assert all(before < after for before, after in pairwise(times))
        assert len({(one.client, one.application) for one in interaction}) == 1


@pytest.mark.parametrize("num", [1, 2, 7, 100, 1_000])
def test_a_smaller_copilot_has_exactly_the_requests_asked_for(num: int) -> None:
    arrivals = fairserve(random.Random(0), num_requests=num)
    assert len(arrivals) == num
    if num == 1_000:
        assert len({one.client for one in arrivals}) == pytest.approx(136, abs=2)
        assert Counter(one.client for one in arrivals).most_common(1)[0][1] == pytest.approx(210, abs=10)


# ---------------------------------------------------------------------------------------------------------- prefixes
def test_equal_beginnings_have_equal_hashes_and_nothing_after_the_first_difference_has() -> None:
    system = Text().plus("system", 40)
    one, other = system.plus("question a", 40), system.plus("question b", 40)
    assert len(one.prefix) == len(other.prefix) == 5
    assert one.prefix[:2] == other.prefix[:2] == system.prefix
    assert not set(one.prefix[2:]) & set(other.prefix[2:])


def test_a_text_has_the_same_hashes_however_its_pieces_were_laid_on_and_a_hash_covers_all_before_it() -> None:
    assert Text().plus("x", 64).prefix != Text().plus("y", 16).plus("x", 48).prefix
    assert not set(Text().plus("x", 64).prefix) & set(Text().plus("y", 16).plus("x", 64).prefix)
    steps = Text()
    for num, length in enumerate((5, 0, 11, 17, 31)):
        steps = steps.plus(f"piece {num}", length)
    assert (steps.num_tokens, len(steps.prefix)) == (64, 4)


@pytest.mark.parametrize("workload", [shared_prefix, tree_of_thought])
def test_prefixes_cover_every_whole_block_and_are_shared_inside_a_client_only(workload: Any) -> None:
    arrivals = workload(random.Random(0))
    assert all(len(one.prefix) == one.num_input // PREFIX_BLOCK for one in arrivals)
    clients = by_client(arrivals)
    for client, mine in clients.items():
        assert len({one.prefix[0] for one in mine}) == 1
        assert not {known for one in mine for known in one.prefix} & {
            known for other, theirs in clients.items() if other != client for one in theirs for known in one.prefix
        }


def test_a_turn_begins_with_the_whole_conversation_before_it() -> None:
    sessions: dict[str, list[Arrival]] = defaultdict(list)
    for one in shared_prefix(random.Random(0), turns=4):
        sessions[one.interaction].append(one)
    long = [calls for calls in sessions.values() if len(calls) == 4]
    assert len(long) > 50
    for calls in long:
        assert [one.call_index for one in calls] == [0, 1, 2, 3]
        for before, after in pairwise(calls):
            assert after.prefix[: len(before.prefix)] == before.prefix
            assert after.num_input > before.num_input + before.num_output
            assert after.arrival_s > before.arrival_s


def test_sessions_of_a_client_share_its_system_prompt_and_one_of_its_templates() -> None:
    firsts = [one for one in shared_prefix(random.Random(0), rates=(0.5,), num_templates=2) if one.call_index == 0]
    assert len({one.prefix[:32] for one in firsts}) == 1
    assert len({one.prefix[:64] for one in firsts}) == 2
    assert len({one.prefix[:65] for one in firsts if len(one.prefix) > 64}) > 50


def test_a_tree_branches_below_every_thought() -> None:
    arrivals = tree_of_thought(random.Random(0), rates=(0.05,), branching=3, depth=3, thought_tokens=32, end_s=1000.0)
    trees: dict[str, list[Arrival]] = defaultdict(list)
    for one in arrivals:
        trees[one.interaction].append(one)
    tree = next(calls for calls in trees.values() if len(calls) == 13)
    assert [one.call_index for one in tree] == list(range(13))
    root, children, leaves = tree[0], tree[1:4], tree[4:]
    assert all(child.num_input == root.num_input + 32 for child in children)
    assert all(child.prefix[: len(root.prefix)] == root.prefix for child in children)
    assert len({one.prefix for one in leaves}) == 3  # nine leaves: three below each child, with its prompt and thought
    assert {one.prefix[: len(children[0].prefix)] for one in leaves} == {children[0].prefix}


def test_a_tree_that_would_never_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="calls per problem; at most"):
        tree_of_thought(random.Random(0), branching=10, depth=9)


# -------------------------------------------------------------------------------------------------------- one client
def test_even_requests_come_at_one_interval_inside_their_time() -> None:
    times = [one.arrival_s for one in made("even", rate=2.0, start_s=10.0, end_s=20.0, phase=0.0)]
    assert times == [10 + num / 2 for num in range(20)]
    shifted = [one.arrival_s for one in made("even", rate=2.0, start_s=10.0, end_s=20.0)]
    assert len(shifted) == 20 and shifted[0] != 10 and 10 < shifted[0] < 10.5


def test_poisson_intervals_have_the_rate_and_vary_as_much_as_their_mean() -> None:
    times = [one.arrival_s for one in made("poisson", rate=5.0, end_s=2_000.0)]
    intervals = [after - before for before, after in pairwise(times)]
    assert mean(intervals) == pytest.approx(0.2, rel=0.05)
    assert pstdev(intervals) / mean(intervals) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("spacing", ["even", "poisson"])
def test_an_on_off_client_keeps_its_rate_while_it_is_on(spacing: str) -> None:
    arrivals = made("on_off", rate=5.0, on_s=20.0, off_s=40.0, start_s=7.0, end_s=607.0, spacing=spacing)
    assert all((one.arrival_s - 7) % 60 < 20 for one in arrivals)
    assert len(arrivals) == pytest.approx(5 * 200, rel=0.1)


def test_a_ramp_goes_from_one_rate_to_the_other() -> None:
    times = [one.arrival_s for one in made("ramp", from_rate=1.0, to_rate=3.0, end_s=1_000.0)]
    assert len(times) == pytest.approx(2_000, rel=0.01)
    assert sum(at_s < 100 for at_s in times) == pytest.approx(110, abs=3)
    assert sum(at_s >= 900 for at_s in times) == pytest.approx(290, abs=3)


def test_lengths_are_one_number_or_any_of_a_range() -> None:
    arrivals = made("poisson", rate=10.0, num_input=[3, 5], num_output=7)
    assert {one.num_input for one in arrivals} == {3, 4, 5}
    assert {(one.num_output, one.max_output) for one in arrivals} == {(7, 7)}


def test_merged_workloads_stay_in_order_and_a_repeated_id_gets_a_new_one() -> None:
    rng = random.Random(0)
    one, other = basic.even(rng, client="a", rate=1.0, end_s=5.0), basic.even(rng, client="a", rate=2.0, end_s=5.0)
    merged = basic.merge(one, other, one[:1])
    assert len(merged) == 16
    assert [arrival.arrival_s for arrival in merged] == sorted(arrival.arrival_s for arrival in merged)
    assert len({arrival.request_id for arrival in merged}) == 16
    assert {arrival.request_id for arrival in merged} >= {"a#00000", "a#00000~2", "a#00000~3", "a#00009"}


# -------------------------------------------------------------------------------------------------------- adversaries
def test_a_burst_comes_all_at_once() -> None:
    assert {one.arrival_s for one in made("burst", num_requests=500, at_s=3.0)} == {3.0}
    assert [one.request_id for one in made("burst", num_requests=11)][-1] == "burster#00010"


def test_the_sleeper_works_sleeps_and_bursts() -> None:
    arrivals = made("idle_then_burst", rate=2.0, active_s=30.0, idle_s=100.0, num_requests=40)
    times = [one.arrival_s for one in arrivals]
    assert len(times) == 100 and times[60:] == [130.0] * 40 and times[59] < 30
    assert {one.arrival_s for one in made("idle_then_burst", active_s=0.0, idle_s=9.0)} == {9.0}


def test_tiny_requests_are_many_and_tiny() -> None:
    arrivals = made("many_tiny", end_s=10.0)
    assert len(arrivals) > 400 and max(one.num_input + one.num_output for one in arrivals) <= 5


def test_the_aborter_leaves_as_soon_as_its_prompt_is_computed() -> None:
    assert {one.cancel_after for one in made("abort_after_prefill")} == {0}
    assert {one.cancel_after for one in basic.cancelled(made("even"), cancel_after=10)} == {10}


def test_the_liar_asks_for_what_it_does_not_need_or_for_less() -> None:
    assert {(one.max_output, one.length) for one in made("lying_max_tokens", num_output=64)} == {(4096, 64)}
    assert {(one.max_output, one.length) for one in basic.asking(made("even"), max_output=8)} == {(8, 8)}


def test_a_sybil_spreads_one_demand_over_many_users_of_one_tenant() -> None:
    arrivals = made("sybil", num_clients=7, rate=2.0)
    num = Counter(one.client for one in arrivals)
    assert sorted(num) == [f"sybil/user-{user}" for user in range(7)]
    assert max(num.values()) - min(num.values()) <= 1
    assert len(arrivals) == pytest.approx(1_200, rel=0.1)


# --------------------------------------------------------------------------------------------------------- parameters
def test_an_unknown_workload_or_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown workload 'overlaod'; known are overload, proportional"):
        made("overlaod")
    with pytest.raises(ConfigError, match=r"workload even has no parameter 'ratez'; it has client, rate, num_input"):
        made("even", ratez=2.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("even", {"rate": 0}),
        ("even", {"rate": math.inf}),
        ("even", {"num_input": 0}),
        ("even", {"num_input": [5, 0]}),
        ("even", {"client": 7}),
        ("overload", {"rates": [1.0, -1.0]}),
        ("increase", {"duration_s": "long"}),
        ("trace", {}),
    ],
)
def test_a_wrong_value_of_a_parameter_is_refused(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made(name, **parameters)


def test_a_range_of_lengths_must_not_run_backwards() -> None:
    with pytest.raises(ValidationError):
        made("even", num_input=[9, 5])
