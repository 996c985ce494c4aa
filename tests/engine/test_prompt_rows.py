"""What is asked of a prompt: log probabilities of its tokens and pooled hidden states are transformers' own, whatever
the batch, the chunks, the prefix cache and preemption do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fairserve.config import EMBEDDED_MODEL
from fairserve.engine import batching
from fairserve.engine.loading import LoadedModel, load_model
from fairserve.engine.request import GenerateRequest, Pooling, RequestOutput, Usage, joined
from fairserve.errors import InvalidRequest
from tests.engine.support import Driver, config, drive, prepare, prompt_of, request, tiny

KINDS = [
    ("llama", "eager"),
    ("llama", "fused"),
    ("qwen2", "packed"),
    ("qwen3", "fused"),
    ("mistral", "fused"),
    ("gpt2", "packed"),
]


def scored(name: str, prompt: tuple[int, ...], num_top: int = 2, max_tokens: int = 0, **more: Any) -> GenerateRequest:
    return request(name, prompt, prompt_logprobs=num_top, max_tokens=max_tokens, **more)


def embedding(name: str, prompt: tuple[int, ...], pooling: Pooling) -> GenerateRequest:
    return replace(request(name, prompt, max_tokens=0), pooling=pooling)


def uneven(kind: str) -> Any:
    """A tiny model whose norms do something: at 1, as they are made, they would hide a mistake."""
    model = tiny(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.inference_mode()
def wanted_logprobs(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """[tokens - 1, vocabulary]: row i tells of token i + 1."""
    logprobs: torch.Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[:-1]
    return logprobs


@torch.inference_mode()
def wanted_embedding(model: Any, tokens: tuple[int, ...], pooling: Pooling) -> np.ndarray:
    hidden = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return (pooled / pooled.norm()).numpy()


def check_scores(output: RequestOutput, tokens: tuple[int, ...], wanted: torch.Tensor, num_top: int = 2) -> None:
    """The first of ``output``'s log probabilities are those of ``tokens`` from the second on."""
    given = output.logprobs[: len(tokens) - 1]
    assert [one.token_id for one in given] == list(tokens[1:])
    rows = torch.arange(len(tokens) - 1)
    assert [one.logprob for one in given] == pytest.approx(wanted[rows, list(tokens[1:])].tolist(), abs=1e-4)
    best, ids = wanted.topk(max(1, num_top))
    for one, values, places in zip(given, best.tolist(), ids.tolist(), strict=True):
        assert [value for _, value in one.top] == pytest.approx(values[:num_top], abs=1e-4)
        if num_top and (num_top == 1 or values[0] - values[1] > 1e-3):
            assert one.top[0][0] == places[0]


def vector(output: RequestOutput) -> np.ndarray:
    return np.frombuffer(output.embedding, "<f4")


def whole(driver: Driver, name: str) -> RequestOutput:
    return joined(driver.outputs[name])


@pytest.mark.parametrize(("kind", "cpu_linear"), KINDS)
def test_scores_and_embeddings_are_transformers_own_beside_other_requests(kind: str, cpu_linear: str) -> None:
    prompts = {length: prompt_of(length, length) for length in (1, 2, 17, 40)}
    model = uneven(kind)
    logprobs = {length: wanted_logprobs(model, prompt) for length, prompt in prompts.items()}
    vectors = {
        (length, pooling): wanted_embedding(model, prompt, pooling)
        for length, prompt in prompts.items()
        for pooling in ("mean", "last")
    }
    driver = drive(prepare(model, cpu_linear), max_num_batched_tokens=24, max_num_seqs=16)
    driver.add(request("other", prompt_of(30, 5), max_tokens=20))
    for length, prompt in prompts.items():
        driver.add(scored(f"scored{length}", prompt), embedding(f"mean{length}", prompt, "mean"))
        driver.add(embedding(f"last{length}", prompt, "last"))
    driver.run()
    for length, prompt in prompts.items():
        check_scores(whole(driver, f"scored{length}"), prompt, logprobs[length])
        for pooling in ("mean", "last"):
            output = driver.last(f"{pooling}{length}")
            assert vector(output) == pytest.approx(vectors[length, pooling], abs=1e-4)
            assert (output.finish_reason, output.usage) == ("length", Usage(length, output.usage.num_cached, 0))
    alone = drive(prepare(uneven(kind), cpu_linear))
    alone.add(request("other", prompt_of(30, 5), max_tokens=20))
    alone.run()
    assert driver.tokens("other") == alone.tokens("other")


def test_scores_come_with_the_first_token_of_each_of_several_choices(llama: LoadedModel) -> None:
    prompt = prompt_of(21)
    driver = drive(llama, max_num_batched_tokens=8)
    for choice in range(3):
        driver.add(scored(f"r{choice}", prompt, 3, 4, temperature=1.0, seed=choice, logprobs=1, ignore_eos=True))
    driver.run()
    wanted = wanted_logprobs(tiny("llama"), prompt)
    for choice in range(3):
        outputs = driver.outputs[f"r{choice}"]
        assert [len(output.logprobs) for output in outputs] == [20 + 1, 1, 1, 1]
        check_scores(outputs[0], prompt, wanted, 3)
        assert [one.token_id for output in outputs for one in output.logprobs][20:] == driver.tokens(f"r{choice}")
        assert outputs[-1].usage == Usage(21, 0, 4)


