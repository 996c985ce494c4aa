"""Each sampling parameter, on logits written by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from fairserve.engine import drawing
from fairserve.engine.sampling import Sampled, Sampler
from tests.engine.support import drive, prompt_of, request

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(logits: torch.Tensor, times: int = 1, prompt: tuple[int, ...] = (1,), **sampling: Any) -> list[Sampled]:
    """Tokens of one request that sees the same logits ``times`` times."""
    sampler = Sampler()
    sampler.add(request("r", prompt, **{"temperature": 1.0, **sampling}), sampling.get("seed") or 0)
    return [sampler.sample(logits.view(1, -1), ["r"], [True])["r"] for _ in range(times)]


def tokens(*args: Any, **kwargs: Any) -> list[int]:
    return [sampled.token_id for sampled in draw(*args, **kwargs)]


def shares(logits: torch.Tensor = LOGITS, prompt: tuple[int, ...] = (1,), **sampling: Any) -> torch.Tensor:
    """How often each token is the first one, over requests with 4000 different seeds."""
    sampler = Sampler()
    names = [f"r{i}" for i in range(4000)]
    for seed, name in enumerate(names):
        sampler.add(request(name, prompt, **{"temperature": 1.0, **sampling}), seed)
    sampled = sampler.sample(logits.expand(len(names), -1), names, [True] * len(names))
    counts = Counter(s.token_id for s in sampled.values())
    return torch.tensor([counts[i] / len(names) for i in range(len(logits))])


def test_temperature_zero_takes_the_most_likely():
    assert tokens(LOGITS, 20, temperature=0.0) == [0] * 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scales_the_logits(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(shares(temperature=temperature), expected, atol=0.03)


def test_no_temperature_is_too_small():
    assert tokens(LOGITS * 100, 5, temperature=2e-5) == [0] * 5


@pytest.mark.parametrize("top_k", [1, 2, 4, 100, pytest.param(10**400, id="huge")])
def test_top_k_keeps_the_k_best_and_their_proportions(top_k):
    kept = TopKLogitsWarper(top_k)(None, LOGITS.view(1, -1))
    assert torch.allclose(shares(top_k=top_k), kept[0].softmax(-1), atol=0.03)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.97])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    kept = TopPLogitsWarper(top_p)(None, LOGITS.view(1, -1))
    got = shares(top_p=top_p)
    assert torch.equal(got > 0, kept[0] > -math.inf)
    assert torch.allclose(got, kept[0].softmax(-1), atol=0.03)


def test_top_p_counts_what_top_k_left():
    processed = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(3)(None, LOGITS.view(1, -1)))
    got = shares(top_k=3, top_p=0.8)
    assert torch.equal(got > 0, processed[0] > -math.inf)


@pytest.mark.parametrize("extra", [{}, {"top_k": 5}])
def test_min_p_drops_what_is_far_less_likely_than_the_best(extra):
    got = shares(min_p=0.2, **extra)
    probabilities = LOGITS.softmax(-1)
    assert torch.equal(got > 0, probabilities >= 0.2 * probabilities.max())


def test_top_p_over_a_flat_large_vocabulary_reaches_beyond_the_first_candidates():
    logits = torch.zeros(5000)
    drawn = tokens(logits, 300, top_p=0.9)
    assert len(set(drawn)) > 250, "each of some 4500 tokens is as likely as the other"
    assert set(tokens(logits, 300, top_k=2000)) != set(tokens(logits, 300, top_k=5))


def test_top_k_and_top_p_do_not_depend_on_the_neighbours_need_for_a_full_sort():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5000, generator=generator)
    params = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 4}

    def run(neighbour: bool) -> list[int]:
        sampler = Sampler()
        sampler.add(request("r", (1,), **params), 4)
        sampler.add(request("n", (1,), temperature=1.0, top_p=0.999), 5)
        names = ["r", "n"] if neighbour else ["r"]
        return [sampler.sample(logits[: len(names)], names, [True] * len(names))["r"].token_id for _ in range(50)]

    assert run(True) == run(False)


def test_repetition_penalty_is_that_of_transformers():
    prompt = (0, 4, 4)
    processor = RepetitionPenaltyLogitsProcessor(1.8)
    expected = processor(torch.tensor([prompt]), LOGITS.view(1, -1).clone())[0]
    assert torch.allclose(shares(prompt=prompt, repetition_penalty=1.8), expected.softmax(-1), atol=0.03)


def test_repetition_penalty_counts_the_output_too():
    assert tokens(torch.tensor([2.0, 1.5, -9.0]), 2, prompt=(2,), temperature=0.0, repetition_penalty=2.0) == [0, 1]


def test_presence_penalty_is_paid_once_and_frequency_penalty_each_time():
    logits = torch.tensor([3.0, 1.4, 0.0])
    assert tokens(logits, 5, temperature=0.0, presence_penalty=1.0) == [0, 0, 0, 0, 0]
    assert tokens(logits, 5, temperature=0.0, frequency_penalty=1.0) == [0, 0, 1, 0, 1]


def test_penalties_on_output_leave_the_prompt_alone():
    assert tokens(torch.tensor([3.0, 2.5]), 1, prompt=(0, 0, 0), temperature=0.0, frequency_penalty=2.0) == [0]


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    flat = torch.zeros(1000)
    assert tokens(flat, 20, seed=5) == tokens(flat, 20, seed=5)
    assert tokens(flat, 20, seed=5) != tokens(flat, 20, seed=6)


def test_logprobs_are_those_of_the_unmodified_model():
    (sampled,) = draw(LOGITS, prompt=(0, 2), temperature=0.3, top_k=2, repetition_penalty=1.5, logprobs=3, seed=1)
    reference = LOGITS.log_softmax(-1)
    assert sampled.logprob is not None
    assert sampled.logprob.token_id == sampled.token_id
    assert sampled.logprob.logprob == pytest.approx(reference[sampled.token_id].item(), abs=1e-6)
    assert [token for token, _ in sampled.logprob.top] == [0, 1, 2]
    assert [value for _, value in sampled.logprob.top] == pytest.approx(reference[:3].tolist(), abs=1e-6)


def test_logprobs_zero_gives_the_chosen_token_only():
    (sampled,) = draw(LOGITS, temperature=0.0, logprobs=0)
    assert sampled.logprob is not None
    assert sampled.logprob.top == ()
    assert sampled.logprob.logprob == pytest.approx(LOGITS.log_softmax(-1)[0].item(), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("plain", [True, False])
def test_a_row_that_is_not_finite_gets_no_token_and_the_others_do(bad, plain):
    sampler = Sampler()
    for i in range(3):
        sampler.add(request(f"r{i}", (1,), temperature=0.0 if plain else 0.5, top_k=1), i)
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    sampled = sampler.sample(logits, ["r0", "r1", "r2"], [True] * 3)
    assert {name: s.token_id for name, s in sampled.items()} == {"r0": 0, "r2": 0}


@pytest.mark.parametrize("plain", [True, False])
def test_a_row_that_does_not_draw_is_looked_at_and_its_chance_is_kept(plain):
    sampler = Sampler()
    for i in range(3):
        sampler.add(request(f"r{i}", (1,), temperature=0.0 if plain else 0.5), i)
    logits = LOGITS.repeat(3, 1)
    logits[2, 4] = math.nan
    before = [row.random.getstate() for row in sampler._rows.values()]
    sampled = sampler.sample(logits, ["r0", "r1", "r2"], [True, False, False])
    assert sampled.keys() == {"r0", "r1"}
    assert sampled["r0"] is not None and sampled["r1"] is None
    after = [row.random.getstate() for row in sampler._rows.values()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [plain, True, True]


def test_a_choice_that_raises_changes_nothing_and_may_be_made_again(monkeypatch):
    """For one of the rows it may be made without the others then."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    names = ["r", "other"]

    def play(fails: bool) -> list[Any]:
        sampler = Sampler()
        for i, name in enumerate(names):
            sampler.add(request(name, (1,), temperature=1.0, top_p=0.9 - 0.2 * i, frequency_penalty=1.5, logprobs=1), i)
        chosen = []
        for step in range(8):
            if fails and step % 2:
                with monkeypatch.context() as patch:
                    patch.setattr("fairserve.engine.sampling._logprobs", lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        sampler.sample(logits, names, [True] * 2)
                chosen.append(
                    {name: sampler.sample(logits[i : i + 1], [name], [True])[name] for i, name in enumerate(names)}
                )
            else:
                chosen.append(sampler.sample(logits, names, [True] * 2))
        return [{name: one.token_id for name, one in step.items()} for step in chosen]

    assert play(fails=True) == play(fails=False)


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert tokens(logits, 50) == [1] * 50
    assert tokens(logits, 50, top_p=0.9) == [1] * 50


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.9, "seed": 12, "top_k": 10, "top_p": 0.8},
    {"temperature": 1.2, "seed": 13, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 14, "frequency_penalty": 0.6, "presence_penalty": 0.2, "logprobs": 2},
]


