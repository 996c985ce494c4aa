"""``python -m benchmarks.trace_slice``: what load generators replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.trace_slice import main
from fairserve.simulate.records import PREFIX_BLOCK

MOONCAKE = [
    {"timestamp": 0, "input_length": 1_100, "output_length": 40, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 9_000, "output_length": 500, "hash_ids": [0, *range(3, 20)]},
    {"timestamp": 3_000, "input_length": 1_024, "output_length": 320, "hash_ids": [0, 1]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return path


def test_a_slice_of_mooncake_is_shorter_and_shares_what_the_whole_shares(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trace.with_name("slice.jsonl")
    main([str(trace), str(out), "--format", "mooncake", "--max-tokens", "100"])
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["timestamp"], second["timestamp"]) == (0, 3_000)
    assert [(one["input_length"], one["output_length"]) for one in (first, second)] == [(35, 2), (32, 10)]
    assert first["hash_ids"][:2] == second["hash_ids"] == [0, 1]
    assert len(first["hash_ids"]) == -(-35 // PREFIX_BLOCK)  # one for the block that is not full, as generators want it
    assert "1 of 3 dropped as too long" in capsys.readouterr().out


def test_what_is_not_known_to_be_shared_is_shared_with_nobody(tmp_path: Path) -> None:
    trace, out = tmp_path / "plain.csv", tmp_path / "slice.jsonl"
    trace.write_text("arrival_s,client,input_tokens,output_tokens\n5,ann,40,2\n5.25,bob,20,1\n")
    main([str(trace), str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    hashes = [known for row in rows for known in row["hash_ids"]]
    assert len(set(hashes)) == len(hashes) == 3 + 2
    assert [row["timestamp"] for row in rows] == [0, 250]


def test_a_file_that_is_no_trace_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"trace_slice: .*none\.csv"):
        main([str(tmp_path / "none.csv"), str(tmp_path / "out.jsonl")])
