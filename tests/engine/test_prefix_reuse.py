"""The engine with its prefix cache makes the same tokens as without, computes less, and charges what it found."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.batching import Batcher, StepPlan
from fairserve.engine.engine import Engine
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.loading import LoadedModel
from fairserve.engine.prefix_cache import KeyMaker
from fairserve.engine.request import GenerateRequest, Usage
from fairserve.engine.sampling import Sampled
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.engine.support import Driver, drive, prepare, prompt_of, request, tiny


@pytest.fixture(params=[False, True], ids=["copies", "shares"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Torch's attention reads scattered blocks too, so that it can stand for one that shares them."""
    monkeypatch.setattr(SdpaAttention, "shares_blocks", request.param)
    return bool(request.param)


def prefill_tokens(driver: Driver) -> int:
    """Run to the end."""
    total = 0
    while driver.engine.has_work():
        total += driver.step().num_prefill_tokens
    return total


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_second_equal_prompt_computes_only_its_last_block(kind: str, shares: bool) -> None:
    driver = drive(prepare(tiny(kind)))
    driver.add(request("one", prompt_of(23)))
    assert prefill_tokens(driver) == 23
    driver.add(request("two", prompt_of(23)))
    assert prefill_tokens(driver) == 3
    assert driver.tokens("two") == driver.tokens("one")
    assert driver.last("two").usage == Usage(23, 20, len(driver.tokens("two")))


def test_of_a_prompt_of_whole_blocks_the_last_is_computed_for_its_row_is_sampled(llama: LoadedModel) -> None:
    driver = drive(llama)
    driver.add(request("one", prompt_of(8)))
    driver.run()
    driver.add(request("two", prompt_of(8)))
    assert prefill_tokens(driver) == 4
    assert driver.tokens("two") == driver.tokens("one")


def test_the_next_turn_of_a_chat_finds_the_answer_too(llama: LoadedModel, shares: bool) -> None:
    driver = drive(llama)
    first = request("one", prompt_of(10), max_tokens=20, ignore_eos=True)
    driver.add(first)
    driver.run()
    turn = request("two", (*first.prompt_token_ids, *driver.tokens("one"), *prompt_of(5, 3)))
    driver.add(turn)
    assert prefill_tokens(driver) == 35 - 28, "all but the last token of the answer was computed: 29, 7 blocks"
    assert driver.last("two").usage.num_cached == 28
    plain = drive(llama, prefix_cache=False)
    plain.add(turn)
    plain.run()
    assert driver.tokens("two") == plain.tokens("two")


def test_nobody_finds_what_another_client_computed_unless_the_scope_says_so(llama: LoadedModel) -> None:
    for scope, found in (("client", 0), ("team", 0), ("organisation", 20), ("replica", 20)):
        driver = drive(llama, prefix_cache_scope=scope)
        driver.add(request("one", prompt_of(23), client="acme/ml/ann"))
        driver.run()
        driver.add(request("two", prompt_of(23), client="acme/ops/bob"))
        driver.run()
        assert driver.last("two").usage.num_cached == found, scope


def test_without_the_cache_nothing_is_found(llama: LoadedModel) -> None:
    driver = drive(llama, prefix_cache=False)
    for name in ("one", "two"):
        driver.add(request(name, prompt_of(23)))
        assert prefill_tokens(driver) == 23
    assert driver.engine.idle_events().idle_cached_tokens == 0


def test_samples_of_one_prompt_compute_it_once(llama: LoadedModel, shares: bool) -> None:
    driver = drive(llama, max_num_batched_tokens=16)
    driver.add(*(request(f"r{i}", prompt_of(41), temperature=1.0, seed=i, max_tokens=4) for i in range(8)))
    assert prefill_tokens(driver) < 41 + 8 * 16
    assert sum(driver.ledger.num_cached.values()) >= 7 * 28
    if shares:
        driver.add(*(request(f"s{i}", prompt_of(41), max_tokens=4) for i in range(8)))
        events = driver.step()
        free = events.free_kv_tokens
        assert driver.engine._kv.num_shared == 7 * 10
        assert events.resident_tokens == 8 * 41 - 70 * 4, "what is shared is there once"
        reserved = 8 * 12  # blocks of 45 tokens each
        assert free == (driver.engine._kv.num_blocks - reserved + 70) * 4


