"""``fairserve simulate``: what it prints and writes, on how many processes, and what it refuses with exit code 2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fairserve import cli
from fairserve.errors import ConfigError
from fairserve.simulate import command
from fairserve.simulate.command import Job, list_scenarios, run_jobs, simulate_command
from fairserve.simulate.records import RunRecord
from fairserve.simulate.scenario import BUILTIN, read_scenario
from fairserve.simulate.seeds import Summary
from tests.simulate.cluster_kit import one

Capture = pytest.CaptureFixture[str]

SMALL = """
about = "Two clients, a few seconds"
duration_s = 8.0
[workload]
kind = "mix"
parts = [
  { kind = "poisson", client = "greedy", rate = 6.0, num_input = 128, num_output = 20 },
  { kind = "poisson", client = "modest", rate = 1.0, num_input = 128, num_output = 20 },
]
[cluster]
replicas = 2
max_num_seqs = 4
step_time = { base_s = 0.1, per_prefill_token_s = 0.0001 }
"""
QUICK = ["workload.duration_s=8", "duration_s=10"]
"""The packaged overload, cut short."""


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Five requests of ann, then one of bob; granted in that order, and what became of them."""
    lines: list[dict[str, Any]] = [{"t": 50.0, "event": "began", "version": 1, "policy": "vtc", "epoch": 1}]
    common = {"input": 128, "max_output": 30, "weight": 1.0, "waited_s": 0.0, "is_retry": False}
    names = [("ann", f"a{i}") for i in range(5)] + [("bob", "b0")]
    for i, (client, request) in enumerate(names):
        lines.append({"t": 60 + i / 10, "event": "submit", "client": client, "request": request, **common})
    for i, (_, request) in enumerate(names):
        lines.append({"t": 61.0 + i, "event": "grant", "request": request, "replica": "live"})
        if request != "a4":
            lines.append({"t": 62.0 + i, "event": "finish", "request": request, "output": 20, "started": True})
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def no_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second."""
    monkeypatch.setattr(command, "draw", lambda *_: None)


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the first table by policy."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    table = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        cells = [cell for cell in line.split("  ") if cell.strip()]
        table[cells[0].strip()] = [cell.strip() for cell in cells[1:]]
    return table


# ----------------------------------------------------------------------------------------------------- the command line
def test_the_list_names_every_packaged_scenario_with_a_sentence(capsys: Capture) -> None:
    assert cli.main(["simulate", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(BUILTIN)
    assert all(len(line.split()) > 5 for line in printed)
    assert printed == list_scenarios().splitlines()


def test_a_scenario_two_policies_and_a_setting_give_two_rows(capsys: Capture) -> None:
    words = ["overload", "--policy", "fcfs", "--policy", "vtc", "dispatch.lookahead=0", *QUICK]
    assert cli.main(["simulate", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("overload, 1 seed\n")
    assert list(rows(printed)) == ["fcfs", "vtc"]


def test_without_a_scenario_it_is_overload_and_without_a_policy_its_own(capsys: Capture) -> None:
    assert cli.main(["simulate", *QUICK, "fairness.policy=drr", "fairness.prediction=none"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("overload, 1 seed\n")
    assert list(rows(printed)) == ["drr"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "unknown scenario 'nowhere': give the path of a .toml file, or one of arena, "),
        (["none.toml"], "cannot read none.toml: No such file"),
        (["overload", "--policy", "best"], "policy 'best': policy: Input should be 'vtc', 'wsc'"),
        (["overload", "dispatch.lookaheads=0"], "has no field 'lookaheads': did you mean 'lookahead'?"),
        (["overload", "dispatch.lookahead=-1"], "dispatch.lookahead: Input should be greater than or equal to 0"),
        (["overload", "fcfs"], "'fcfs' is not key=value"),
        (["overload", "--seeds", "0"], "at least one seed and one process are needed, not 0 and 1"),
        (["overload", "--jobs", "-1"], "at least one seed and one process are needed, not 1 and -1"),
        (["overload", "--replay", "none.jsonl"], "cannot read none.jsonl: No such file"),
        (["overload", "--policy", "vtc@round_robin"], "engine paper is one replica"),
        (["crash", "--policy", "rpm(9)@round_robin", "faults=[]"], "rpm refuses at the authority"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_2(
    words: list[str], message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["simulate", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("words", [["--seeds", "many"], ["overload", "--polcy", "vtc"], ["overload", "--seeds"]])
def test_an_option_that_is_not_there_exits_2(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["simulate", *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_folder_that_cannot_be_is_refused_before_anything_runs(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setattr(command, "run_jobs", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=r"cannot make the folder .*taken: File exists"):
        simulate_command(small, [], out=tmp_path / "taken")


# ------------------------------------------------------------------------------------------------ table, JSON and chart
def test_the_table_has_a_row_per_policy_with_the_mean_over_the_seeds(small: str) -> None:
    text = simulate_command(small, ["fcfs", "vtc", "rpm(20)"], num_seeds=3)
    assert text.startswith("small, 3 seeds: mean ± 95 % interval (Student's t)\n")
    table = rows(text)
    assert list(table) == ["fcfs", "vtc", "rpm(20)"]
    assert all("±" in " ".join(cells) for cells in table.values())


@pytest.mark.usefixtures("no_chart")
def test_a_run_has_the_seed_that_the_scenario_says_and_the_next_ones(small: str, tmp_path: Path) -> None:
    simulate_command(small, ["vtc"], ["seed=10"], num_seeds=3, out=tmp_path / "out")
    (result,) = json.loads((tmp_path / "out" / "small.json").read_text())["results"]
    assert result["seeds"] == [10, 11, 12]
    alone = simulate_command(small, ["vtc"], ["seed=11"], out=tmp_path / "alone")
    (other,) = json.loads((tmp_path / "alone" / "small.json").read_text())["results"]
    assert other["by_seed"] == [result["by_seed"][1]]
    assert alone.startswith("small, 1 seed\n")


def test_json_and_chart_are_written_where_out_says_and_named(small: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    text = simulate_command(small, ["fcfs", "vtc"], ["dispatch.lookahead=0"], out=out)
    assert text.splitlines()[-2:] == [str(out / "small.json"), str(out / "small.png")]
    data = json.loads((out / "small.json").read_text())
    assert [result["policy"] for result in data["results"]] == ["fcfs", "vtc"]
    assert data["settings"]["dispatch"]["lookahead"] == 0
    assert data["results"][0]["figures"]["num_requests"]["mean"] > 20
    assert (out / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_chart")
def test_the_same_command_writes_the_same_json(small: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        simulate_command(small, ["vtc", "fcfs"], num_seeds=2, out=tmp_path / folder)
    assert (tmp_path / "one" / "small.json").read_bytes() == (tmp_path / "two" / "small.json").read_bytes()


def test_without_matplotlib_there_is_a_json_and_a_word_about_the_chart(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError("charts need matplotlib")

    monkeypatch.setattr(command, "draw", fail)
    text = simulate_command(small, ["vtc"], out=tmp_path)
    assert text.splitlines()[-1] == str(tmp_path / "small.json")
    assert capsys.readouterr().err == "no chart: charts need matplotlib\n"


# -------------------------------------------------------------------------------------------------------- the processes
def test_two_processes_give_the_same_records_in_the_same_order_as_one(small: str) -> None:
    scenario = read_scenario(small)
    jobs = [Job(scenario, seed, label=f"run {seed}") for seed in (3, 1, 2)]
    alone, together = run_jobs(jobs, 1), run_jobs(jobs, 2)
    assert [record.policy for record in together] == ["run 3", "run 1", "run 2"]
    assert [replace(record, wall_s=0.0) for record in together] == [replace(record, wall_s=0.0) for record in alone]


def test_what_is_wrong_in_another_process_is_said_as_it_would_be_in_this_one(small: str) -> None:
    jobs = [Job(read_scenario(small), seed, (one("big", num_input=100_000),)) for seed in (1, 2)]
    with pytest.raises(ConfigError, match="request big has 100000 input"):
        run_jobs(jobs, 2)


def test_a_job_takes_its_arrivals_noise_and_label_along(small: str) -> None:
    scenario = read_scenario(small, ["fairness.prediction=foretold"])
    record = Job(scenario, 5, (one("only"),), label="mine").run()
    assert ([request.arrival.request_id for request in record.requests], record.policy) == (["only"], "mine")
    exact, noisy = (Job(scenario, 5, noise=noise).run().requests for noise in (0.0, 0.9))
    assert exact != noisy


# --------------------------------------------------------------------------------------------------------------- replay
def test_a_replay_shows_what_happened_and_what_would_have(small: str, log: Path) -> None:
    text = simulate_command(small, ["vtc", "fcfs"], replay=log)
    assert text.startswith("decisions, 1 seed\n")
    assert list(rows(text)) == ["vtc (live)", "vtc", "fcfs"]
    assert "wait s under vtc" in text and "wait s under fcfs" in text
    ann, bob = (
        next(line for line in text.splitlines() if line.startswith(client)).split() for client in ("ann", "bob")
    )
    assert ann[1:3] == ["5", "2.80"] and bob[1:3] == ["1", "5.50"]
    assert float(bob[3]) < 1.0  # two replicas of four slots hold all six
    assert text.count("1 of 6 requests have no answer of known length in the log") == 1


def test_what_a_log_cannot_tell_is_left_open_in_the_row_of_what_happened(
    small: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Summary] = []
    monkeypatch.setattr(command, "render_table", lambda summaries: shown.extend(summaries) or "")
    simulate_command(small, ["vtc"], replay=log)
    live, vtc = (summary.figures for summary in shown)
    for figure in ("ttft.p50", "worst_gap", "idle_share", "gap_to_bound"):
        assert live[figure] is None
    assert live["num_finished"] is not None and live["num_finished"].mean == 5
    assert vtc["ttft.p50"] is not None


@pytest.mark.usefixtures("no_chart")
def test_a_replay_lasts_as_long_as_the_log(small: str, log: Path, tmp_path: Path) -> None:
    simulate_command(small, ["vtc"], replay=log, out=tmp_path / "out")
    data = json.loads((tmp_path / "out" / "decisions.json").read_text())
    assert [result["duration_s"] for result in data["results"]] == [pytest.approx(7.0, abs=0.01)] * 2


def test_prefixes_in_a_log_are_read_in_the_blocks_that_the_settings_say(
    small: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write_text(log.read_text().replace('"is_retry": false', '"is_retry": false, "prefix": [7, 8]'))
    lengths: list[int] = []

    def note(jobs: list[Job], num_processes: int) -> list[RunRecord]:
        lengths.append(len((jobs[0].arrivals or ())[0].prefix))
        return [job.run() for job in jobs]

    monkeypatch.setattr(command, "run_jobs", note)
    for tokens in (16, 64):
        simulate_command(small, ["vtc"], [f"dispatch.prefix_block_tokens={tokens}"], replay=log)
    assert lengths == [2, 8]


def test_a_replay_on_replicas_too_small_for_it_names_the_request(small: str, log: Path) -> None:
    with pytest.raises(ConfigError, match="request a0 has 128 input"):
        simulate_command(small, ["vtc"], ["cluster.kv_tokens=64"], replay=log)


def test_a_replay_from_the_command_line(small: str, log: Path, capsys: Capture) -> None:
    assert cli.main(["simulate", small, "--replay", str(log), "--policy", "fcfs"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["vtc (live)", "fcfs"]
