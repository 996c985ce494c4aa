"""`make bench`: its table is the README's, and nothing that makes a figure is missing in it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import all as bench
from benchmarks.all import FIGURES, README, RESULTS, ROOT, chosen, command_of, listing, main, table, with_table

MODULES = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()} - {"all"}


def test_the_readme_has_the_table_of_now() -> None:
    text = README.read_text()
    assert text == with_table(text), "FIGURES has changed: python -m benchmarks.all --write"


def test_every_module_that_makes_a_figure_is_in_the_table() -> None:
    named = {word for one in FIGURES for word in command_of(one)}
    missing = {f"benchmarks.{name}" for name in MODULES} - named - {"benchmarks.flood"}  # which is `make load`
    assert not missing, f"add a row to FIGURES for {missing}"


def test_every_result_that_is_kept_belongs_to_a_figure() -> None:
    kept = {path for one in FIGURES for path in one.kept}
    results = set(RESULTS.glob("*.json"))
    assert results <= kept, f"no figure of these names: {sorted(path.name for path in results - kept)}"
    (skew,) = chosen("skew")
    assert skew.kept and str(skew.kept[-1].relative_to(ROOT)) in listing([skew])


def test_what_runs_has_a_name_of_its_own() -> None:
    names = [one.name for one in FIGURES if one.is_run]
    assert len(names) == len(set(names))
    assert [one.name for one in chosen(None)] == names


def test_a_make_target_in_the_table_runs_the_module_that_bench_runs_in_its_place() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for one in FIGURES if (words := shlex.split(one.command))[0] == "make" and one.is_run}
    assert targets == {"demo", "paper", "chaos"}
    for target in targets:
        assert re.search(rf"^{target}:.*\n\t@\$\(BIN\)/python -m benchmarks.{target} \$\(ARGS\)$", makefile, flags=re.M)


def test_arguments_of_a_make_target_reach_its_module() -> None:
    (pairs,) = chosen("pairs")
    assert command_of(pairs) == [sys.executable, "-m", "benchmarks.demo", "--pairs", "10", "--out", "out/pairs"]
    (bounds,) = chosen("bounds")
    assert command_of(bounds)[:3] == [sys.executable, "-m", "tests.properties.run_bounds"]


@pytest.mark.parametrize(("figure"), [one for one in FIGURES if one.is_run], ids=lambda one: f"{one.name}")
def test_every_module_that_runs_exists(figure: bench.Figure) -> None:
    module = Path(*command_of(figure)[2].split("."))
    assert (ROOT / module.with_suffix(".py")).exists() or (ROOT / module / "__main__.py").exists()


def test_only_names_figures_and_an_unknown_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert [one.name for one in chosen("slots, control")] == ["control", "slots"], "in the order of the table"
    with pytest.raises(SystemExit):
        main(["--only", "slots,nothing"])
    assert "no figure is called nothing; there are demo," in capsys.readouterr().err
    with pytest.raises(ValueError, match="names no figure"):
        chosen(" ,")


def test_the_list_says_how_long_it_takes_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    assert main(["--list", "--only", "slots,control"]) == 0
    told = capsys.readouterr().out
    assert "2 figures, about 0 h 5 min" in told and "-m benchmarks.control" in told


def test_a_command_that_fails_does_not_hold_up_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(command[2])
        return SimpleNamespace(returncode=int(command[2].endswith("control")))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["--only", "slots,control"]) == 1
    assert ran == ["benchmarks.control", "benchmarks.slots"]
    assert "failed: control" in capsys.readouterr().err


def test_a_variant_has_no_name_in_the_table() -> None:
    rows = table().splitlines()[2:]
    assert len(rows) == len(FIGURES)
    assert sum(row.startswith("|  |") for row in rows) == sum(not one.is_run for one in FIGURES)