def test_events_say_what_was_looked_up_and_found(llama: LoadedModel) -> None:
    driver = drive(llama)
    driver.add(request("one", prompt_of(23)))
    events = driver.step()
    assert (events.num_started_tokens, events.num_cached_tokens) == (23, 0)
    driver.run()
    assert driver.engine.idle_events().idle_cached_tokens >= 20
    driver.add(request("two", prompt_of(23)))
    events = driver.step()
    assert (events.num_started_tokens, events.num_cached_tokens) == (23, 20)
    assert driver.step().num_started_tokens == 0


def test_a_preempted_request_finds_its_own_blocks_and_is_not_charged_twice(llama: LoadedModel, shares: bool) -> None:
    driver = drive(llama, {"b": 1.0}, kv_cache_tokens=48, max_num_batched_tokens=64, max_model_len=48)
    driver.add(
        request("a", prompt_of(20), client="a", max_tokens=12, ignore_eos=True),
        request("b", prompt_of(20, 5), client="b", max_tokens=20, ignore_eos=True),
    )
    while not driver.num_preempted:
        driver.step()
    output = len(driver.tokens("b"))
    assert output
    while "b" not in driver.engine._batcher.running:
        driver.step()
    assert driver.engine._batcher.running["b"].num_stored > 0, "it found some of it"
    driver.run()
    alone = drive(llama, prefix_cache=False)
    alone.add(request("b", prompt_of(20, 5), max_tokens=20, ignore_eos=True))
    alone.run()
    assert driver.tokens("b") == alone.tokens("b")
    assert driver.last("b").usage == Usage(20, 0, 20)
    assert (driver.ledger.num_input["b"], driver.ledger.num_cached["b"]) == (20, 0)


def test_who_leaves_in_the_middle_of_the_prompt_pays_what_was_found_and_computed(llama: LoadedModel) -> None:
    driver = drive(llama, max_num_batched_tokens=8)
    driver.add(request("one", prompt_of(13)))
    driver.run()
    driver.add(request("two", (*prompt_of(12), *prompt_of(30, 4))))
    driver.step()
    driver.engine.abort("two")
    driver.step()
    assert driver.last("two").usage == Usage(20, 12, 0)
    assert (driver.ledger.num_input["two"], driver.ledger.num_cached["two"]) == (20, 12)


def test_a_request_that_goes_on_from_a_dead_replica_uses_what_is_here(llama: LoadedModel) -> None:
    driver = drive(llama)
    first = request("one", prompt_of(21), max_tokens=12, ignore_eos=True)
    driver.add(first)
    driver.run()
    made = tuple(driver.tokens("one")[:6])
    sampling, prompt = replace(first.sampling, max_tokens=6), first.prompt_token_ids + made
    driver.add(replace(first, request_id="two", prompt_token_ids=prompt, sampling=sampling, num_generated=6))
    assert prefill_tokens(driver) == 27 - 24
    assert driver.tokens("two") == driver.tokens("one")[6:]
    assert driver.last("two").usage == Usage(27, 27, 6), "charged there"


def test_what_a_request_that_failed_left_is_never_found(llama: LoadedModel, shares: bool) -> None:
    driver = drive(llama, max_num_batched_tokens=8)
    run, is_bad = driver.engine._runner.run, False

    def failing(plan: StepPlan) -> dict[str, Sampled | None]:
        rows = run(plan)
        return {name: row for name, row in rows.items() if not (is_bad and name == "bad")}

    driver.engine._runner.run = failing  # type: ignore[method-assign]
    driver.add(request("bad", prompt_of(23)))
    driver.step()
    assert driver.engine._kv._cache.num_idle + len(driver.engine._kv._cache) == 2, "its first blocks are stored"
    is_bad = True
    driver.run()
    assert driver.last("bad").finish_reason == "error"
    assert len(driver.engine._kv._cache) == 0
    driver.add(request("good", prompt_of(23)))
    assert prefill_tokens(driver) == 23


