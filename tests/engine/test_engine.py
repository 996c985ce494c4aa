"""The engine as a whole: how requests end, how they fail alone, and what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairserve.errors import InvalidRequest, PromptTooLong
from tests.engine.support import EOS, TOKENIZER, VOCABULARY, Driver, drive, prepare, prompt_of, reference, request, tiny


def finish(driver: Driver, **sampling: Any) -> Any:
    driver.add(request("r", prompt_of(5), **{"max_tokens": 10, **sampling}))
    driver.run()
    return driver.last("r")


@pytest.fixture(scope="module")
def greedy(llama) -> list[int]:
    """The first ten greedy tokens after the prompt, all different enough to stop at."""
    driver = drive(llama)
    finish(driver, ignore_eos=True)
    return driver.tokens("r")


def test_max_tokens_ends_by_length(llama, greedy):
    driver = drive(llama)
    last = finish(driver, max_tokens=3, ignore_eos=True)
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert driver.tokens("r") == greedy[:3]


def test_a_stop_token_ends_the_text_names_itself_and_is_charged(llama, greedy):
    driver = drive(llama)
    stop = greedy[4]
    last = finish(driver, stop_token_ids=(stop,), ignore_eos=True)
    end = greedy.index(stop) + 1
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert driver.tokens("r") == greedy[:end]
    assert last.usage.num_output == driver.ledger.num_output["r"] == end


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_text_token_ends_unless_it_is_ignored(llama, greedy, ignore_eos):
    driver = drive(llama)
    driver.engine._eos = frozenset({greedy[2]})
    last = finish(driver, ignore_eos=ignore_eos)
    if ignore_eos:
        assert (last.finish_reason, last.usage.num_output) == ("length", 10)
    else:
        end = greedy.index(greedy[2]) + 1
        assert (last.finish_reason, last.stop_reason, last.usage.num_output) == ("stop", None, end)


def test_usage_grows_with_each_output(llama):
    driver = drive(llama)
    finish(driver, ignore_eos=True)
    assert [o.usage.num_output for o in driver.outputs["r"]] == list(range(1, 11))
    assert {o.usage.num_input for o in driver.outputs["r"]} == {5}


def _with_tokenizer(llama: Any) -> Driver:
    driver = drive(llama)
    driver.engine._tokenizer = TOKENIZER
    return driver


def test_text_is_what_the_tokenizer_makes_of_the_tokens(llama):
    driver = _with_tokenizer(llama)
    finish(driver, ignore_eos=True)
    assert driver.text("r") == TOKENIZER.decode(driver.tokens("r")).rstrip("\ufffd")
    assert driver.text("r")


def test_a_stop_string_ends_the_request_and_its_tokens_are_charged(llama):
    driver = _with_tokenizer(llama)
    finish(driver, ignore_eos=True)
    text = driver.text("r")
    driver = _with_tokenizer(llama)
    last = finish(driver, ignore_eos=True, stop=(text[2:4],))
    assert (last.finish_reason, last.stop_reason) == ("stop", text[2:4])
    assert driver.text("r") == text[: text.find(text[2:4])]
    assert last.usage.num_output == driver.ledger.num_output["r"] == len(driver.tokens("r")) < 10


def test_held_text_comes_out_at_the_end(llama):
    driver = _with_tokenizer(llama)
    finish(driver, ignore_eos=True)
    text = driver.text("r")
    driver = _with_tokenizer(llama)
    finish(driver, ignore_eos=True, stop=(text[-1] + "never",))
    assert driver.text("r") == text


@pytest.mark.parametrize(
    ("prompt", "sampling", "error"),
    [
        pytest.param(prompt_of(128), {}, PromptTooLong, id="no room for one output token"),
        pytest.param((), {}, InvalidRequest, id="empty"),
        pytest.param((5, VOCABULARY), {}, InvalidRequest, id="unknown token"),
        pytest.param((5, -1), {}, InvalidRequest, id="negative token"),
        pytest.param((5,), {"max_tokens": -1}, InvalidRequest, id="less than nothing asked for"),
    ],
)
def test_what_cannot_be_served_is_refused_and_costs_nothing(llama, prompt, sampling, error):
    driver = drive(llama)
    with pytest.raises(error):
        driver.add(request("r", prompt, **sampling))
    assert driver.ledger.is_finished == driver.ledger.is_received == {"r"}
    assert driver.ledger.num_input["r"] == 0
    assert not driver.engine.has_work()
    driver.engine.check()


def test_an_id_in_use_is_refused_and_the_first_request_lives_on(llama):
    driver = drive(llama)
    driver.add(request("r", prompt_of(5)))
    with pytest.raises(InvalidRequest):
        driver.add(request("r", prompt_of(6)))
    driver.run()
    assert driver.last("r").usage.num_input == 5


def test_a_request_that_gives_nan_fails_alone_and_leaves_nothing_behind(llama):
    prompts = {f"r{i}": prompt_of(9 + i, i) for i in range(3)}
    wanted = drive(llama)
    wanted.add(*(request(name, prompt, ignore_eos=True) for name, prompt in prompts.items()))
    wanted.run()
    model = llama.model
    used = {token for name, prompt in prompts.items() for token in (*prompt, *wanted.tokens(name))}
    poison = next(token for token in range(10, VOCABULARY) if token not in used)
    embedding = model.get_input_embeddings().weight
    saved = embedding[poison].clone()
    driver = drive(llama)
    try:
        with torch.inference_mode(False):
            embedding.data[poison] = float("nan")
        driver.add(request("bad", (12, poison, *prompt_of(30, 3))))
        driver.add(*(request(name, prompt, ignore_eos=True) for name, prompt in prompts.items()))
        driver.step()
        # The cache that the failed request left is used by the next ones, beside longer sequences.
        driver.add(request("late", prompts["r0"], ignore_eos=True))
        driver.run()
    finally:
        embedding.data[poison] = saved
    assert driver.last("bad").finish_reason == "error"
    assert "not finite" in (driver.last("bad").error or "")
    for name in prompts:
        assert driver.tokens(name) == wanted.tokens(name)
    assert driver.tokens("late") == wanted.tokens("r0")


def test_an_abort_of_a_waiting_request_reports_no_charge(llama):
    driver = drive(llama, max_num_seqs=1)
    driver.add(request("a", prompt_of(5)), request("b", prompt_of(5)))
    driver.step()
    driver.engine.abort("b")
    driver.engine.abort("unknown")
    driver.run()
    last = driver.last("b")
    assert (last.finish_reason, last.usage.num_input, last.usage.num_output) == ("abort", 0, 0)


def test_free_kv_counts_reservations_of_running_and_waiting_requests(llama):
    driver = drive(llama, kv_cache_tokens=64, max_num_seqs=1)
    driver.add(request("a", prompt_of(10), max_tokens=6), request("b", prompt_of(20), max_tokens=40))
    events = driver.step()
    assert (events.num_running, events.num_waiting, events.free_slots) == (1, 1, -1)
    assert events.free_kv_tokens == 64 - 16 - 60
    driver.run()
    assert driver.engine.idle_events().free_kv_tokens == 64


def test_free_kv_with_a_smaller_reservation_follows_what_is_really_held(llama):
    driver = drive(llama, kv_cache_tokens=128, reserve_output_tokens=4)
    driver.add(request("a", prompt_of(12), max_tokens=30, ignore_eos=True))
    free = []
    while driver.engine.has_work():
        free.append(driver.step().free_kv_tokens)
    assert free[:4] == [112] * 4
    assert free[-2] == 128 - 44  # 41 tokens in blocks of 4
    assert sorted(free[:-1], reverse=True) == free[:-1]


def test_with_everything_reserved_no_request_is_ever_preempted(llama):
    driver = drive(llama, kv_cache_tokens=128, max_num_seqs=8)
    waiting = [request(f"r{i}", prompt_of(3 + 5 * i % 23, i), max_tokens=9, ignore_eos=True) for i in range(12)]
    events = driver.engine.idle_events()
    while waiting or driver.engine.has_work():
        while waiting and waiting[0].num_input + 9 <= events.free_kv_tokens and events.free_slots > 0:
            driver.add(waiting.pop(0))
            events = driver.engine.idle_events()
        events = driver.step()
        assert events.free_kv_tokens >= -4
    assert driver.num_preempted == 0


def test_step_counts_what_it_computed(llama):
    driver = drive(llama, max_num_batched_tokens=12)
    driver.add(request("a", prompt_of(4), ignore_eos=True))
    driver.step()
    driver.add(request("b", prompt_of(30, 1)))
    events = driver.step()
    assert (events.num_decode_tokens, events.num_prefill_tokens, events.resident_tokens) == (1, 11, 16)


def test_each_chunk_gets_logits_for_its_last_row_only(llama):
    driver = drive(llama, max_num_batched_tokens=8)
    rows: list[int] = []
    handle = llama.model.lm_head.register_forward_hook(lambda module, args, logits: rows.append(logits.shape[1]))
    driver.add(request("a", prompt_of(20)))
    for _ in range(4):
        driver.step()
    handle.remove()
    assert rows == [1, 1, 1, 1]


def test_a_model_without_row_selection_gives_the_same_tokens():
    model = tiny("gpt2")
    wanted = reference(model, prompt_of(12), 6)
    driver = drive(prepare(model))
    driver.engine._runner._selects_rows = False
    driver.add(request("r", prompt_of(12), max_tokens=6))
    driver.run()
    assert driver.tokens("r") == wanted
    assert EOS not in wanted[:-1]
