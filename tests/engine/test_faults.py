"""What the model can do wrong: who fails for it, who does not notice, and what is charged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.clock import VirtualClock
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.batching import Batcher, Chunk, StepPlan
from fairserve.engine.engine import Engine
from fairserve.engine.events import Limits
from fairserve.engine.faults import is_out_of_memory
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.request import GenerateRequest, RequestOutput
from fairserve.engine.sampling import Sampled, Sampler
from fairserve.errors import ReplicaFailed
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.engine.support import VOCABULARY, Driver, drive, prompt_of, request

POISON = 9
"""A token of no other prompt, and never generated here."""
SAMPLING: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"ignore_eos": True, "temperature": 1.0, "seed": 5, "logprobs": 2},
    {"ignore_eos": True, "temperature": 0.8, "seed": 6, "top_p": 0.9, "frequency_penalty": 0.5},
]
PROMPTS = {f"r{i}": prompt_of(7 + 3 * i, i) for i in range(3)}


def good() -> list[GenerateRequest]:
    return [request(name, prompt, client=name, **SAMPLING[i]) for i, (name, prompt) in enumerate(PROMPTS.items())]


def alone(llama: Any, **changes: Any) -> dict[str, list[int]]:
    driver = drive(llama, **changes)
    driver.add(*good())
    driver.run()
    made = {name: driver.tokens(name) for name in PROMPTS}
    assert POISON not in {token for tokens in (*made.values(), *PROMPTS.values()) for token in tokens}
    return made


@pytest.fixture
def nan_token(llama: Any) -> Iterator[None]:
    """The poison's embedding is NaN."""
    embedding = llama.model.get_input_embeddings().weight
    saved = embedding[POISON].clone()
    embedding.data[POISON] = float("nan")
    yield
    embedding.data[POISON] = saved


class Forward:
    """Stands before the model: may raise, by what is in the step; and counts."""

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raises: Callable[[list[Chunk]], Exception | None] = lambda _: None
        self.num_runs = 0
        self._forward = driver.engine._runner.forward  # type: ignore[attr-defined]
        monkeypatch.setattr(driver.engine._runner, "forward", self)

    def __call__(self, chunks: Any, num_decodes: int) -> Any:
        self.num_runs += 1
        error = self.raises(list(chunks))
        if error is not None:
            raise error
        return self._forward(chunks, num_decodes)


def poisoned(chunks: list[Chunk]) -> Exception | None:
    is_bad = any(POISON in chunk.token_ids or chunk.request_id == "bad" for chunk in chunks)
    return ValueError("a bug in a kernel") if is_bad else None


def exact(driver: Driver) -> None:
    """Charged is what was told, and nothing is left behind."""
    for name, outputs in driver.outputs.items():
        usage = outputs[-1].usage
        assert usage.num_output == driver.ledger.num_output[name] == len(driver.tokens(name))
        assert usage.num_input == driver.ledger.num_input[name]
    assert driver.ledger.is_finished == driver.ledger.is_received
    assert driver.engine._kv.num_free == driver.engine._kv.num_blocks


# -- NaN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 30, -1])
@pytest.mark.parametrize("budget", [12, 256])
@pytest.mark.usefixtures("nan_token")
def test_a_request_whose_logits_are_nan_fails_at_once_and_its_neighbours_do_not_notice(llama, place, budget):
    wanted = alone(llama, max_num_batched_tokens=budget)
    driver = drive(llama, max_num_batched_tokens=budget)
    prompt = list(prompt_of(50, 9))
    prompt[place] = POISON
    first, *others = good()
    driver.add(first, request("bad", prompt, client="mallory"), *others)
    while "bad" not in driver.outputs:
        driver.step()
    last = driver.last("bad")
    assert (last.finish_reason, last.error_code) == ("error", "model_error")
    assert "not finite" in (last.error or "")
    if place == 0 and budget == 12:
        assert last.usage.num_input <= 12, "the rest of the prompt was not computed and is not charged"
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    assert all(driver.last(name).finish_reason == "length" for name in PROMPTS)
    exact(driver)