def test_a_step_without_memory_loses_nothing_that_was_found(llama: LoadedModel) -> None:
    driver = drive(llama)
    driver.add(request("one", prompt_of(23)), request("other", prompt_of(5, 2), max_tokens=30, ignore_eos=True))
    driver.run()
    driver.add(request("again", prompt_of(5, 2), max_tokens=30, ignore_eos=True))
    driver.step()
    run, num_failing = driver.engine._runner.run, 1

    def short(plan: StepPlan) -> dict[str, Sampled | None]:
        nonlocal num_failing
        if num_failing:
            num_failing -= 1
            raise MemoryError
        return run(plan)

    driver.engine._runner.run = short  # type: ignore[method-assign]
    driver.add(request("two", prompt_of(23)))
    events = driver.step()
    assert (events.num_out_of_memory, events.num_started_tokens, events.num_cached_tokens) == (1, 23, 20)
    driver.run()
    assert driver.tokens("two") == driver.tokens("one")
    assert driver.tokens("again") == driver.tokens("other")


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_the_counter_moves_by_what_usage_says(fraction: float) -> None:
    cost = WeightedTokens(cached_fraction=fraction)
    book: LocalBook[GenerateRequest] = LocalBook(make_policy("vtc"), cost)
    kv = KVBlocks(32, 4, num_lanes=4)
    batcher = Batcher(
        kv, book, book, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64,
        prefix_cache=KeyMaker(b"s", "client", 4),
    )  # fmt: skip
    usages = []
    for name in ("one", "two"):
        one = request(name, prompt_of(22))
        book.received(one)
        book.push(one)
        for _ in range(3):
            plan = batcher.plan()
            batcher.commit(plan, {chunk.request_id: 50 for chunk in plan})
        sequence = batcher.finish(name)
        assert sequence is not None
        usages.append(sequence.usage)
    assert usages == [Usage(22, 0, 3), Usage(22, 20, 3)]
    totals = book.take_events().totals["a"]
    assert (totals.num_input, totals.num_cached, totals.num_output) == (44, 20, 6)
    assert totals.service == pytest.approx(sum(cost.service(u.num_input, u.num_output, u.num_cached) for u in usages))


SHAPE = st.tuples(st.integers(0, 2), st.integers(1, 50), st.integers(0, 3), st.integers(1, 14), st.integers(0, 30))


@pytest.mark.parametrize("does_share", [False, True], ids=["copies", "shares"])
@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(SHAPE, min_size=2, max_size=12),
    num_blocks=st.integers(16, 40),
    aborted=st.sets(st.integers(0, 11), max_size=3),
    seed=st.integers(0, 99),
)
def test_whatever_comes_the_tokens_are_those_of_an_engine_without_a_cache(
    llama: LoadedModel,
    does_share: bool,
    shapes: list[tuple[int, int, int, int, int]],
    num_blocks: int,
    aborted: set[int],
    seed: int,
) -> None:
    pending = []
    for i, (trunk, length, tail, more, at) in enumerate(shapes):
        prompt = (*prompt_of(length, trunk), *prompt_of(tail, i))
        pending.append((request(f"r{i}", prompt, client="ab"[i % 2], max_tokens=more), at))
    was, SdpaAttention.shares_blocks = SdpaAttention.shares_blocks, does_share
    try:
        changes: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 64}
        cached = drive(llama, kv_cache_tokens=4 * num_blocks, reserve_output_tokens=0, **changes)
        chance = random.Random(seed)
        for step in range(500):
            for one, at in pending:
                if at == step:
                    cached.add(one)
            for i in aborted:
                if chance.random() < 0.1:
                    cached.engine.abort(f"r{i}")
            cached.step()
            if step > 30 and not cached.engine.has_work():
                break
        plain = drive(llama, prefix_cache=False, **changes)
        plain.add(*(one for one, _ in pending))
        plain.run()
    finally:
        SdpaAttention.shares_blocks = was
    for one, _ in pending:
        name = one.request_id
        got, usage = cached.tokens(name), cached.last(name).usage
        if cached.last(name).finish_reason == "abort":
            assert got == plain.tokens(name)[: len(got)]
        else:
            assert got == plain.tokens(name)
        assert usage == Usage(cached.ledger.num_input[name], cached.ledger.num_cached.get(name, 0), len(got))
    assert cached.engine._kv.num_free == cached.engine._kv.num_blocks


def test_an_engine_has_a_secret_of_its_own(llama: LoadedModel) -> None:
    engines: list[Engine] = [drive(llama).engine for _ in range(2)]
    one, two = (engine._batcher._prefix_cache for engine in engines)
    assert one is not None
    assert two is not None
    assert one._secret != two._secret
    assert len(one._secret) == 32
