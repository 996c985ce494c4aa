"""Seeds to estimates, estimates to table, JSON and chart."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from fairserve.errors import ConfigError
from fairserve.simulate.chart import MAX_LINES, draw, service_over_time
from fairserve.simulate.measures import Measures, measure
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord
from fairserve.simulate.report import MAX_CLIENTS, as_json, render_table, write
from fairserve.simulate.seeds import Estimate, Summary, estimate, summarise, t_975
from fairserve.simulate.service_curves import ServiceCurves


def run_of(
    policy: str = "vtc", seed: int = 1, ttft_s: float = 2.0, num_clients: int = 2, refused: str = "", **more: Any
) -> RunRecord:
    """Each client sends one request; client k's output is k + 1 tokens."""
    requests = []
    for k in range(num_clients):
        arrival = Arrival(str(k), 1.0, f"client-{k:02}", 10, k + 1, k + 1)
        requests.append(RequestRecord(arrival, "finished", 1.5, 1.0 + ttft_s, 20.0, 10, 0, k + 1))
    if refused:
        requests.append(RequestRecord(Arrival("r", 2.0, "client-00", 10, 1, 1), "refused", reason=refused))
    return RunRecord("toy", policy, seed, 120.0, requests, **more)


def measures_of(*args: Any, **kwargs: Any) -> Measures:
    return measure(run_of(*args, **kwargs))


def summary_of(policy: str = "vtc", *ttfts_s: float, **more: Any) -> Summary:
    return summarise([measures_of(policy, seed, ttft_s, **more) for seed, ttft_s in enumerate(ttfts_s or (2.0,))])


# ---------------------------------------------------------------------------------------------------------------- seeds


def test_an_interval_is_students() -> None:
    """By hand: mean 3, standard deviation sqrt(2.5), 4 degrees of freedom: 2.776 * sqrt(2.5 / 5)."""
    made = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made is not None and made.half_width is not None and made.low is not None and made.high is not None
    assert (made.mean, made.num) == (3.0, 5)
    assert made.half_width == pytest.approx(2.776 * 0.5**0.5)
    assert made.high - made.low == pytest.approx(2 * made.half_width)


def test_one_seed_has_no_interval_and_none_has_no_estimate() -> None:
    assert estimate([4.0]) == Estimate(4.0, None, 1)
    assert estimate([]) is None


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (4, 2.776), (30, 2.042), (31, 2.0395), (60, 2.0003)])
def test_the_quantiles_of_students_t_are_the_tables(degrees: int, value: float) -> None:
    assert t_975(degrees) == pytest.approx(value, abs=1e-4)


def test_every_figure_is_averaged_over_the_seeds() -> None:
    summary = summary_of("vtc", 2.0, 4.0, 6.0)
    assert summary.seeds == (0, 1, 2)
    assert summary.mean("ttft.p50") == pytest.approx(4.0)
    assert summary.mean("difference.avg") is not None
    assert summary.mean("jain") is None
    client = summary.clients()["client-01"]["ttft.p99"]
    assert client is not None and client.mean == pytest.approx(4.0)


def test_a_reason_that_one_seed_lacks_counts_as_none_there() -> None:
    summary = summarise([measures_of(seed=1), measures_of(seed=2, refused="rate_limited")])
    assert summary.mean("refused.rate_limited") == 0.5


def test_a_figure_that_one_seed_lacks_is_averaged_over_the_others() -> None:
    summary = summarise([measures_of(seed=1, bound=100.0), measures_of(seed=2)])
    assert summary.figures["bound"] == Estimate(100.0, None, 1)


def test_what_does_not_belong_together_is_not_averaged() -> None:
    with pytest.raises(ConfigError, match="toy under fcfs, toy under vtc"):
        summarise([measures_of("vtc", 1), measures_of("fcfs", 2)])
    with pytest.raises(ConfigError, match="the seeds are 3, 3"):
        summarise([measures_of(seed=3), measures_of(seed=3)])
    with pytest.raises(ConfigError, match="at least one run"):
        summarise([])


# ---------------------------------------------------------------------------------------------------------------- table