@pytest.mark.usefixtures("nan_token")
def test_nan_that_lies_under_a_neighbours_padding_is_not_the_neighbours(llama, monkeypatch):
    """Two sequences at the ends of three lanes are read as one strided view, over what the middle one writes."""
    driver = drive(llama, max_num_seqs=3, kv_cache_tokens=96, block_size=4)
    driver.add(request("short", prompt_of(3), max_tokens=20, ignore_eos=True))
    driver.add(request("middle", prompt_of(3, 1), max_tokens=1, ignore_eos=True))
    driver.add(request("long", prompt_of(50, 2), max_tokens=6, ignore_eos=True))
    driver.step()
    forward = Forward(driver, monkeypatch)
    driver.add(request("bad", (POISON,)))
    driver.step()
    assert driver.last("bad").error_code == "model_error"
    assert forward.num_runs > 2, "somebody had to be looked at again, or this test shows nothing"
    forward.num_runs = 0
    for _ in range(4):
        driver.step()
    assert forward.num_runs == 4, "what the culprit left was not cleared: the neighbours stumble over it again"
    driver.run()
    wanted = drive(llama)
    wanted.add(request("short", prompt_of(3), max_tokens=20, ignore_eos=True))
    wanted.run()
    assert driver.tokens("short") == wanted.tokens("short")
    exact(driver)


def test_a_model_that_gives_nan_to_everybody_breaks_the_engine(llama, monkeypatch):
    driver = drive(llama)
    driver.add(*good())
    driver.step()
    norm = llama.model.model.norm.weight
    saved = norm.clone()
    norm.data.fill_(float("nan"))
    try:
        driver.run()
    finally:
        norm.data.copy_(saved)
    assert "whatever it is asked" in (driver.engine.broken or "")
    assert {driver.last(name).error_code for name in PROMPTS} == {"replica_failed"}
    exact(driver)


# -- exceptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["in its prompt", "in its output"])
def test_an_exception_is_pinned_to_the_request_that_raises_it(llama, monkeypatch, late, caplog):
    wanted = alone(llama)
    driver = drive(llama)
    forward = Forward(driver, monkeypatch)
    first, *others = good()
    driver.add(first, request("bad", prompt_of(12, 9), client="mallory", ignore_eos=True), *others)
    for _ in range(3 * late):
        driver.step()
    forward.raises = poisoned
    driver.run()
    last = driver.last("bad")
    assert (last.finish_reason, last.error_code) == ("error", "model_error")
    assert "a bug in a kernel" in (last.error or "")
    assert len(driver.tokens("bad")) == 3 * late
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    assert "the model failed on request bad" in caplog.text
    exact(driver)


def test_one_culprit_of_many_is_found_in_few_runs(llama, monkeypatch):
    driver = drive(llama, max_num_seqs=32)
    forward = Forward(driver, monkeypatch)
    driver.add(*(request(f"g{i}", prompt_of(4, i), max_tokens=2, ignore_eos=True) for i in range(19)))
    driver.add(request("bad", prompt_of(4, 9)))
    driver.add(*(request(f"h{i}", prompt_of(4, i), max_tokens=2, ignore_eos=True) for i in range(12)))
    forward.raises = poisoned
    driver.step()
    assert [name for name in driver.outputs if driver.last(name).finish_reason == "error"] == ["bad"]
    assert forward.num_runs <= 1 + 2 + 2 * 5, "the step, our own prompt and decode, two halves five times"


def test_an_error_that_does_not_come_again_harms_nobody(llama, monkeypatch):
    wanted = alone(llama)
    driver = drive(llama)
    forward = Forward(driver, monkeypatch)
    driver.add(*good())
    errors = iter([None, RuntimeError("a cosmic ray"), *[None] * 9, RuntimeError("another")])
    forward.raises = lambda _: next(errors, None)
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    exact(driver)


def test_when_the_device_is_gone_every_request_fails_and_none_is_taken_any_more(llama, monkeypatch):
    driver = drive(llama, max_num_seqs=2)
    forward = Forward(driver, monkeypatch)
    driver.add(*good())
    driver.step()
    forward.raises = lambda _: RuntimeError("CUDA error: device-side assert triggered")
    events = driver.step()
    assert forward.num_runs <= 3
    assert "device-side assert" in (driver.engine.broken or "")
    assert {output.request_id for output in events.outputs} == PROMPTS.keys()
    for name in PROMPTS:
        assert (driver.last(name).finish_reason, driver.last(name).error_code) == ("error", "replica_failed")
    exact(driver)
    with pytest.raises(ReplicaFailed, match="device-side assert"):
        driver.add(request("late", prompt_of(3)))
    assert not driver.engine.has_work()
    driver.engine.check()


