"""Whatever happens, what was charged equals what the outputs say, and every block comes home."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fairserve.clock import VirtualClock
from fairserve.engine.batching import Batcher, StepPlan
from fairserve.engine.engine import Engine
from fairserve.engine.events import Limits
from fairserve.engine.kv_blocks import KVBlocks
from fairserve.engine.prefix_cache import KeyMaker
from fairserve.engine.request import RequestOutput
from fairserve.engine.sampling import Sampled, Sampler
from tests.engine.support import EOS, FifoQueue, Ledger, drive, prompt_of, request

_CAPACITY_BLOCKS = 12
_BLOCK = 4
_SLOTS = 4


class FakeRunner:
    """A model of no weights: the token after n tokens is n % 30; it can break or give NaN when told to."""

    def __init__(self) -> None:
        self.sampler = Sampler()
        self.breaks = False
        self.raises: set[str] = set()
        self.nan: set[str] = set()

    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        if self.breaks:
            self.breaks = False
            raise RuntimeError("CUDA out of memory")
        names = {chunk.request_id for chunk in plan}
        if names & self.raises:
            raise ValueError("a poisonous prompt")
        return {c.request_id: Sampled(c.end % 30) if c.samples else None for c in plan if c.request_id not in self.nan}

    def is_sound(self) -> bool:
        return True

    def release_memory(self) -> None:
        pass

    def copy(self, copies: Any) -> None:
        pass

    def scrub(self, blocks: Any) -> None:
        pass


class Engines(RuleBasedStateMachine):
    """Random adds, aborts, failures and steps on an engine whose cache is too small for its slots. All prompts begin
    alike."""

    shares = False

    def __init__(self) -> None:
        super().__init__()
        self.queue = FifoQueue({"a": 2.0, "b": 1.0})
        self.ledger = Ledger()
        self.runner = FakeRunner()
        self.kv = KVBlocks(_CAPACITY_BLOCKS, _BLOCK, _SLOTS, shares=self.shares)
        batcher = Batcher(
            self.kv,
            self.queue,
            self.ledger,
            max_num_seqs=_SLOTS,
            max_num_batched_tokens=10,
            max_model_len=40,
            prefix_cache=KeyMaker(b"secret", "client", _BLOCK),
        )
        self.engine = Engine(
            batcher,
            self.runner,
            self.kv,
            self.queue,
            self.ledger,
            Limits(40, _CAPACITY_BLOCKS * _BLOCK, _SLOTS, _BLOCK, 200),
            tokenizer=None,
            eos_token_ids=frozenset({EOS}),
            reserve_output_tokens=None,
            seed=0,
            clock=VirtualClock(),
        )
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.num_added = 0

    @rule(length=st.integers(1, 39), max_tokens=st.integers(0, 30), client=st.sampled_from("abc"), eos=st.booleans())
    def add(self, length: int, max_tokens: int, client: str, eos: bool) -> None:
        name = f"r{self.num_added}"
        self.num_added += 1
        self.outputs[name] = []
        self.engine.add(request(name, prompt_of(length), client=client, max_tokens=max_tokens, ignore_eos=not eos))

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.outputs))))

    @rule()
    def memory_runs_out(self) -> None:
        self.runner.breaks = True

    @precondition(lambda self: self.outputs)
    @rule(data=st.data(), nan=st.booleans())
    def the_model_begins_to_fail_on_a_request(self, data: st.DataObject, nan: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.outputs)))
        (self.runner.nan if nan else self.runner.raises).add(name)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            events = self.engine.step()
            self.engine.check()
            for output in events.outputs:
                self.outputs[output.request_id].append(output)
            assert events.free_slots == _SLOTS - events.num_running - events.num_waiting
            assert events.num_prefill_tokens + events.num_decode_tokens <= 10
            assert events.resident_tokens <= (_CAPACITY_BLOCKS - self.kv.num_free) * _BLOCK

    @invariant()
    def holds(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work():
                break
            self.step(times=1)
        assert not self.engine.has_work(), "no progress"
        assert self.kv.num_free == _CAPACITY_BLOCKS
        assert self.engine.idle_events().free_kv_tokens == _CAPACITY_BLOCKS * _BLOCK
        for name, outputs in self.outputs.items():
            assert [o.finish_reason is not None for o in outputs] == [False] * (len(outputs) - 1) + [True]
            usage = outputs[-1].usage
            assert usage.num_output == self.ledger.num_output[name] == sum(len(o.token_ids) for o in outputs)
            assert usage.num_input == self.ledger.num_input[name]
            assert usage.num_cached == self.ledger.num_cached.get(name, 0) <= usage.num_input
            is_bad = name in self.runner.nan | self.runner.raises
            assert (outputs[-1].finish_reason == "error") <= is_bad, "a neighbour paid for it"
        assert self.ledger.is_finished == self.ledger.is_received == self.outputs.keys()


class SharingEngines(Engines):
    """The same with blocks that several requests hold."""

    shares = True


Engines.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
SharingEngines.TestCase.settings = settings(max_examples=75, stateful_step_count=30, deadline=None)
TestEngines = Engines.TestCase
TestSharingEngines = SharingEngines.TestCase


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_abort_at_any_step_keeps_the_accounts_of_a_real_model(llama, data):
    driver = drive(llama, kv_cache_tokens=128, max_num_batched_tokens=16, max_num_seqs=4)
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    aborts = {f"r{i}": data.draw(st.integers(0, 15)) for i in range(len(lengths)) if data.draw(st.booleans())}
    driver.add(*(request(f"r{i}", prompt_of(length, i), max_tokens=12) for i, length in enumerate(lengths)))
    for step in range(400):
        for name, when in aborts.items():
            if when == step:
                driver.engine.abort(name)
        if not driver.engine.has_work():
            break
        driver.step()
    for name in driver.outputs:
        usage = driver.last(name).usage
        assert (usage.num_input, usage.num_output) == (driver.ledger.num_input[name], driver.ledger.num_output[name])
        assert len(driver.tokens(name)) == usage.num_output
    assert driver.outputs.keys() == {f"r{i}" for i in range(len(lengths))}
    assert driver.engine._kv.num_free == driver.engine._kv.num_blocks
