"""Greedy output equals transformers' generate, token for token, whatever the batch looks like."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.engine.support import drive, prepare, prompt_of, reference, request, tiny

LENGTHS = (1, 3, 17, 40, 5, 64)
MAX_TOKENS = 20
PROMPTS = {f"r{i}": prompt_of(length, i) for i, length in enumerate(LENGTHS)}


@cache
def wanted(kind: str) -> dict[str, list[int]]:
    model = tiny(kind)
    return {name: reference(model, prompt, MAX_TOKENS) for name, prompt in PROMPTS.items()}


@cache
def loaded(kind: str, cpu_linear: str) -> Any:
    return prepare(tiny(kind), cpu_linear)


@pytest.mark.parametrize("cpu_linear", ["eager", "packed", "auto"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="at-once"),
        pytest.param({"max_num_batched_tokens": 9}, id="chunked"),
        pytest.param({"max_num_seqs": 2}, id="two-slots"),
        pytest.param({"kv_cache_tokens": 128, "max_num_batched_tokens": 16}, id="preempted"),
    ],
)
def test_greedy_output_equals_generate(kind, cpu_linear, changes):
    driver = drive(loaded(kind, cpu_linear), **changes)
    driver.add(*(request(name, prompt, max_tokens=MAX_TOKENS) for name, prompt in PROMPTS.items()))
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted(kind)
    if "kv_cache_tokens" in changes:
        assert driver.num_preempted > 0, "this case is about preemption"


def test_the_references_end_both_ways():
    lengths = {len(tokens) for kind in ("llama", "qwen2") for tokens in wanted(kind).values()}
    assert MAX_TOKENS in lengths
    assert min(lengths) < MAX_TOKENS, "some text should end by EOS"


def test_requests_that_arrive_while_others_run_get_the_same_tokens(llama):
    driver = drive(llama, max_num_batched_tokens=12)
    for name, prompt in PROMPTS.items():
        driver.add(request(name, prompt, max_tokens=MAX_TOKENS))
        driver.step()
        driver.step()
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted("llama")


def test_scattered_blocks_change_nothing(llama):
    driver = drive(llama, block_size=1, kv_cache_tokens=200, max_num_seqs=6)
    driver.add(*(request(name, prompt, max_tokens=MAX_TOKENS) for name, prompt in PROMPTS.items()))
    scattered = 0
    while driver.engine.has_work():
        driver.step()
        scattered += sum(driver.engine._kv.start(name) is None for name in driver.engine._batcher.running)
    assert scattered > 0, "this case is about scattered sequences"
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted("llama")


def test_two_engines_in_one_process_do_not_meet():
    drivers = [drive(loaded(kind, "eager")) for kind in ("llama", "gpt2")]
    for driver in drivers:
        driver.add(*(request(name, prompt, max_tokens=MAX_TOKENS) for name, prompt in PROMPTS.items()))
    while any(driver.engine.has_work() for driver in drivers):
        for driver in drivers:
            driver.step()
    for driver, kind in zip(drivers, ("llama", "gpt2"), strict=True):
        assert {name: driver.tokens(name) for name in PROMPTS} == wanted(kind)


def test_the_context_ends_at_max_model_len(llama):
    driver = drive(llama, max_model_len=32)
    driver.add(request("r", prompt_of(30), max_tokens=50, ignore_eos=True))
    driver.run()
    assert len(driver.tokens("r")) == 2
    assert driver.last("r").finish_reason == "length"
