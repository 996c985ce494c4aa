"""The hardware model of the simulator: its numbers, its files, and the fit that makes it from measured steps."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
import statistics
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fairserve.errors import ConfigError
from fairserve.fairness.cost import WeightedTokens
from fairserve.simulate.fit import errors, fit, is_doubtful, non_negative, split, table
from fairserve.simulate.step_time import (
    COEFFICIENTS,
    H200,
    LLAMA2_7B,
    LLAMA3_8B,
    PRESETS,
    Origin,
    StepTime,
    jitter,
    roofline,
)

RUNS = Path(__file__).parents[2].parent / "shared" / "traces" / "vtc_artifact_runs.csv.gz"
TRUE = StepTime(0.02, 0.5e-3, 3e-6, 0.01, 0.8e-3, 2e-7)


@dataclass(frozen=True)
class Step:
    group: int
    num_decodes: int
    decode_context_tokens: int
    num_prefill_tokens: int
    prefill_context_tokens: int
    step_s: float


def steps(truth: StepTime, rng: random.Random, noise: float = 0.0, num_slow: int = 0) -> list[Step]:
    """A grid of steps as ``truth`` has them, up to ``noise`` off; every ``num_slow``-th lasts three times as long."""
    made = []
    grid = itertools.product((0, 1, 4, 16), (32, 512, 2048), (0, 16, 256), (1, 4))
    for group, (decodes, context, prompt, chunks) in enumerate(grid):
        if not decodes and not prompt:
            continue
        work = (decodes, decodes * context, prompt, prompt * chunks * 256)
        factor = jitter(rng, noise) * (3.0 if num_slow and group % num_slow == 0 else 1.0)
        made.append(Step(group, *work, truth.seconds(*work) * factor))
    return made


# -- the function -----------------------------------------------------------------------------------------------------


def test_the_a10g_steps_are_the_published_fit() -> None:
    a10g = PRESETS["a10g-llama2-7b"]
    assert a10g.seconds(32, 10_000, 0) == pytest.approx(0.019 + 0.245e-3 * 32 + 2.0e-6 * 10_000)
    assert a10g.seconds(0, 0, 512) == pytest.approx(0.036 + 0.213e-3 * 512)


def test_a_step_that_computes_nothing_takes_no_time() -> None:
    assert TRUE.seconds(0, 0, 0) == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_more_work_never_takes_less_time(name: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        less = [rng.randrange(64), rng.randrange(20_000), rng.randrange(512), rng.randrange(1_000_000)]
        for i in range(4):
            more = [value + (j == i) * rng.randrange(1, 100) for j, value in enumerate(less)]
            assert PRESETS[name].seconds(*more) >= PRESETS[name].seconds(*less)


def test_jitter_stays_inside_its_spread_keeps_the_mean_and_repeats_with_the_seed() -> None:
    drawn = [jitter(random.Random(i), 0.05) for i in range(2000)]
    assert all(0.95 <= factor <= 1.05 for factor in drawn)
    assert statistics.mean(drawn) == pytest.approx(1.0, abs=0.005)
    assert jitter(random.Random(7), 0.05) == drawn[7]


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_coefficient_that_is_no_duration_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="per_decode_s"):
        StepTime(0.01, per_decode_s=value)


# -- presets ----------------------------------------------------------------------------------------------------------


def test_every_preset_says_where_it_comes_from() -> None:
    kinds = {name: made.origin.kind for name, made in PRESETS.items() if made.origin is not None}
    assert kinds == {
        "a10g-llama2-7b": "fitted",
        "a10g-slora-llama2-7b": "fitted",
        "a100-llama2-7b": "estimated",
        "a100-llama2-13b": "estimated",
        "h200-llama3-8b": "estimated",
        "cpu-smollm2-135m": "measured",
    }
    assert all("not measured" in made.origin.source for made in PRESETS.values() if made.origin.kind == "estimated")


def test_the_cpu_preset_was_measured_well() -> None:
    origin = PRESETS["cpu-smollm2-135m"].origin
    assert origin is not None and origin.mean_error is not None
    assert origin.mean_error < 0.15
    assert origin.num_held_out >= 20
    assert origin.engine["num_threads"] == 2


def test_a_name_that_is_neither_preset_nor_file_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"'h100'.*\.json.*a10g-llama2-7b, a10g-slora-llama2-7b, a100-llama2-7b"):
        StepTime.named("h100")


def test_a_file_is_named_relative_to_the_scenario(tmp_path: Path) -> None:
    TRUE.save(tmp_path / "mine.json")
    assert StepTime.named("mine.json", tmp_path) == TRUE
    assert StepTime.named("h200-llama3-8b", tmp_path) is PRESETS["h200-llama3-8b"]


# -- the roofline -----------------------------------------------------------------------------------------------------


def test_a_perfect_device_reads_its_weights_once_and_computes_two_operations_per_parameter() -> None:
    ideal = roofline(H200, LLAMA2_7B, memory_efficiency=1.0, compute_efficiency=1.0, overhead_s=0.0)
    assert ideal.base_s == pytest.approx(2 * 6.738e9 / 4.8e12)
    assert ideal.per_context_token_s == pytest.approx(524_288 / 4.8e12)
    assert ideal.per_prefill_token_s == ideal.per_decode_s == pytest.approx(2 * 6.738e9 / 989e12)
    assert ideal.per_prefill_context_s == pytest.approx(4 * 32 * 4096 / 989e12)


def test_grouped_kv_heads_make_the_context_four_times_cheaper() -> None:
    one, other = roofline(H200, LLAMA2_7B), roofline(H200, LLAMA3_8B)
    assert one.per_context_token_s == pytest.approx(4 * other.per_context_token_s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_efficiency": 0.0}, "memory_efficiency"),
        ({"compute_efficiency": 1.5}, "compute_efficiency"),
        ({"overhead_s": -0.001}, "overhead_s"),
        ({"device": replace(H200, flops_per_s=0.0)}, "flops_per_s"),
        ({"model": replace(LLAMA2_7B, num_layers=-1)}, "num_layers"),
    ],
)
def test_an_impossible_roofline_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        roofline(**{"device": H200, "model": LLAMA2_7B, **changes})


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    origin = Origin(kind="measured", model="m", engine={"num_threads": 2}, machine={"cores": 2}, mean_error=0.1)
    replace(TRUE, origin=origin).save(tmp_path / "p.json")
    read = StepTime.load(tmp_path / "p.json")
    assert read == TRUE
    assert read.origin == origin


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_s": -1}, "step_time.base_s: Input should be greater than or equal to 0"),
        ({"base_s": None}, "step_time.base_s: Input should be a valid number"),
        ({"per_decod_s": 1}, "did you mean 'per_decode_s'"),
        ({"per_decode_s": ...}, "step_time.per_decode_s: Field required"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "p.json"
    values = {**TRUE.coefficients, **change}
    file.write_text(json.dumps({"step_time": {name: value for name, value in values.items() if value is not ...}}))
    with pytest.raises(ConfigError) as refused:
        StepTime.load(file)
    assert message in str(refused.value) and str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "Invalid JSON"), ("[1]", "should be an object"), ("{}", "required")]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        StepTime.load(tmp_path / "p.json")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        StepTime.load(tmp_path / "none.json")


# -- the fit ----------------------------------------------------------------------------------------------------------


def test_exact_steps_give_their_coefficients_back(rng: random.Random) -> None:
    found = fit(steps(TRUE, rng))
    assert list(found.coefficients.values()) == pytest.approx(list(TRUE.coefficients.values()), rel=1e-6)
    assert found.origin is not None and found.origin.mean_error == pytest.approx(0.0, abs=1e-9)


def test_noisy_steps_give_nearly_the_coefficients_although_some_lasted_three_times_as_long(rng: random.Random) -> None:
    found = fit(steps(TRUE, rng, noise=0.05, num_slow=9))
    for name in ("base_s", "per_decode_s", "per_context_token_s", "per_prefill_token_s", "per_prefill_context_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.15), name
    clean = steps(TRUE, rng)
    assert errors(found, clean)[0] < 0.03


def test_no_coefficient_is_negative_although_prompts_came_cheaper_beside_decodes(rng: random.Random) -> None:
    cheaper = [replace(s, step_s=s.step_s * 0.6) if s.num_prefill_tokens else s for s in steps(TRUE, rng)]
    assert min(fit(cheaper).coefficients.values()) >= 0


def test_the_least_squares_without_negatives_are_optimal() -> None:
    """Kuhn and Tucker: no gradient where x > 0, an upward one where x = 0."""
    generator = np.random.default_rng(3)
    zeros = 0
    for _ in range(30):
        rows, wanted = generator.normal(size=(12, 5)), generator.normal(size=12)
        found = non_negative(rows, wanted)
        gradient = rows.T @ (rows @ found - wanted)
        zeros += int((found == 0).sum())
        assert found.min() >= 0
        assert np.abs(gradient[found > 0]).max(initial=0) < 1e-9
        assert gradient[found == 0].min(initial=0) > -1e-9
    assert zeros > 10


def test_a_group_is_fitted_to_or_held_out_as_a_whole(rng: random.Random) -> None:
    pairs = [replace(s, group=s.group // 2) for s in steps(TRUE, rng)]
    fitted, held_out = split(pairs)
    assert len(held_out) >= len(pairs) // 8
    assert not {s.group for s in fitted} & {s.group for s in held_out}
    origin = fit(pairs).origin
    assert origin is not None and (origin.num_samples, origin.num_held_out) == (len(fitted), len(held_out))


def test_the_errors_are_those_of_steps_that_were_not_fitted_to(rng: random.Random) -> None:
    made = steps(TRUE, rng)
    held_out = set(split(made)[1])
    origin = fit([replace(s, step_s=s.step_s * 2) if s in held_out else s for s in made]).origin
    assert origin is not None
    assert (origin.mean_error, origin.worst_error) == (pytest.approx(0.5), pytest.approx(0.5))


def test_the_largest_step_that_was_measured_is_noted(rng: random.Random) -> None:
    origin = fit(steps(TRUE, rng)).origin
    assert origin is not None
    assert origin.largest == {
        "num_decodes": 16,
        "decode_context_tokens": 16 * 2048,
        "num_prefill_tokens": 256,
        "prefill_context_tokens": 256 * 4 * 256,
    }


def test_a_fit_to_a_busy_machine_is_doubtful(rng: random.Random) -> None:
    assert not is_doubtful(fit(steps(TRUE, rng, noise=0.1)))
    assert is_doubtful(fit(steps(TRUE, rng, noise=0.8)))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda s: s.group < 3, "too few"),
        (lambda s: not s.num_decodes, "no measured step computed a decode"),
        (lambda s: not s.num_prefill_tokens, "no measured step computed prompt tokens"),
    ],
)
def test_samples_that_cannot_tell_are_refused(keep: object, message: str, rng: random.Random) -> None:
    assert callable(keep)
    with pytest.raises(ConfigError, match=message):
        fit([s for s in steps(TRUE, rng) if keep(s)])


def test_a_clock_that_stands_still_is_noticed(rng: random.Random) -> None:
    with pytest.raises(ConfigError, match="took no time"):
        fit([replace(s, step_s=0.0) for s in steps(TRUE, rng)])


def test_the_table_has_a_line_for_each_coefficient_and_one_for_the_errors(rng: random.Random) -> None:
    lines = table(fit(steps(TRUE, rng))).splitlines()
    assert len(lines) == 1 + len(COEFFICIENTS) + 1
    assert lines[1].split() == ["every", "step", "20", "ms"]
    assert lines[-1].startswith("fitted to ")


# -- against published runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "memory", "preset", "within"),
    [
        ("VTC:overload", 10_000, "a10g-llama2-7b", 0.05),
        ("FCFS:overload", 10_000, "a10g-llama2-7b", 0.05),
        ("sec6.4/35000/VTC-256:overload-s4", 35_000, "a100-llama2-13b", 0.07),
        ("sec6.4/65000/VTC-512:overload-s4", 65_000, "a100-llama2-13b", 0.07),
    ],
)
def test_a_run_that_vtc_published_lasts_as_long_in_a_replay(run: str, memory: int, preset: str, within: float) -> None:
    """Saturated runs: how long they last is the hardware's affair, hardly the scheduler's."""
    if not RUNS.exists():
        pytest.skip("the published runs are not here")
    with gzip.open(RUNS, "rt") as lines:
        rows = [row for row in csv.DictReader(lines) if row["run"] == run]
    lasted_s = max(float(row["req_time"]) + float(row["latency_s"]) for row in rows)
    requests = sorted((float(row["req_time"]), int(row["prompt_len"]), int(row["output_len"])) for row in rows)
    assert replayed_s(requests, memory, PRESETS[preset]) == pytest.approx(lasted_s, rel=within)


def replayed_s(requests: list[tuple[float, int, int]], memory: int, step_time: StepTime) -> float:
    """Seconds until all are served, first come first served, by the papers' engine: it prefills or decodes in a step,
    admits when idle and after every 10 decodes, and a batch fits if it will while it grows (two clients)."""
    arriving, waiting = deque(requests), deque[tuple[float, int, int]]()
    running: list[tuple[int, int]] = []  # (output tokens left, tokens held)
    now_s, num_decodes = 0.0, 0
    while arriving or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, arriving[0][0])
        while arriving and arriving[0][0] <= now_s:
            waiting.append(arriving.popleft())
        prompt = 0
        while waiting and (not running or num_decodes % 10 == 0 or prompt):
            _, num_input, num_output = waiting[0]
            grown = sorted([*running, (num_output - 1, num_input + 1)], reverse=True)
            left, held = np.array(grown).T
            peak = (left * np.arange(1, len(grown) + 1) + held.cumsum()).max()
            if prompt + num_input > max(memory / 6, 3072) or peak >= memory - 32 * 2:
                break
            waiting.popleft()
            running.append((num_output - 1, num_input + 1))
            prompt += num_input
        if prompt:
            now_s += step_time.seconds(0, 0, prompt)
        now_s += step_time.seconds(len(running), sum(held for _, held in running), 0)
        num_decodes += 1
        running = [(left - 1, held + 1) for left, held in running if left > 1]
    return now_s


@pytest.mark.parametrize("num_seqs", [1, 8])
def test_a_unit_of_service_takes_as_long_as_a_full_replica_takes_for_a_request(num_seqs: int) -> None:
    """Against the steps themselves: every slot runs such requests one after another, its prompts in one piece each."""
    cost = WeightedTokens(1.0, 2.0)
    num_input, num_output = 64, 32
    decodes = [TRUE.seconds(num_seqs, num_seqs * (num_input + i), 0) for i in range(num_output)]
    beside = TRUE.seconds(num_seqs, num_seqs * num_input, num_input, num_input**2) - TRUE.seconds(
        num_seqs, num_seqs * num_input, 0
    )
    whole_s = sum(decodes) / num_seqs + beside
    found = TRUE.seconds_per_service(cost, num_seqs, num_input, num_output)
    assert found == pytest.approx(whole_s / (num_input + 2 * num_output), rel=1e-3)
