"""The measurement of dashboards beside reports: every report is handled, and dashboards ask where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import reads


def test_runs_without_and_with_dashboards_take_turns_and_handle_every_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reads, "NUM_CLIENTS", 20)
    monkeypatch.setattr(reads, "REPLICAS", (2,))
    out = tmp_path / "deep" / "reads.json"
    assert reads.main(["--pairs", "2", "--seconds", "0.4", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["dashboards"] for row in rows] == [0, 10, 0, 10]
    assert {row["reports"] for row in rows} == {2 * round(0.4 * reads.STEPS_PER_S)}
    assert [row["answers"] > 0 for row in rows] == [False, True, False, True]
    assert all(row["handling_p50"] <= row["handling_p99"] <= row["handling_max"] for row in rows)
    told = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert told == [["2", "0", "2"], ["2", "10", "2"]]


@pytest.mark.parametrize(("part", "expected"), [(0.5, 2_000.0), (0.99, 4_000.0), (1.0, 4_000.0), (0.25, 1_000.0)])
def test_a_quantile_is_a_value_that_was_seen(part: float, expected: float) -> None:
    assert reads._ms([4.0, 1.0, 3.0, 2.0], part) == expected
    assert reads._ms([], part) == 0.0


def test_nothing_to_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reads.main(["--pairs", "0"])
    assert "at least one pair" in capsys.readouterr().err