def test_what_is_read_whole_takes_nothing_from_the_prefix_cache_and_leaves_it_for_others(llama: LoadedModel) -> None:
    prompt, model = prompt_of(33), tiny("llama")
    driver = drive(llama)
    for name, one in (
        ("first", request("first", prompt)),
        ("scored", scored("scored", prompt)),
        ("mean", embedding("mean", prompt, "mean")),
        ("last", embedding("last", prompt, "last")),
        ("again", request("again", prompt)),
    ):
        driver.add(one)
        driver.run()
        cached = {"last": 32, "again": 32}.get(name, 0)
        assert (driver.last(name).usage.num_cached, driver.ledger.num_cached[name]) == (cached, cached)
    check_scores(driver.last("scored"), prompt, wanted_logprobs(model, prompt))
    for pooling in ("mean", "last"):
        assert vector(driver.last(pooling)) == pytest.approx(wanted_embedding(model, prompt, pooling), abs=1e-4)
    assert driver.tokens("again") == driver.tokens("first")


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preempted_at_any_step_each_token_is_read_once(llama: LoadedModel, prefix_cache: bool) -> None:
    prompt, model = prompt_of(30), tiny("llama")
    wanted = wanted_logprobs(model, prompt)
    for steps in range(1, 9):
        driver = drive(llama, max_num_batched_tokens=6, max_num_seqs=6, prefix_cache=prefix_cache)
        driver.add(scored("scored", prompt, 2, 3, ignore_eos=True), embedding("mean", prompt, "mean"))
        for _ in range(steps):
            driver.step()
        batcher = driver.engine._batcher
        for sequence in list(batcher.running.values()):
            batcher._preempt(sequence)
        driver.run()
        assert len(whole(driver, "scored").logprobs) == 29
        check_scores(whole(driver, "scored"), prompt, wanted)
        assert vector(driver.last("mean")) == pytest.approx(wanted_embedding(model, prompt, "mean"), abs=1e-4)
        assert driver.ledger.num_input == {"scored": 30, "mean": 30}


def test_a_prompt_that_fills_the_context_is_scored_and_charged_like_any(llama: LoadedModel) -> None:
    driver = drive(llama, max_model_len=32)
    driver.add(scored("r", prompt_of(32)))
    driver.run()
    output = driver.last("r")
    assert (output.finish_reason, output.token_ids, output.usage) == ("length", (), Usage(32, 0, 0))
    assert (driver.ledger.num_input["r"], driver.ledger.num_output["r"]) == (32, 0)
    with pytest.raises(InvalidRequest, match="0 for an embedding"):
        driver.add(replace(request("e", prompt_of(4)), pooling="mean"))


def test_a_step_scores_a_bounded_number_of_tokens_and_goes_on_with_the_others(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_SCORED", 10)
    driver = drive(llama)
    prompts = {f"s{i}": prompt_of(25, i) for i in range(3)}
    driver.add(*(scored(name, prompt) for name, prompt in prompts.items()), request("plain", prompt_of(60, 9)))
    widest = 0
    run = driver.engine._runner.run

    def counted(plan: Any) -> Any:
        nonlocal widest
        widest = max(widest, sum(len(chunk.targets) for chunk in plan))
        return run(plan)

    driver.engine._runner.run = counted  # type: ignore[method-assign]
    first = driver.step()
    assert first.num_prefill_tokens == 10 + 60
    driver.run()
    assert widest == 10
    for name, prompt in prompts.items():
        check_scores(whole(driver, name), prompt, wanted_logprobs(tiny("llama"), prompt))


def test_what_goes_on_elsewhere_without_a_token_is_scored_there_and_with_one_it_is_not(llama: LoadedModel) -> None:
    first = scored("r", prompt_of(12), 1, 5, ignore_eos=True)
    driver = drive(llama)
    driver.add(first)
    driver.run()
    begun = tuple(driver.tokens("r"))
    for num_made, num_scored in ((0, 11), (2, 0)):
        prompt = first.prompt_token_ids + begun[:num_made]
        sampling = replace(first.sampling, max_tokens=5 - num_made)
        driver = drive(llama)
        driver.add(replace(first, prompt_token_ids=prompt, sampling=sampling, num_generated=num_made))
        driver.run()
        assert tuple(driver.tokens("r")) == begun[num_made:]
        assert len(whole(driver, "r").logprobs) == num_scored


@pytest.mark.model
@pytest.mark.parametrize("cpu_linear", ["auto", "eager"])
def test_the_embedded_models_scores_and_embeddings_are_transformers_own(cpu_linear: str) -> None:
    from transformers import AutoModelForCausalLM

    from fairserve.engine.embedded import ensure_embedded

    model = AutoModelForCausalLM.from_pretrained(ensure_embedded(EMBEDDED_MODEL), dtype=torch.float32).eval()
    loaded = load_model(EMBEDDED_MODEL, config(cpu_linear=cpu_linear))
    prompts = {f"r{i}": tuple(loaded.tokenizer.encode(text)) for i, text in enumerate((TEXT, TEXT[30:400], "Hello"))}
    driver = drive(loaded, max_num_batched_tokens=64, kv_cache_tokens=2048)
    for name, prompt in prompts.items():
        driver.add(scored(name, prompt), *(embedding(f"{p}{name}", prompt, p) for p in ("mean", "last")))
    driver.run()
    for name, prompt in prompts.items():
        check_scores(driver.last(name), prompt, wanted_logprobs(model, prompt))
        for pooling in ("mean", "last"):
            wanted = wanted_embedding(model, prompt, pooling)
            assert vector(driver.last(pooling + name)) == pytest.approx(wanted, abs=1e-4)


TEXT = """The quick brown fox jumps over the lazy dog. When two queues meet at one counter, who goes next? A rule that
counts what each has had so far, and serves the one who had least, keeps both content: neither waits for the other's
whole crowd. In 1984 the number 3.14159 was written on the wall, "twice", by somebody called Zoë; nobody asked why.
def add(a: int, b: int) -> int: return a + b. Rain fell. The clerk closed the window and the two queues went home."""
