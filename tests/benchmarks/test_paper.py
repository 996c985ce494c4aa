"""`make paper`: rows, tables, statements, and what it exits with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper, paper_claims
from benchmarks.paper import TRACE, Task, main, run_one, table_text
from benchmarks.paper_cases import CASES, FIGURES, SCHEDULERS, Case, twin_of_default
from benchmarks.paper_claims import CaseResult, claims
from fairserve.simulate.measures import Difference, Measures, measure
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord
from fairserve.simulate.seeds import summarise
from fairserve.simulate.workloads import parameters_of

TINY = Case(
    "tiny",
    "overload",
    {"fcfs": (None, 20.0, None, 450.0), "vtc": (None, 2.0, None, 450.0)},
    parameters={"duration_s": 20.0, "rates": (1.5, 3.0)},
    horizon_s=60.0,
    departs={"vtc": "it is tiny"},
)


def measured(row: str, seed: int = 0, **changes: Any) -> Measures:
    """A run of one request, with the figures that a test wants."""
    record = RequestRecord(Arrival("a", 0.0, "ann", 100, 50, 50), "finished", 0.0, 1.0, 5.0, 100, 0, 50)
    usual = {"bound": 100.0, "worst_gap": 10.0, "accumulated_difference": 10.0, "tokens_per_s": 450.0}
    return replace(measure(RunRecord("tiny", row, seed, 60.0, [record])), **(usual | changes))


def result_of(case: Case = TINY, ratios: dict[str, float] | None = None, **rows: dict[str, Any]) -> CaseResult:
    """``average``: of the difference; the rest are fields of Measures. Names of rows: + is written _."""
    summaries = {}
    for word, changes in rows.items():
        average = changes.pop("average", 10.0)
        row = word.replace("_", "+")
        summaries[row] = summarise([measured(row, difference=Difference(2 * average, average, 1.0), **changes)])
    return CaseResult(case, summaries, ratios or {})


def texts(result: CaseResult, word: str) -> dict[str, bool]:
    return {claim.text: claim.kept for claim in claims(result) if word in claim.text}


# --------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_names_rows_figures_and_parameters_that_exist(case: Case) -> None:
    rows = [row.name for row in case.schedulers()]
    for named in (case.published, case.departs, case.notes):
        assert set(named) <= set(rows), case.name
    assert all(len(numbers) == len(FIGURES) for numbers in case.published.values())
    assert set(case.parameters) <= set(parameters_of(case.workload).model_fields)
    assert "vtc" in rows and "fcfs" in rows


def test_the_published_table_of_arena_is_the_papers() -> None:
    arena = CASES["arena"]
    assert arena.published_of("fcfs")["difference.avg"] == 433.53
    assert arena.published_of("vtc+oracle")["difference.avg"] == 227.51
    assert arena.published_of("rpm(20)")["num_refused"] == 342
    assert arena.published_of("drr") == {}


def test_rate_limits_are_for_arena_only_and_the_default_is_not_run_twice() -> None:
    assert not any("rpm" in row.name for row in CASES["overload"].schedulers())
    arena = [row.name for row in CASES["arena"].schedulers()]
    assert sum("rpm" in name for name in arena) == 5
    twin = twin_of_default()
    assert ("default" in arena) == (twin is None)
    assert twin is None or SCHEDULERS[twin].fairness == SCHEDULERS["default"].fairness


def test_the_trace_stands_beside_its_notice() -> None:
    notice = (TRACE.parent / "README.md").read_text()
    assert TRACE.is_file() and TRACE.name in notice
    assert "Apache-2.0" in notice and "Ying Sheng" in notice and "VTC-artifact" in notice


def test_a_run_is_labelled_and_only_vtc_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", TINY)  # type: ignore[misc]
    fcfs, vtc = (run_one(Task("tiny", row, 0, "")).measures for row in ("fcfs", "vtc+oracle"))
    assert (fcfs.scenario, fcfs.policy, fcfs.bound) == ("tiny", "fcfs", None)
    assert vtc.policy == "vtc+oracle" and vtc.bound is not None and vtc.num_finished == 90


def test_the_ratio_of_the_window_is_of_client_0_to_client_1(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(TINY, window_s=(0.0, 1_000.0))
    monkeypatch.setitem(CASES, "tiny", case)  # type: ignore[misc]
    assert run_one(Task("tiny", "vtc", 0, "")).ratio == pytest.approx(30 / 60)


# ------------------------------------------------------------------------------------------------------- statements


def test_published_averages_that_lie_apart_must_come_in_the_same_order() -> None:
    case = replace(TINY, departs={})
    right, wrong = (result_of(case, fcfs={"average": 20.0}, vtc={"average": vtc}) for vtc in (3.0, 21.0))
    assert texts(right, "published order") == {"published order: 1 of 1 pairs that lie 20% apart": True}
    [(text, kept)] = texts(wrong, "published order").items()
    assert not kept and "the other way round: fcfs and vtc" in text


def test_an_average_that_is_too_far_off_is_missed_unless_a_reason_is_given() -> None:
    near, far = (result_of(fcfs={"average": average}) for average in (22.9, 23.1))
    assert list(texts(near, "average difference against").values()) == [True]
    [(text, kept)] = texts(far, "average difference against").items()
    assert not kept and text.endswith("missed by fcfs")
    assert texts(result_of(vtc={"average": 50.0}), "average difference against") == {}


def test_a_small_difference_is_none() -> None:
    case = replace(TINY, departs={})
    assert list(texts(result_of(case, vtc={"average": 4.9}), "average difference against").values()) == [True]


def test_on_overload_fcfs_must_accumulate_twenty_times_vtcs_difference() -> None:
    kept, missed = (
        result_of(fcfs={"accumulated_difference": fcfs}, vtc={"accumulated_difference": 10.0})
        for fcfs in (201.0, 199.0)
    )
    assert list(texts(kept, "accumulated").values()) == [True]
    assert list(texts(missed, "accumulated").values()) == [False]


def test_vtc_must_keep_fcfs_throughput() -> None:
    kept, missed = (result_of(fcfs={"tokens_per_s": 100.0}, vtc={"tokens_per_s": vtc}) for vtc in (97.5, 96.5))
    assert texts(kept, "over FCFS") == {"tokens/s of VTC over FCFS: 97.5% (promised: 97%)": True}
    assert list(texts(missed, "over FCFS").values()) == [False]


def test_a_gap_above_the_bound_is_missed_and_named() -> None:
    made = result_of(vtc={"worst_gap": 50.0, "bound": 100.0})
    assert list(texts(made, "bound").values()) == [True]
    made = result_of(vtc_oracle={"worst_gap": 101.0, "bound": 100.0})
    [(text, kept)] = texts(made, "bound").items()
    assert not kept and "vtc+oracle: 101 of 100" in text


def test_after_a_shift_lcf_repays_the_past_and_vtc_does_not() -> None:
    case = replace(TINY, window_s=(360.0, 600.0))
    rows = {"lcf": {"average": 1.0}, "vtc": {"average": 1.0}}
    for vtc, lcf, kept in ((1.04, 1.35, True), (0.96, 1.35, True), (1.2, 1.35, False), (1.0, 1.1, False)):
        made = result_of(case, {"vtc": vtc, "lcf": lcf}, **{row: dict(changes) for row, changes in rows.items()})
        assert list(texts(made, "client-0 receives").values()) == [kept], (vtc, lcf)


def test_refusals_are_counted_against_the_published_ones() -> None:
    arena = CASES["arena"]

    def made(refused: int) -> CaseResult:
        rows = {
            "rpm(5)": summarise([measured("rpm(5)", num_refused=refused, tokens_per_s=340.0)]),
            "vtc": summarise([measured("vtc", tokens_per_s=780.0)]),
        }
        return CaseResult(arena, rows, {})

    assert list(texts(made(918), "refused of").values()) == [True]
    assert list(texts(made(900), "refused of").values()) == [False]
    assert texts(made(918), "rpm(5) over VTC") == {"tokens/s of rpm(5) over VTC: 43.6% (published: 43.7%)": True}
    assert texts(replace(made(900), is_synthetic=True), "rpm(5)") == {}


def test_nothing_published_is_set_beside_a_synthetic_arena() -> None:
    made = replace(
        result_of(replace(TINY, departs={}), fcfs={"average": 500.0}, vtc={"average": 400.0}), is_synthetic=True
    )
    assert not any("published" in claim.text for claim in claims(made))
    text = table_text(made)
    assert "published" not in text.split("synthetic arena")[0] and "nothing that was published" in text


def test_the_table_has_published_values_beside_ours_and_says_why() -> None:
    text = table_text(result_of(fcfs={"average": 21.5}, vtc={"average": 3.5}))
    row = next(line for line in text.splitlines() if line.startswith("fcfs"))
    assert "21.5" in row and "20" in row
    assert "why vtc: it is tiny" in text
    assert "TTFT p99 s" in text and "jain" in text


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_writes_and_exits_by_its_statements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kind = replace(TINY, published={}, departs={})
    monkeypatch.setitem(CASES, "tiny", kind)  # type: ignore[misc]
    monkeypatch.setattr(paper_claims, "LEAST_GAIN", 0.5)
    words = ["--workloads", "tiny", "--policies", "fcfs,vtc,default,drr", "--seeds", "2", "--jobs", "1", "--out"]
    assert main([*words, str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "holds  average difference:" in printed and "MISSED" not in printed
    data = json.loads((tmp_path / "new" / "paper.json").read_text())
    assert set(data["cases"]["tiny"]["rows"]) == {"fcfs", "vtc", "drr", twin_of_default() or "default"}
    row = data["cases"]["tiny"]["rows"]["fcfs"]
    assert len(row["average_difference_by_seed"]) == 2 and row["figures"]["tokens_per_s"]["mean"] > 0
    assert data["machine"]["cores"] >= 1

    monkeypatch.setattr(paper_claims, "LEAST_GAIN", 1e9)
    assert main([*words, str(tmp_path)]) == 1
    assert "\nMISSED tiny: accumulated difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "overlode"], "unknown workload 'overlode'; known are arena, overload,"),
        (["--policies", "vtcc"], "unknown policy 'vtcc'; known are fcfs,"),
        (["--seeds", "0"], "--seeds and --jobs must be at least 1, not 0 and 2"),
        (["--trace", "nowhere.csv"], "there is no trace nowhere.csv"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().out


def test_without_the_trace_the_synthetic_arena_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert paper._trace("") == str(TRACE)
    assert paper._trace("synthetic") == ""
    monkeypatch.setattr(paper, "TRACE", tmp_path / "gone.csv.gz")
    assert paper._trace("") == ""
