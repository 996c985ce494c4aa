"""Traces: what a file may say, what is wrong with it and where, and what is made of the published kinds."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import pvariance
from typing import Any

import pytest

from fairserve.errors import ConfigError
from fairserve.simulate.records import Arrival
from fairserve.simulate.trace_files import COLUMNS, SUFFIXES
from fairserve.simulate.traces import compose, load_trace, read_trace, write_trace
from fairserve.simulate.workloads import make
from fairserve.simulate.workloads_servegen import read_profiles

TRACES = Path(__file__).parents[2].parent / "shared" / "traces"


def shared(name: str) -> Path:
    """A real trace, where it is at hand."""
    if not (TRACES / name).exists():
        pytest.skip(f"{name} is not here")
    return TRACES / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def json_lines(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def times(arrivals: Sequence[Arrival]) -> list[float]:
    return [one.arrival_s for one in arrivals]


# ----------------------------------------------------------------------------------------------------------- reading
def test_the_least_a_trace_may_say_is_when_and_how_long(folder: Path) -> None:
    assert read_trace(csv_file(folder, "arrival,input,output\n0.5,10,3\n")) == [
        Arrival("000000", 0.5, "client-0", 10, 3, max_output=3)
    ]


@pytest.mark.parametrize(
    ("at", "num_input", "num_output"),
    [
        ("arrival_s", "input_tokens", "output_tokens"),
        ("req_time", "prompt_len", "output_len"),
        ("arrival", "input_length", "output_length"),
    ],
)
def test_columns_go_by_several_names(folder: Path, at: str, num_input: str, num_output: str) -> None:
    (one,) = read_trace(csv_file(folder, f"client,{num_output},{at},{num_input},ttft_s\nx,3,0.5,10,9\n"))
    assert one == Arrival("000000", 0.5, "x", 10, 3, max_output=3)


def test_every_field_of_a_request_can_be_given(folder: Path) -> None:
    row = {"req_id": 7, "timestamp": 1500, "client": "a/b", "input": 40, "output": 3, "max_tokens": 9, "weight": 2}
    row |= {"application": "app", "interaction": "i", "call_index": 4, "cancel_after": 1, "ingress": 1}
    whole = Arrival("7", 1.5, "a/b", 40, 3, 9, 2.0, "app", "i", 4, (8, 9), 1, 1)
    assert read_trace(json_lines(folder, {**row, "hash_ids": [8, 9]})) == [whole]
    table = csv_file(folder, ",".join([*row, "hash_ids"]) + "\n" + ",".join(map(str, row.values())) + ",8 9\n")
    assert read_trace(table) == [whole]


def test_an_empty_cell_and_a_null_mean_the_default(folder: Path) -> None:
    assert read_trace(csv_file(folder, "arrival,input,output,weight,client\n0,1,1,,\n"))[0].client == "client-0"
    rows = {"arrival": 0, "input": 1, "output": 1, "weight": None}, {"arrival": 1, "input": 1, "output": 1, "weight": 3}
    assert [one.weight for one in read_trace(json_lines(folder, *rows))] == [1.0, 3.0]


def test_requests_come_out_in_order_of_time_and_ids_tell_their_place_in_the_file(folder: Path) -> None:
    arrivals = read_trace(csv_file(folder, "arrival,input,output\n2,1,1\n0,1,1\n1,1,1\n"))
    assert [(one.arrival_s, one.request_id) for one in arrivals] == [(0, "000001"), (1, "000002"), (2, "000000")]


def test_a_column_that_looks_like_a_slip_is_pointed_at(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_trace(csv_file(folder, "arrival,input,output,max_ouput\n0,1,1,5\n"))
    assert "'max_ouput' is passed over; did you mean 'max_output'?" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "arrival,input\n0,1\n",
            r"no column for num_output: give it as one of output_tokens, .*; found arrival, input",
        ),
        ("", "no column for arrival_s"),
        ("arrival,input,output\n", "holds no requests"),
        ("arrival,input,output\n0,1,1\n1,x,1\n", r"line 3, column 'input': 'x' is not a whole number of at least 1"),
        ("arrival,input,output\n0,1,0\n", r"line 2, column 'output': '0' is not a whole number of at least 1"),
        ("arrival,input,output\n0,1.5,1\n", r"column 'input': '1.5' is not a whole number"),
        ("arrival,input,output\n-1,1,1\n", r"column 'arrival': '-1' is not a number of seconds of at least 0"),
        ("arrival,input,output\nnan,1,1\n", r"column 'arrival': 'nan' is not a number of seconds"),
        ("timestamp,input,output\nsoon,1,1\n", r"column 'timestamp': 'soon' is not a number of milliseconds"),
        ("arrival,input,output,weight\n0,1,1,0\n", r"column 'weight': '0' is not a number above 0"),
        ("arrival,input,output,hash_ids\n0,1,1,a b\n", r"column 'hash_ids': 'a b' is not a list of whole numbers"),
        ("arrival,input,output\n0,1\n", r"line 2: no value for num_output"),
        ("arrival,input,output\n0,1,1,1\n", r"line 2: more cells than the 3 columns"),
        ("arrival,input,output,req_id\n0,1,1,a\n1,1,1,a\n", r"line 3: the request id 'a' is also in line 2"),
    ],
)
def test_a_wrong_csv_is_refused_with_its_line_its_column_and_what_is_allowed(
    folder: Path, text: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_trace(csv_file(folder, text))
    assert "trace.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list, expected an object"),
        ('{"arrival": 1, "input": true, "output": 1}', "line 2, column 'input': True is not a whole number"),
        ('{"arrival": 1, "input": 1, "output": [1]}', r"line 2, column 'output': \[1\] is not a whole number"),
        ('{"arrival": 1, "input": 1, "output": 1e999}', "line 2, column 'output': inf is not a whole number"),
        ('{"arrival": 1, "input": 1, "output": 1, "hash_ids": [0.5]}', "column 'hash_ids'"),
        ('{"arrival": 1, "input": 1}', "line 2: no value for num_output"),
    ],
)
def test_a_wrong_json_line_is_refused_with_its_number(folder: Path, line: str, complaint: str) -> None:
    path = json_lines(folder, {"arrival": 0, "input": 1, "output": 1})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=complaint):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*none.csv: No such file"):
        read_trace(folder / "none.csv")
    with pytest.raises(ConfigError, match=r"must end in one of .csv, .jsonl, .csv.gz, .jsonl.gz"):
        read_trace(folder / "trace.parquet")
    (folder / "x.csv.gz").write_text("arrival,input,output\n0,1,1\n")
    with pytest.raises(ConfigError, match=r"cannot read the trace .*x.csv.gz: Not a gzipped file"):
        read_trace(folder / "x.csv.gz")


# ----------------------------------------------------------------------------------------------------------- writing
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "name", ["overload", "fairserve", "tree_of_thought", "abort_after_prefill", "lying_max_tokens"]
)
def test_what_is_written_reads_back_the_same(folder: Path, name: str, suffix: str) -> None:
    arrivals = make(name, random.Random(0), {"num_requests": 300} if name == "fairserve" else {})[:300]
    arrivals = [replace(one, ingress=num % 2 or None) for num, one in enumerate(arrivals)]
    path = folder / f"trace{suffix}"
    write_trace(arrivals, path)
    assert read_trace(path) == arrivals
    if suffix.endswith(".gz"):
        assert path.read_bytes()[4:8] == bytes(4)  # gzip's time: none, so that equal traces are equal files


def test_columns_that_nobody_uses_are_not_written(folder: Path) -> None:
    write_trace(make("even", random.Random(0), {}), folder / "trace.csv")
    assert (folder / "trace.csv").read_text().splitlines()[
        0
    ] == "request_id,arrival_s,client,input_tokens,output_tokens"


def test_every_field_has_a_column() -> None:
    assert set(COLUMNS) == set(Arrival.__dataclass_fields__)


def test_a_trace_is_not_written_under_a_name_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must end in one of"):
        write_trace([], folder / "trace.txt")
    with pytest.raises(ConfigError, match=r"cannot write the trace .*: No such file"):
        write_trace([], folder / "none" / "trace.csv")


# ----------------------------------------------------------------------------------------------------------- options
ROWS = "arrival,client,input,output\n0,a,10,5\n10,b,500,5\n20,a,10,500\n30,c,10,5\n40,a,10,5\n"


def test_a_long_request_is_dropped_not_clipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = load_trace(csv_file(folder, ROWS), max_tokens=15)
    assert (trace.num_read, trace.num_too_long, times(trace.arrivals)) == (5, 2, [0, 30, 40])
    assert {(one.num_input, one.num_output) for one in trace.arrivals} == {(10, 5)}
    with caplog.at_level(logging.WARNING):
        assert read_trace(folder / "trace.csv", max_tokens=15) == trace.arrivals
    assert "dropped 2 of 5 requests as too long" in caplog.text


def test_a_window_of_a_trace_plays_faster_from_zero(folder: Path) -> None:
    path = csv_file(folder, ROWS)
    assert times(read_trace(path, start_s=10, time_scale=0.5)) == [0, 5, 10, 15]
    assert times(read_trace(path, start_s=10, time_scale=0.5, duration_s=10)) == [0, 5]
    assert times(read_trace(path, limit=2)) == [0, 10]


def test_only_the_busiest_clients_are_kept(folder: Path) -> None:
    assert {one.client for one in read_trace(csv_file(folder, ROWS), top_clients=1)} == {"a"}
    assert Counter(one.client for one in read_trace(csv_file(folder, ROWS), top_clients=2)) == {"a": 3, "b": 1}


def test_divided_lengths_are_rounded_up_and_a_long_hash_becomes_many(folder: Path) -> None:
    row = {"arrival": 0, "input": 200, "output": 9, "max_tokens": 17, "hash_ids": [5, 6], "cancel_after": 8}
    (one,) = load_trace(json_lines(folder, row), length_divisor=4, hash_block=128).arrivals
    assert (one.num_input, one.num_output, one.max_output, one.cancel_after) == (50, 3, 5, 2)
    assert one.prefix == (10, 11, 12)  # 32 tokens of hash 5, 16 of hash 6; the last 2 tokens fill no block
    with pytest.raises(ConfigError, match="prefix hash of 128 tokens with lengths divided by 16 is no multiple of 16"):
        load_trace(folder / "trace.jsonl", length_divisor=16, hash_block=128)


def test_whole_interactions_are_given_to_tenants_by_share(folder: Path) -> None:
    rows = [
        {"arrival": num, "input": 1, "output": 1, "interaction": f"i{num % 1000}", "call_index": num // 1000}
        for num in range(3000)
    ]
    path = json_lines(folder, *rows)
    arrivals = read_trace(path, tenants={"big": 3.0, "small": 1.0}, rng=random.Random(0))
    owners = defaultdict(set)
    for one in arrivals:
        owners[one.interaction].add(one.client)
    assert all(len(clients) == 1 for clients in owners.values())
    assert Counter(one.client for one in arrivals)["big"] == pytest.approx(2250, rel=0.1)
    assert arrivals != read_trace(path, tenants={"big": 3.0, "small": 1.0}, rng=random.Random(1))


# ---------------------------------------------------------------------------------------------------------- Mooncake
MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 64, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 1100, "output_length": 65, "hash_ids": [0, 2, 3]},
    {"timestamp": 0, "input_length": 520, "output_length": 1, "hash_ids": [0, 4]},
    {"timestamp": 2999, "input_length": 1600, "output_length": 64, "hash_ids": [0, 1, 5, 6]},
]


def test_mooncakes_ticks_are_spread_and_its_blocks_of_512_become_16(folder: Path) -> None:
    arrivals = read_trace(json_lines(folder, *MOONCAKE), format="mooncake")
    assert times(arrivals) == [0, 1, 2, 3]
    assert [(one.num_input, one.num_output) for one in arrivals] == [(32, 2), (35, 3), (17, 1), (50, 2)]
    assert [one.prefix for one in arrivals] == [(0, 1), (0, 2), (0,), (0, 1, 5)]


def test_mooncakes_second_hash_names_the_session(folder: Path) -> None:
    arrivals = read_trace(json_lines(folder, *MOONCAKE), format="mooncake")
    named = [(one.interaction, one.call_index) for one in arrivals]
    assert named == [("session-1", 0), ("session-2", 0), ("session-4", 0), ("session-1", 1)]


def test_mooncake_in_its_own_lengths_has_thirty_two_hashes_for_one(folder: Path) -> None:
    first = read_trace(json_lines(folder, *MOONCAKE), format="mooncake", length_divisor=1)[0]
    assert (first.num_input, first.interaction) == (1000, "session-1")
    assert first.prefix == tuple(range(62))


def test_the_whole_of_mooncake_is_7373_sessions_and_no_tick_is_left() -> None:
    trace = load_trace(shared("mooncake_conversation.jsonl.gz"), format="mooncake", max_tokens=2_000)
    assert (trace.num_read, len(trace.arrivals) + trace.num_too_long) == (12_031, 12_031)
    assert trace.num_too_long < 400
    whole = load_trace(shared("mooncake_conversation.jsonl.gz"), format="mooncake").arrivals
    assert len({one.interaction for one in whole}) == 7_373
    assert all(len(one.prefix) == one.num_input // 16 for one in whole)
    assert max(Counter(times(whole)).values()) == 1


def test_a_composed_workload_has_the_tenants_of_one_trace_and_the_sessions_of_another() -> None:
    rng = random.Random(0)
    when = make("even", rng, {"client": "big", "rate": 3.0, "end_s": 300.0, "weight": 2.0})
    when += make("even", rng, {"client": "small", "rate": 1.0, "end_s": 300.0})
    what = make("shared_prefix", rng, {"rates": [1.0], "end_s": 300.0})
    arrivals = compose(when, what, random.Random(1))
    num = Counter(one.client for one in arrivals)
    assert num["big"] / num["small"] == pytest.approx(3, rel=0.25)
    assert {one.client: one.weight for one in arrivals} == {"big": 2.0, "small": 1.0}
    assert set(times(arrivals)) <= set(times(when))
    by_id = {one.request_id: one for one in what}
    owners, calls = defaultdict(set), defaultdict(list)
    for one in arrivals:
        assert one.prefix == by_id[one.request_id].prefix
        owners[one.interaction].add(one.client)
        calls[one.interaction].append(one.call_index)
    assert all(len(clients) == 1 for clients in owners.values())
    assert all(indices == sorted(indices) for indices in calls.values())
    assert compose([], what, rng) == []


# ---------------------------------------------------------------------------------------------------------- ServeGen
HEAD = {"length_quantile_levels": [0, 0.5, 0.5, 1], "window_s": 100, "columns": []}
LENGTHS = {"0": {"in": [10, 20, 20, 40], "out": [1, 2, 2, 3]}, "1100": {"in": [500] * 4, "out": [7] * 4}}
BUSY = {"client": 3, "windows": [[1000, 3.0, 1, "Gamma", 0.5], [1100, 1.0, 1, "Weibull", 0.5]], "lengths": LENGTHS}
CALM = {"client": 8, "windows": [[1000, 1.0, 1, "Gamma", 1.0], [1900, 9.0, 1, "Gamma", 1.0]], "lengths": LENGTHS}


def profile_file(folder: Path, *lines: Any) -> Path:
    path = folder / "profile.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def test_servegen_clients_keep_their_shares_times_and_lengths_at_any_rate(folder: Path) -> None:
    path = str(profile_file(folder, HEAD, BUSY, CALM))
    arrivals = make("servegen", random.Random(0), {"file": path, "duration_s": 200.0, "rate": 25.0})
    early = Counter(one.client for one in arrivals if one.arrival_s < 100)
    late = Counter(one.client for one in arrivals if one.arrival_s >= 100)
    assert (early, late) == ({"client-3": 3000, "client-8": 1000}, {"client-3": 1000})
    inputs = sorted(one.num_input for one in arrivals if one.arrival_s < 100)
    assert (inputs[0], inputs[2000], inputs[-1]) == (10, pytest.approx(20, abs=1), 40)
    assert {one.num_input for one in arrivals if one.arrival_s >= 100} == {500}


def test_servegen_bursts_are_as_uneven_as_their_shape(folder: Path) -> None:
    def crowding(shape: float) -> float:
        """Variance over mean of the requests per second; 1 for Poisson."""
        client = {"client": 0, "windows": [[0, 5.0, 1, "Weibull", shape]], "lengths": LENGTHS}
        parameters = {"file": str(profile_file(folder, HEAD, client)), "duration_s": 100.0, "rate": 50.0}
        per_s = Counter(int(one.arrival_s) for one in make("servegen", random.Random(0), parameters))
        return pvariance([per_s[second] for second in range(100)]) / 50

    assert crowding(1.0) == pytest.approx(1, abs=0.4)
    assert crowding(0.3) > 5


def test_a_servegen_window_can_start_anywhere_and_be_of_few_clients(folder: Path) -> None:
    path = str(profile_file(folder, HEAD, BUSY, CALM))
    parameters = {"file": path, "start_s": 1050.0, "duration_s": 100.0, "rate": 20.0, "num_clients": 1}
    arrivals = make("servegen", random.Random(0), parameters)
    assert {one.client for one in arrivals} == {"client-3"}
    assert len(arrivals) == pytest.approx(2000, rel=0.15)
    assert arrivals[0].arrival_s >= 0 and arrivals[-1].arrival_s < 100
    with pytest.raises(ConfigError, match=r"has no requests in the 10 s from 5000 s on"):
        make("servegen", random.Random(0), {"file": path, "start_s": 5000.0, "duration_s": 10.0})


def test_long_servegen_requests_are_dropped(folder: Path) -> None:
    path = str(profile_file(folder, HEAD, BUSY, CALM))
    arrivals = make("servegen", random.Random(0), {"file": path, "duration_s": 200.0, "max_tokens": 30})
    assert max(one.num_input + one.num_output for one in arrivals) == 30


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([{"window_s": 1}], r"line 1: no ServeGen profile: KeyError: 'length_quantile_levels'"),
        ([HEAD], "holds no clients"),
        ([HEAD, BUSY, {"client": 1}], r"line 3: no ServeGen profile: KeyError: 'windows'"),
        ([HEAD, {**BUSY, "windows": [[0, 1, 1, "Pareto", 1]]}], r"line 2: .*family 'Pareto', known are Weibull and"),
        ([HEAD, {**BUSY, "windows": [[0, 1, 1, "Gamma", 0]]}], r"line 2: .*shape 0 above 0"),
        ([HEAD, {**BUSY, "lengths": {"0": {"in": [1], "out": [1]}}}], r"line 2: .*4 quantiles of 'in' and 'out'"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_line(folder: Path, lines: list[Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_profiles(profile_file(folder, *lines))
    with pytest.raises(ConfigError, match="cannot read the profiles"):
        read_profiles(folder / "none.jsonl")


def test_an_hour_of_the_real_profiles_looks_like_the_published_sample() -> None:
    """The sample: 36,687 requests of 58 clients, the busiest with 21 % of the service (not of the requests)."""
    path = str(shared("servegen_mlarge_day6_profile.jsonl.gz"))
    arrivals = make("servegen", random.Random(0), {"file": path, "start_s": 558_000.0, "rate": 10.0})
    assert len(arrivals) == pytest.approx(36_000, rel=0.01)
    sample = read_trace(shared("servegen_mlarge_h155_10rps_1h.csv.gz"))
    assert len(sample) == 36_687
    ours, theirs = (sorted(one.num_input for one in several) for several in (arrivals, sample))
    assert ours[len(ours) // 2] == pytest.approx(theirs[len(theirs) // 2], rel=0.25)
    assert ours[int(0.99 * len(ours))] == pytest.approx(theirs[int(0.99 * len(theirs))], rel=0.25)