def test_the_table_is_aligned_with_a_row_per_policy() -> None:
    text = render_table([summary_of("fcfs", 30.0, 40.0), summary_of("vtc", 2.0, 2.0)], ["ttft.p50", "jain"])
    assert text.splitlines() == [
        "toy, 2 seeds: mean ± 95 % interval (Student's t)",
        "",
        "policy     TTFT p50 s  jain",
        "------  -------------  ----",
        "fcfs    35.00 ± 63.53     -",
        "vtc                 2     -",
    ]


def test_published_values_stand_beside_ours_and_the_reason_at_the_end() -> None:
    text = render_table(
        [summary_of("fcfs"), summary_of("vtc")],
        ["ttft.p50", "tokens_per_s"],
        published={"vtc": {"ttft.p50": 1.75}},
        notes={"vtc": "no adapters here"},
    )
    head, _, fcfs, vtc = text.splitlines()[2:]
    assert head.split("  ")[-1] == "why"
    assert head.count("published") == 1
    assert fcfs.split() == ["fcfs", "2", "-", "1.15"]
    assert vtc.split() == ["vtc", "2", "1.75", "1.15", "no", "adapters", "here"]


def test_several_scenarios_are_told_apart() -> None:
    other = RunRecord("other", "vtc", 1, 120.0, run_of().requests)
    text = render_table([summary_of(), summarise([measure(other)])], ["num_finished"])
    assert text.splitlines()[0] == "toy, other, 1 seed"
    assert [line.split()[:2] for line in text.splitlines()[4:]] == [["toy", "vtc"], ["other", "vtc"]]


def test_a_wrong_name_is_answered_with_the_nearest_right_one() -> None:
    with pytest.raises(ConfigError, match=r"no figure named 'ttft.p5': did you mean 'ttft.p50'"):
        render_table([summary_of()], ["ttft.p5"])
    with pytest.raises(ConfigError, match=r"no figure named 'diff.*': did you mean 'difference.avg'"):
        render_table([summary_of()], published={"vtc": {"difference.av": 1.0}})
    with pytest.raises(ConfigError, match="no policy in this table named 'lcf': known: vtc"):
        render_table([summary_of()], notes={"lcf": "?"})
    with pytest.raises(ConfigError, match="at least one summary"):
        render_table([])


def test_a_reason_of_refusal_may_be_a_column_even_where_nobody_was_refused() -> None:
    assert render_table([summary_of()], ["refused.rate_limited"]).splitlines()[-1].split() == ["vtc", "-"]


# ----------------------------------------------------------------------------------------------------------------- JSON


def test_the_json_holds_seeds_estimates_and_versions_and_comes_back_as_written(tmp_path: Path) -> None:
    data = as_json([summary_of("vtc", 2.0, 3.0, refused="rate_limited")], {"memory_tokens": 10_000})
    write(tmp_path / "new" / "toy.json", data)
    back = json.loads((tmp_path / "new" / "toy.json").read_text())
    assert back == data
    assert set(back["versions"]) == {"fairserve", "python", "numpy"}
    assert back["settings"] == {"memory_tokens": 10_000}
    [result] = back["results"]
    assert (result["scenario"], result["policy"], result["seeds"]) == ("toy", "vtc", [0, 1])
    assert result["figures"]["ttft.p50"] == {"mean": 2.5, "half_width": 6.353, "num": 2}
    assert result["figures"]["jain"] is None
    assert [seed["ttft.p50"] for seed in result["by_seed"]] == [2, 3]
    assert result["clients"]["client-01"]["service"]["mean"] == 14
    assert list(tmp_path.joinpath("new").iterdir()) == [tmp_path / "new" / "toy.json"]


def test_the_json_does_not_depend_on_how_long_it_took() -> None:
    fast, slow = (summarise([measures_of(wall_s=wall_s)]) for wall_s in (0.1, 9.0))
    assert as_json([fast]) == as_json([slow])


def test_the_json_lists_the_clients_that_received_most_and_counts_them_all() -> None:
    [result] = as_json([summary_of(num_clients=MAX_CLIENTS + 3)])["results"]
    assert result["num_clients"] == MAX_CLIENTS + 3
    assert list(result["clients"]) == [f"client-{k:02}" for k in range(3, MAX_CLIENTS + 3)]


