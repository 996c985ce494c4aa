"""The embedded model, end to end: real prompts, real text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fairserve.config import EMBEDDED_MODEL
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.embedded import ensure_embedded
from fairserve.engine.loading import LoadedModel, load_model
from tests.engine.support import config, drive, request

pytestmark = pytest.mark.model

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Translate 'good morning' to Spanish 🙂.",
    "List three prime numbers, one per line.",
)
MAX_TOKENS = 16


@pytest.fixture(scope="session")
def smollm() -> LoadedModel:
    return load_model(EMBEDDED_MODEL, config(cpu_linear="auto"))


@pytest.fixture(scope="session")
def prompts(smollm) -> dict[str, tuple[int, ...]]:
    chats = ([{"role": "user", "content": question}] for question in QUESTIONS)
    encoded = (smollm.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats)
    return {f"r{i}": tuple(ids) for i, ids in enumerate(encoded)}


@pytest.fixture(scope="session")
def wanted(prompts) -> dict[str, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(ensure_embedded(EMBEDDED_MODEL), dtype=torch.float32)
    generated = {}
    for name, prompt in prompts.items():
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=MAX_TOKENS)
        generated[name] = output[0, len(prompt) :].tolist()
    return generated


def test_real_prompts_get_the_tokens_and_the_text_of_generate(smollm, prompts, wanted):
    driver = drive(smollm, block_size=16, max_num_batched_tokens=48)
    driver.add(*(request(name, prompt, max_tokens=MAX_TOKENS) for name, prompt in prompts.items()))
    driver.run()
    assert {name: driver.tokens(name) for name in prompts} == wanted
    for name in prompts:
        text = smollm.tokenizer.decode(wanted[name], skip_special_tokens=True)
        assert driver.text(name) == text.rstrip("\ufffd")
    assert "Paris" in driver.text("r0")
    assert driver.last("r0").finish_reason == "stop"
    assert driver.last("r1").finish_reason == "length"


def test_preempted_real_prompts_get_the_same_tokens(smollm, prompts, wanted):
    driver = drive(smollm, block_size=4, kv_cache_tokens=132)
    driver.add(*(request(name, prompt, max_tokens=MAX_TOKENS) for name, prompt in prompts.items()))
    driver.run()
    assert {name: driver.tokens(name) for name in prompts} == wanted
    assert driver.num_preempted > 0


@pytest.mark.parametrize("shares", [False, True])
def test_a_system_prompt_that_was_computed_once_gives_the_same_tokens(smollm, monkeypatch, shares):
    monkeypatch.setattr(SdpaAttention, "shares_blocks", shares)
    system = {"role": "system", "content": "You answer in one short sentence, politely, and never name a source. " * 2}
    chats = ([system, {"role": "user", "content": question}] for question in QUESTIONS[:3])
    encoded = [smollm.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    made = {}
    for is_on in (False, True):
        driver = drive(smollm, block_size=16, max_num_batched_tokens=64, prefix_cache=is_on)
        for i, prompt in enumerate(encoded):  # the second finds it in place or shared, the third beside a running one
            driver.add(request(f"r{i}", prompt, max_tokens=6))
            for _ in range(8 if i == 0 else 1):
                driver.step()
        driver.run()
        made[is_on] = {f"r{i}": driver.tokens(f"r{i}") for i in range(len(encoded))}
        assert [driver.last(f"r{i}").usage.num_cached > 0 for i in range(3)] == [False, is_on, is_on]
    assert made[True] == made[False]
