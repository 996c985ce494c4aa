"""A request that goes on from a replica that died: cut anywhere, the rest is what one engine would have made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.batching import Batcher
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.request import GenerateRequest, RequestOutput, Usage, joined
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.engine.support import TOKENIZER, Driver, drive, prompt_of, request

NUM_TOKENS = 12


def text_driver(llama: Any) -> Driver:
    driver = drive(llama)
    driver.engine._tokenizer = TOKENIZER
    return driver


def outputs_of(llama: Any, wanted: GenerateRequest) -> list[RequestOutput]:
    driver = text_driver(llama)
    driver.add(request("other", prompt_of(9, 3), max_tokens=20), wanted)  # it need not run alone
    driver.run()
    return driver.outputs[wanted.request_id]


def goes_on(first: GenerateRequest, made: tuple[int, ...]) -> GenerateRequest:
    sampling = replace(first.sampling, max_tokens=first.sampling.max_tokens - len(made))
    prompt = first.prompt_token_ids + made
    return replace(first, prompt_token_ids=prompt, sampling=sampling, num_generated=len(made))


SAMPLED = {"temperature": 1.3, "seed": 11}


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"logprobs": 3}, id="logprobs"),
        pytest.param(SAMPLED, id="seeded"),
        pytest.param({**SAMPLED, "top_p": 0.9, "top_k": 40, "min_p": 0.01}, id="seeded, cut"),
        pytest.param({**SAMPLED, "frequency_penalty": 0.7, "presence_penalty": 0.4}, id="seeded, output penalties"),
        pytest.param({"repetition_penalty": 1.4, "presence_penalty": 0.9}, id="greedy, penalties"),
    ],
)
def test_cut_after_any_token_the_rest_is_what_one_engine_would_have_made(llama: Any, sampling: dict[str, Any]) -> None:
    first = request("r", prompt_of(7), max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)
    alone = outputs_of(llama, first)
    whole = joined(alone)
    assert len(whole.token_ids) == NUM_TOKENS
    for cut in range(NUM_TOKENS):
        before = joined(alone[:cut]) if cut else None
        after = joined(outputs_of(llama, goes_on(first, before.token_ids if before else ())))
        assert (before.token_ids if before else ()) + after.token_ids == whole.token_ids, cut
        assert (before.text if before else "") + after.text == whole.text, cut
        assert [one.token_id for one in after.logprobs] == [one.token_id for one in whole.logprobs[cut:]]
        assert [one.logprob for one in after.logprobs] == pytest.approx(
            [one.logprob for one in whole.logprobs[cut:]], abs=1e-4
        )
        assert after.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_the_seam_is_found_and_nothing_of_it_is_told_twice(llama: Any, include: bool) -> None:
    first = request("r", prompt_of(7), max_tokens=NUM_TOKENS, ignore_eos=True)
    text = joined(outputs_of(llama, first)).text
    stop = text[3:6]
    assert text.find(stop) == 3, "or this test shows nothing"
    stopping = replace(first.sampling, stop=(stop, stop[1:] + "never"), include_stop_str_in_output=include)
    first = replace(first, sampling=stopping)
    alone = outputs_of(llama, first)
    held_somewhere = False
    for cut in range(len(alone)):
        before = "".join(output.text for output in alone[:cut])
        made = tuple(token for output in alone[:cut] for token in output.token_ids)
        held_somewhere |= len(before) < len(TOKENIZER.decode(made))
        after = joined(outputs_of(llama, goes_on(first, made)))
        assert before + after.text == text[: 6 if include else 3], cut
        assert (after.finish_reason, after.stop_reason) == ("stop", stop)
    assert held_somewhere, "or no seam lay within the stop string"


def test_what_was_held_back_before_the_seam_comes_out_when_it_was_no_stop_string(llama: Any) -> None:
    first = request("r", prompt_of(7), max_tokens=NUM_TOKENS, ignore_eos=True)
    text = joined(outputs_of(llama, first)).text
    first = replace(first, sampling=replace(first.sampling, stop=tuple(f"{text[at]}never" for at in range(6))))
    alone = outputs_of(llama, first)
    for cut in range(NUM_TOKENS):
        made = tuple(token for output in alone[:cut] for token in output.token_ids)
        after = joined(outputs_of(llama, goes_on(first, made)))
        assert "".join(output.text for output in alone[:cut]) + after.text == text


# -- charges -----------------------------------------------------------------------------------------------------------


def booked() -> tuple[Batcher, LocalBook[GenerateRequest]]:
    book: LocalBook[GenerateRequest] = LocalBook(make_policy("vtc"), WeightedTokens())
    batcher = Batcher(
        KVBlocks(32, 4, num_lanes=4), book, book, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=64
    )
    return batcher, book


def begin(batcher: Batcher, book: LocalBook[GenerateRequest], one: GenerateRequest, num_steps: int) -> None:
    book.received(one)
    book.push(one)
    for _ in range(num_steps):
        plan = batcher.plan()
        batcher.commit(plan, {chunk.request_id: 50 for chunk in plan if chunk.samples})


def test_what_is_computed_again_is_charged_like_cached_input_and_new_output_as_always() -> None:
    batcher, book = booked()
    begin(batcher, book, goes_on(request("r", range(10, 20), max_tokens=9), (40, 41)), num_steps=3)
    sequence = batcher.running["r"]
    totals = book.take_events().totals["a"]
    assert (totals.num_input, totals.num_cached, totals.num_output, totals.service) == (12, 12, 2, 4.0)
    assert sequence.usage == Usage(12, 12, 2)


def test_a_caller_that_leaves_while_it_is_computed_again_is_given_nothing_back_that_was_not_charged() -> None:
    batcher, book = booked()
    begin(batcher, book, goes_on(request("r", range(10, 20), max_tokens=9), (40, 41)), num_steps=1)
    assert batcher.running["r"].num_computed == 8, "in the middle of it"
    batcher.finish("r")
    totals = book.take_events().totals["a"]
    assert (totals.num_input, totals.num_cached, totals.service) == (12, 12, 0.0)
    book.check()