def test_what_json_has_not_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    for wrong in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises(ConfigError, match=r"cannot write toy\.json as JSON"):
            write(tmp_path / "toy.json", as_json([summary_of()], {"wrong": wrong}))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- chart


def test_the_chart_is_a_picture_and_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg", "one.png"):
        draw([run_of(num_clients=2)], tmp_path / "new" / name)
    assert (tmp_path / "new" / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "one.svg").read_bytes() == (tmp_path / "new" / "two.svg").read_bytes()


def texts(path: Path) -> str:
    """matplotlib leaves every text of an SVG in a comment beside its outlines."""
    return "\n".join(line.strip() for line in path.read_text().splitlines() if line.strip().startswith("<!--"))


def test_clients_beyond_twelve_share_a_band_and_the_legend_says_so(tmp_path: Path) -> None:
    draw([run_of(num_clients=MAX_LINES + 3)], tmp_path / "many.svg")
    found = texts(tmp_path / "many.svg")
    assert found.count("<!-- client-") == MAX_LINES
    assert "<!-- client-14 -->" in found and "<!-- client-02 -->" not in found
    assert "<!-- 3 others, least to most -->" in found
    draw([run_of(num_clients=MAX_LINES)], tmp_path / "few.svg")
    assert "others" not in texts(tmp_path / "few.svg")


def test_a_client_has_one_colour_in_all_columns(tmp_path: Path) -> None:
    """In the second run the order of service is the other way round."""
    one, two = run_of("fcfs"), run_of("vtc")
    two.requests[0].num_output = 100
    draw([one, two], tmp_path / "pair.svg")
    names = [line for line in texts(tmp_path / "pair.svg").splitlines() if "client-" in line]
    assert names == ["<!-- client-00 -->", "<!-- client-01 -->"] * 2


def test_axes_name_their_units_and_the_bound_is_told(tmp_path: Path) -> None:
    draw([run_of("fcfs"), run_of("vtc", worst_gap=40.0, bound=1234.0)], tmp_path / "pair.svg")
    found = texts(tmp_path / "pair.svg")
    for text in ("toy, fcfs, seed 1", "toy, vtc, seed 1", "time, s", "worst gap while waiting 40, bound 1,234"):
        assert text in found
    assert "(service / weight per s)" in found and "(tokens, an output token twice)" in found


def test_a_name_is_drawn_as_it_is(tmp_path: Path) -> None:
    run = run_of(num_clients=0)
    for name in ("$^$", "_hidden"):  # as a formula, the first is a syntax error
        run.requests.append(RequestRecord(Arrival(name, 1.0, name, 10, 1, 1), "finished", 1.0, 2.0, 9.0, 10, 0, 1))
    draw([run], tmp_path / "names.svg")
    assert "_hidden" in texts(tmp_path / "names.svg")


def test_a_runs_own_samples_are_drawn_where_it_has_them() -> None:
    run = run_of(service=[(0.0, {}), (60.0, {"client-01": 5.0}), (120.0, {"client-00": 1.0, "client-01": 9.0})])
    times, service = service_over_time(run, ServiceCurves(run))
    assert times.tolist() == [0.0, 60.0, 120.0]
    assert service.tolist() == [[0.0, 0.0, 1.0], [0.0, 5.0, 9.0]]
    without = run_of()
    times, service = service_over_time(without, ServiceCurves(without))
    assert service[:, -1].tolist() == [12.0, 14.0]


def test_an_empty_run_can_be_drawn(tmp_path: Path) -> None:
    draw([run_of(num_clients=0)], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_another_kind_of_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg, not as 'chart\.pdf'"):
        draw([run_of()], tmp_path / "chart.pdf")
    with pytest.raises(ConfigError, match="at least one run"):
        draw([], tmp_path / "chart.png")


def test_without_matplotlib_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without_matplotlib(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ConfigError, match=r"pip install 'fairserve\[bench\]'"):
        draw([run_of()], tmp_path / "chart.png")