def test_a_seeded_request_gives_the_same_text_in_any_company(llama):
    def run(indices: list[int], **changes: Any) -> dict[int, list[int]]:
        driver = drive(llama, **changes)
        for i in indices:
            driver.add(request(f"r{i}", prompt_of(6 + i, i), max_tokens=15, ignore_eos=True, **MIXED[i]))
        driver.run()
        return {i: driver.tokens(f"r{i}") for i in indices}

    alone = {i: run([i])[i] for i in range(len(MIXED))}
    assert run([0, 1, 2, 3, 4]) == alone
    assert run([4, 2, 0, 1, 3], max_num_batched_tokens=8) == alone
    preempting = run([3, 1, 4, 0, 2], kv_cache_tokens=64, max_model_len=64, block_size=4)
    assert preempting == alone


def test_requests_without_a_seed_get_the_replicas_seed_one_after_another(llama):
    def run(**changes: Any) -> list[list[int]]:
        driver = drive(llama, **changes)
        driver.add(*(request(f"r{i}", prompt_of(5), temperature=1.5, max_tokens=10) for i in range(2)))
        driver.run()
        return [driver.tokens(f"r{i}") for i in range(2)]

    first = run(seed=3)
    assert first[0] != first[1]
    assert run(seed=3) == first
    assert run(seed=4)[0] == first[1]