@pytest.mark.parametrize("part", ["plan", "commit"])
def test_bookkeeping_that_fails_breaks_the_engine_and_leaves_nobody_waiting(llama, monkeypatch, part):
    driver = drive(llama, max_num_seqs=2)
    driver.add(*good())
    driver.step()
    monkeypatch.setattr(driver.engine._batcher, part, lambda *_: 1 / 0)
    driver.step()
    assert "division" in (driver.engine.broken or "")
    assert all(driver.last(name).finish_reason == "error" for name in PROMPTS)
    exact(driver)


def test_a_parameter_that_the_sampler_chokes_on_fails_its_request_only(llama, monkeypatch):
    wanted = alone(llama)
    driver = drive(llama)
    with pytest.raises(TypeError):
        driver.add(request("no seed", prompt_of(5), seed=[1]))
    driver.engine.check()
    first, *others = good()
    driver.add(first, request("bad", prompt_of(5), temperature=1.0, min_p=None, ignore_eos=True), *others)
    driver.run()
    assert (driver.last("bad").finish_reason, driver.last("bad").error_code) == ("error", "model_error")
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    assert driver.ledger.is_finished == {*PROMPTS, "bad", "no seed"}


def test_text_that_cannot_be_made_ends_its_request_however_it_ends(llama, monkeypatch):
    driver = drive(llama)
    driver.add(*good())
    driver.engine._live["r1"].text.flush = lambda: 1 / 0  # type: ignore[method-assign]
    driver.run()
    assert driver.last("r1").finish_reason == "error"
    assert [driver.last(name).finish_reason for name in ("r0", "r2")] == ["length"] * 2
    exact_input = {name: driver.last(name).usage.num_input for name in PROMPTS}
    assert exact_input == {name: len(prompt) for name, prompt in PROMPTS.items()}


# -- memory ---------------------------------------------------------------------------------------------------------


def holds(most_tokens: int) -> Callable[[list[Chunk]], Exception | None]:
    """A device with memory for so many tokens in a step."""

    def check(chunks: list[Chunk]) -> Exception | None:
        too_many = sum(len(chunk.token_ids) for chunk in chunks) > most_tokens
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB") if too_many else None

    return check


def test_the_words_of_torchs_own_cpu_allocator_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_step_with_prompts_that_runs_out_of_memory_is_planned_again_with_half_the_tokens(llama, monkeypatch, caplog):
    wanted = alone(llama)
    driver = drive(llama, max_num_seqs=4, max_num_batched_tokens=256)
    forward = Forward(driver, monkeypatch)
    forward.raises = holds(9)
    driver.add(*good())
    events = driver.step()
    assert (events.num_out_of_memory, events.num_prefill_tokens, events.num_preempted) == (1, 0, 3)
    assert driver.engine._kv.num_free == driver.engine._kv.num_blocks, "nobody holds blocks for what is not computed"
    assert driver.engine._batcher.budget.tokens == 15
    driver.step()
    assert driver.engine._batcher.budget.tokens == 7
    assert driver.step().num_prefill_tokens == 7
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    assert driver.ledger.num_input == {name: len(prompt) for name, prompt in PROMPTS.items()}, "charged once"
    assert "ran out of memory: from now on at most 15 of 256 tokens" in caplog.text
    exact(driver)


def test_a_decode_that_runs_out_of_memory_sends_the_most_served_clients_youngest_back(llama, monkeypatch):
    wanted = alone(llama)
    driver = drive(llama, counters={"r1": 5.0}, max_num_seqs=4)
    forward = Forward(driver, monkeypatch)
    driver.add(*good())
    driver.step()
    forward.raises = lambda chunks: MemoryError() if len(chunks) > 2 else None
    events = driver.step()
    assert (events.num_out_of_memory, events.num_preempted) == (1, 1)
    assert driver.engine._batcher.preempted.keys() == {"r1"}
    assert driver.step().num_decode_tokens == 2
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    exact(driver)


def test_a_request_that_finds_no_memory_even_alone_fails_and_the_others_go_on(llama, monkeypatch):
    wanted = alone(llama)
    driver = drive(llama, max_num_seqs=4, max_num_batched_tokens=64)
    forward = Forward(driver, monkeypatch)
    too_long = torch.OutOfMemoryError("CUDA out of memory")
    forward.raises = lambda chunks: too_long if any(chunk.end > 40 for chunk in chunks) else None
    driver.add(request("huge", prompt_of(60, 9)), *good())
    driver.run()
    assert (driver.last("huge").finish_reason, driver.last("huge").error_code) == ("error", "model_error")
    assert "no memory" in (driver.last("huge").error or "")
    assert driver.last("huge").usage.num_input <= 40
    assert {name: driver.tokens(name) for name in PROMPTS} == wanted
    exact(driver)


