"""The comparison of policies that look at cached prefixes, on a cluster small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import locality
from benchmarks.locality import SYSTEMS, WORKLOADS, Row, changed, claims, scenario
from fairserve.simulate.command import Job
from fairserve.simulate.seeds import estimate


def row(system: str, tokens_per_s: float, jain: float = 0.99, workload: str = "tree", gap: float = 1.0) -> Row:
    figures = {"tokens_per_s": tokens_per_s, "jain": jain, "worst_gap": gap, "bound": 10.0}
    return Row(workload, 4, system, {name: estimate([value]) for name, value in figures.items()}, (figures,))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_client_asks_for_something_and_every_prompt_fits(workload: str) -> None:
    made = scenario(workload, 4, 20.0)
    arrivals = made.arrivals(1)
    assert len({one.client for one in arrivals}) == (8 if workload == "tree" else 6)
    assert all(one.prefix for one in arrivals)
    assert max(one.num_input + one.num_output for one in arrivals) < made.cluster.kv_tokens / 4


def test_more_of_the_prompts_is_found_cached_where_the_policy_looks_at_them() -> None:
    hits = {}
    for system in ("vtc", "dlpm"):
        record = Job(changed(scenario("tree", 2, 10.0), system, {}), 1).run()
        hits[system] = locality.figures_of(record)["hit_rate"] or 0.0
    assert hits["dlpm"] > 1.1 * hits["vtc"]


def test_too_small_a_gain_an_unfair_one_and_a_gap_above_the_bound_are_missed() -> None:
    plain = row("vtc", 100.0)
    assert [holds for _, holds in claims([plain, row("dlpm", 160.0)])] == [True, True, True]
    assert [holds for _, holds in claims([plain, row("dlpm", 140.0)])] == [True, False, True]
    assert [holds for _, holds in claims([plain, row("dlpm", 160.0, jain=0.9)])] == [True, False, True]
    assert [holds for _, holds in claims([plain, row("dlpm", 160.0, gap=11.0)])] == [True, True, False]
    others = [row("vtc", 100.0, workload="mooncake"), row("dlpm", 110.0, workload="mooncake")]
    assert all(holds for _, holds in claims(others)), "what is not promised is told"


def test_runs_are_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "locality.json"
    words = ["--workloads", "tree", "--replicas", "1", "--seeds", "1", "--seconds", "4", "--jobs", "1"]
    locality.main([*words, "--set", "quantum=4000", "--out", str(out)])
    assert [one["system"] for one in json.loads(out.read_text())["rows"]] == list(SYSTEMS)
    assert "tree, 1 replicas, 1 seeds" in capsys.readouterr().out