def test_logprobs_of_the_engine_equal_a_reference_over_the_whole_text(llama):
    driver = drive(llama, max_num_batched_tokens=7)
    prompt = prompt_of(20)
    driver.add(request("r", prompt, temperature=1.0, seed=2, max_tokens=12, logprobs=4, ignore_eos=True))
    driver.run()
    got = [lp for output in driver.outputs["r"] for lp in output.logprobs]
    text = driver.tokens("r")
    model = llama.model
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(implementation)
    reference = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert [lp.token_id for lp in got] == text
    for position, lp in enumerate(got):
        assert lp.logprob == pytest.approx(reference[position, text[position]].item(), abs=1e-4)
        values, ids = reference[position].topk(4)
        assert [token for token, _ in lp.top] == ids.tolist()
        assert [value for _, value in lp.top] == pytest.approx(values.tolist(), abs=1e-4)


# -- what may come next ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_is_added_before_everything_else(temperature):
    assert set(tokens(LOGITS, 30, temperature=temperature, logit_bias=((5, 100.0), (0, -100.0)))) == {5}
    expected = (LOGITS + torch.tensor([0.0, 0, 0, 0, 2.0, 0])).softmax(-1)
    assert torch.allclose(shares(logit_bias=((4, 2.0),)), expected, atol=0.03)


def test_only_allowed_tokens_are_drawn_in_their_proportions():
    got = shares(allowed_token_ids=(1, 4))
    expected = torch.tensor([0, math.e, 0, 0, 1 / math.e, 0])
    assert torch.allclose(got, expected / expected.sum(), atol=0.03)
    assert tokens(LOGITS, 3, temperature=0.0, allowed_token_ids=(1, 4)) == [1, 1, 1]


def test_a_bad_word_is_not_completed_and_its_beginning_may_be_drawn():
    assert tokens(LOGITS, 3, temperature=0.0, bad_words=((0,),)) == [1, 1, 1]
    assert tokens(LOGITS, 5, temperature=0.0, bad_words=((0, 0, 0),)) == [0, 0, 1, 0, 0]