def test_no_memory_for_anything_breaks_the_engine_after_a_bounded_number_of_steps(llama, monkeypatch):
    driver = drive(llama, max_num_seqs=4, max_num_batched_tokens=64)
    Forward(driver, monkeypatch).raises = holds(0)
    driver.add(*good())
    driver.run(max_steps=12)
    assert "no memory left" in (driver.engine.broken or "")
    exact(driver)


# -- accounts -------------------------------------------------------------------------------------------------------


class ScriptedRunner:
    """A model of no weights that fails as its script says: by request and by how many tokens it has."""

    def __init__(self, faults: dict[tuple[str, int], str]) -> None:
        self.sampler = Sampler()
        self.faults = faults
        """(request, tokens after the chunk) -> raise, nan, or memory, which goes away by itself."""

    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        kinds = {chunk.request_id: self._fault(chunk) for chunk in plan}
        if "memory" in kinds.values():
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")
        if "raise" in kinds.values():
            raise ValueError("scripted")
        finite = (chunk for chunk in plan if kinds[chunk.request_id] != "nan")
        return {chunk.request_id: Sampled(chunk.end % VOCABULARY) if chunk.samples else None for chunk in finite}

    def _fault(self, chunk: Chunk) -> str | None:
        for end in range(chunk.position + 1, chunk.end + 1):
            kind = self.faults.get((chunk.request_id, end))
            if kind == "memory":
                del self.faults[chunk.request_id, end]
            if kind is not None:
                return kind
        return None

    def is_sound(self) -> bool:
        return True

    def release_memory(self) -> None: ...
    def copy(self, copies: Sequence[tuple[int, int]]) -> None: ...
    def scrub(self, blocks: Sequence[int]) -> None: ...


_FAULT = st.tuples(st.integers(0, 5), st.integers(1, 30), st.sampled_from(["raise", "nan", "memory"]))


@settings(max_examples=200, deadline=None)
@given(
    faults=st.lists(_FAULT, max_size=6),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=6),
    num_blocks=st.integers(8, 14),
)
def test_whatever_fails_the_reported_totals_are_what_was_delivered(faults, shapes, num_blocks):
    book: LocalBook[GenerateRequest] = LocalBook(make_policy("vtc"), WeightedTokens())
    kv = KVBlocks(num_blocks, 4, 3)
    batcher = Batcher(kv, book, book, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32)
    runner = ScriptedRunner({(f"r{i}", end): kind for i, end, kind in faults})
    engine = Engine(
        batcher,
        runner,
        kv,
        book,
        book,
        Limits(32, kv.capacity_tokens, 3, 4, VOCABULARY),
        tokenizer=None,
        eos_token_ids=frozenset(),
        reserve_output_tokens=None,
        seed=0,
        clock=VirtualClock(),
    )
    for i, (num_input, max_tokens) in enumerate(shapes):
        engine.add(request(f"r{i}", prompt_of(num_input, i), client="ab"[i % 2], max_tokens=max_tokens))
    scripted = dict(runner.faults)
    outputs: dict[str, list[RequestOutput]] = {}
    finished: list[str] = []
    totals: dict[str, Any] = {}
    for _ in range(400):
        if not engine.has_work():
            break
        events = engine.step()
        engine.check()
        book.check()
        changed = book.take_events()
        totals |= changed.totals
        finished += changed.finished
        for output in events.outputs:
            outputs.setdefault(output.request_id, []).append(output)
    assert engine.broken is None
    assert sorted(finished) == sorted(outputs) == sorted(f"r{i}" for i in range(len(shapes)))
    told: Counter[tuple[str, str]] = Counter()
    for name, some in outputs.items():
        client, usage = "ab"[int(name[1:]) % 2], some[-1].usage
        told[client, "input"] += usage.num_input
        told[client, "output"] += sum(len(output.token_ids) for output in some)
        assert usage.num_output == sum(len(output.token_ids) for output in some)
        may_fail = any(one == name and kind != "memory" for (one, _), kind in scripted.items())
        lonely = any(kind == "memory" for kind in scripted.values())
        assert some[-1].finish_reason == "length" or may_fail or lonely
    charged = {(client, kind): n for client, t in totals.items() for kind, n in
               (("input", t.num_input), ("output", t.num_output))}  # fmt: skip
    assert {key: n for key, n in charged.items() if n} == {key: n for key, n in told.items() if n}
    assert kv.num_free == num_blocks
