"""Prompts give way to running streams: steps stay within ``max_step_s`` where measured times say how. Virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from fairserve.engine.budget import LEAST_PROMPT_TOKENS, StepBudget
from fairserve.engine.events import StepEvents
from fairserve.engine.pace import Pace
from tests.engine.support import Driver, drive, prompt_of, request

BASE_S, TOKEN_S = 0.010, 0.001


def timed(llama: Any, **changes: Any) -> Driver:
    """An engine whose steps take 10 ms and 1 ms more for each prompt token."""
    driver = drive(llama, max_num_batched_tokens=64, **changes)
    runner: Any = driver.engine._runner
    clock: Any = driver.engine._clock
    run = runner.run

    def slow(plan: Any) -> Any:
        clock.advance(BASE_S + TOKEN_S * sum(len(chunk.token_ids) for chunk in plan.prefills))
        return run(plan)

    runner.run = slow
    return driver


def steps_beside_a_stream(driver: Driver) -> list[StepEvents]:
    """Steps in which a stream decodes while other prompts come, after one prompt computed alone."""
    driver.add(request("stream", prompt_of(70), max_tokens=50, ignore_eos=True))
    driver.step()
    driver.step()
    driver.add(*(request(f"r{i}", prompt_of(100, i), max_tokens=2, ignore_eos=True) for i in range(5)))
    steps = []
    while driver.engine.has_work():
        steps.append(driver.step())
    return [step for step in steps if step.num_prefill_tokens and step.num_decode_tokens]


def test_a_step_with_streams_stays_within_its_time(llama):
    steps = steps_beside_a_stream(timed(llama, max_step_s=0.040))
    assert max(step.step_s for step in steps) <= 0.040 + 1e-9
    full = [step.num_prefill_tokens for step in steps[1:-1]]
    assert min(full) >= 20, "and no shorter than it must be"


def test_without_a_limit_prompts_take_all_they_may(llama):
    steps = steps_beside_a_stream(timed(llama))
    assert max(step.step_s for step in steps) == pytest.approx(BASE_S + 63 * TOKEN_S)


def test_prompts_go_on_where_no_step_is_short_enough(llama):
    steps = steps_beside_a_stream(timed(llama, max_step_s=0.001))
    assert {step.num_prefill_tokens for step in steps[:-1]} == {LEAST_PROMPT_TOKENS}


def test_a_prompt_that_nobody_waits_for_is_not_cut(llama):
    driver = timed(llama, max_step_s=0.001)
    driver.add(request("alone", prompt_of(100), max_tokens=1))
    assert [driver.step().num_prefill_tokens for _ in range(2)] == [64, 36]


def test_a_shortage_of_memory_still_holds():
    budget = StepBudget(256, 8, max_step_s=1.0)
    budget.took(100, 0.1)
    budget.halve_tokens(64)
    assert budget.prompt_tokens(4) == 28


def test_the_line_through_the_steps_is_found():
    pace = Pace()
    for tokens in (0, 100, 30, 0, 200):
        pace.saw(tokens, 0.02 + 0.003 * tokens)
    assert pace.tokens_within(0.32) == pytest.approx(100, rel=0.02)


def test_a_machine_that_slows_down_is_noticed_within_some_steps():
    pace = Pace()
    for tokens in (0, 100) * 10:
        pace.saw(tokens, 0.01 + 0.001 * tokens)
    for tokens in (0, 100) * 15:
        pace.saw(tokens, 0.02 + 0.002 * tokens)
    assert pace.tokens_within(0.22) == pytest.approx(100, rel=0.1)


def test_before_a_prompt_was_seen_nothing_is_promised():
    pace = Pace()
    assert pace.tokens_within(1.0) == 0
    pace.saw(0, 0.01)
    assert pace.tokens_within(1.0) == 0


def test_prompts_that_cost_nothing_are_not_held_back():
    pace = Pace()
    for tokens in (0, 256) * 40:
        pace.saw(tokens, 0.0)
    assert pace.tokens_within(0.01) == float("inf")