def test_before_min_tokens_neither_eos_nor_a_stop_token_is_drawn():
    sampler = Sampler(eos=frozenset({0}))
    sampler.add(request("r", (3,), temperature=0.0, min_tokens=3, stop_token_ids=(1,)), 0)
    drawn = [sampler.sample(LOGITS.view(1, -1), ["r"], [True])["r"].token_id for _ in range(5)]
    assert drawn == [2, 2, 2, 0, 0]


def test_rules_of_one_row_leave_the_others_and_the_logits_as_they_are():
    sampler = Sampler(eos=frozenset({0}))
    sampler.add(request("greedy", (3,), temperature=0.0), 0)
    sampler.add(request("ruled", (3,), temperature=0.0, allowed_token_ids=(5,), logit_bias=((0, 50.0),)), 0)
    sampler.add(request("seeded", (3,), temperature=1.0), 7)
    logits = LOGITS.repeat(3, 1)
    sampled = sampler.sample(logits, ["greedy", "ruled", "seeded"], [True] * 3)
    assert torch.equal(logits, LOGITS.repeat(3, 1))
    assert (sampled["greedy"].token_id, sampled["ruled"].token_id) == (0, 5)
    assert sampled["seeded"].token_id == draw(LOGITS, seed=7)[0].token_id


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1000, 1024])
def test_drawing_by_blocks_finds_what_running_sums_over_all_would(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(64, size, generator=generator) * (torch.rand(64, size, generator=generator) < 0.3)
    weights[:, -1] = 0.5  # the last token has weight, and no row is empty
    weights[:8] = 0.0
    weights[:8, -1] = 1.0
    chances = [0.0, 0.5, 1 - 2**-53, *torch.rand(61, generator=generator, dtype=torch.float64).tolist()]
    found = drawing.inverse_transform(weights, chances)
    sums = weights.double().cumsum(-1)
    targets = torch.tensor(chances, dtype=torch.float64) * sums[:, -1]
    wanted = torch.searchsorted(sums, targets.unsqueeze(1), right=True)
    assert found.tolist() == wanted.squeeze(1).clamp(max=size - 1).tolist()
    assert bool((weights.gather(1, found.unsqueeze(1)) > 0).all())


def drawn_plainly(logits: torch.Tensor, allowed: torch.Tensor, temperature: float, chance: float) -> int:
    """The definition, by sums over the whole row."""
    scores = logits.masked_fill(~allowed, -math.inf)
    sums = ((scores - scores.max()) / temperature).exp().double().cumsum(-1)
    return int(torch.searchsorted(sums, chance * sums[-1], right=True))


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("size", [1003, 2048])
def test_what_weighs_next_to_nothing_is_left_out_without_changing_any_token(size: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(40, size, generator=generator) * torch.linspace(0.1, 30, 40).unsqueeze(1)
    logits[::5, : size // 2] = -math.inf
    allowed = torch.rand(40, size, generator=generator) < torch.linspace(0.01, 1, 40).unsqueeze(1)
    allowed[:, -1] = True
    sampler, names = Sampler(), [f"r{i}" for i in range(40)]
    for i, name in enumerate(names):
        token_ids = tuple(allowed[i].nonzero().flatten().tolist()) if i % 2 else None
        sampler.add(request(name, (3,), temperature=temperature, allowed_token_ids=token_ids), i)
    before = logits.clone()
    chances = [random.Random(i) for i in range(40)]
    for _ in range(10):
        sampled = sampler.sample(logits, names, [True] * 40)
        for i, name in enumerate(names):
            may = allowed[i] if i % 2 else torch.ones(size, dtype=torch.bool)
            assert sampled[name].token_id == drawn_plainly(logits[i], may, temperature, chances[i].random()), (i, name)
    assert torch.equal(logits, before)


def test_a_score_beyond_the_least_weighs_nothing_and_minus_infinity_too() -> None:
    least = drawing._LEAST
    scores = torch.tensor([[0.0, -1.0, least + 1, least - 1e-3, -1000.0, -math.inf]])
    weights = drawing.weights_of(scores.clone())
    assert torch.equal(weights[0, :3], scores[0, :3].exp())
    assert weights[0, 3:].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(drawing.log_total(scores), scores.logsumexp(-1, keepdim=True))
