"""What a profile measures is what the engine computed, and the file it writes can be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fairserve import cli
from fairserve.clock import VirtualClock
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine import profile
from fairserve.engine.batching import StepPlan
from fairserve.engine.engine import Engine, make_engine
from fairserve.engine.events import Limits
from fairserve.engine.loading import LoadedModel
from fairserve.engine.profile import batch_sizes, context_lengths, measure
from fairserve.engine.request import GenerateRequest
from fairserve.engine.runner import Runner
from fairserve.engine.sampling import Sampled
from fairserve.errors import ConfigError, ReplicaFailed
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens
from fairserve.simulate.fit import fit
from fairserve.simulate.step_time import StepTime
from tests.engine.support import config
from tests.tiny_model import save_tiny_model

Capture = pytest.CaptureFixture[str]
TRUE = StepTime(0.02, 0.5e-3, 3e-5, 0.01, 0.8e-3, 2e-6)
CHUNK = 32
WARM_UP_S = 0.5
Work = tuple[int, int, int, int]


class Timed:
    """Stands in for the model: a step takes as long as ``TRUE`` says of its plan. Remembers every plan's work."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.works: list[Work] = []

    def run(self, plan: StepPlan) -> dict[str, Sampled | None]:
        work = (
            len(plan.decodes),
            sum(chunk.end for chunk in plan.decodes),
            sum(len(chunk.token_ids) for chunk in plan.prefills),
            sum(len(chunk.token_ids) * chunk.end for chunk in plan.prefills),
        )
        self.works.append(work)
        self.clock.advance(TRUE.seconds(*work))
        return {chunk.request_id: Sampled(50) if chunk.samples else None for chunk in plan}


def build(loaded: LoadedModel, clock: VirtualClock, **changes: Any) -> Engine:
    book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
    settings = config(**{"max_num_batched_tokens": CHUNK, **changes})
    return make_engine(loaded, settings, reserve_output_tokens=None, queue=book, account=book, clock=clock)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    made = Timed()
    monkeypatch.setattr(Runner, "run", lambda _, plan: made.run(plan))
    return made


def test_an_engine_whose_steps_take_known_time_is_found_out(llama: LoadedModel, timed: Timed) -> None:
    samples = measure(build(llama, timed.clock), CHUNK, timed.clock, max_s=1e6)
    found = fit(samples)
    assert list(found.coefficients.values()) == pytest.approx(list(TRUE.coefficients.values()), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": 5}, {"kv_cache_tokens": 160}, {"max_model_len": 41}])
def test_every_sample_counts_what_its_step_computed(llama: LoadedModel, timed: Timed, changes: dict[str, int]) -> None:
    """The engine's events are sums; which prompt got how far has to be worked out from them."""
    samples = measure(build(llama, timed.clock, **changes), CHUNK, timed.clock, max_s=1e6)
    counted = [
        (s.num_decodes, s.decode_context_tokens, s.num_prefill_tokens, s.prefill_context_tokens) for s in samples
    ]
    assert len(counted) > 30
    works = iter(timed.works)
    assert all(any(work == count for work in works) for count in counted), "a sample that no step computed"


def test_a_prompt_of_which_one_token_is_left_is_a_decode(llama: LoadedModel, timed: Timed) -> None:
    bench = profile._Bench(build(llama, timed.clock), 10, timed.clock)
    bench.grow_to(1, CHUNK + 1)
    bench.step()
    works = [(s.num_decodes, s.decode_context_tokens, s.num_prefill_tokens) for s in bench.samples]
    assert works == [(0, 0, CHUNK), (1, CHUNK + 1, 0), (1, CHUNK + 2, 0)]


def test_prompts_decodes_and_both_together_are_measured(llama: LoadedModel, timed: Timed) -> None:
    samples = measure(build(llama, timed.clock), CHUNK, timed.clock, max_s=1e6)
    kinds = {(s.num_decodes > 0, s.num_prefill_tokens > 0) for s in samples}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert {1, 2, 4, 8} <= {s.num_decodes for s in samples if not s.num_prefill_tokens}


def test_when_time_is_short_the_long_contexts_are_left_out(llama: LoadedModel, timed: Timed) -> None:
    everything = measure(build(llama, timed.clock), CHUNK, timed.clock, max_s=1e6)
    began_s = timed.clock.now_s()
    some = measure(build(llama, timed.clock), CHUNK, timed.clock, max_s=3.0)
    assert timed.clock.now_s() - began_s < 3.0 + WARM_UP_S
    assert max(s.decode_context_tokens for s in some) < max(s.decode_context_tokens for s in everything)
    fit(some)


def test_the_engine_is_idle_and_whole_afterwards(llama: LoadedModel, timed: Timed) -> None:
    engine = build(llama, timed.clock)
    measure(engine, CHUNK, timed.clock, max_s=1e6)
    engine.check()
    assert not engine.has_work()


def test_an_engine_that_fails_is_not_measured_further(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Runner, "run", fail)
    with pytest.raises(ReplicaFailed, match="out of memory"):
        measure(build(llama, clock), CHUNK, clock)


def test_a_context_with_room_for_nothing_is_refused(llama: LoadedModel, timed: Timed) -> None:
    with pytest.raises(ConfigError, match="at least 8 tokens"):
        measure(build(llama, timed.clock, max_model_len=7), CHUNK, timed.clock)


@pytest.mark.parametrize(
    ("longest", "lengths"), [(8, [8]), (31, [31]), (32, [16, 32]), (96, [16, 96]), (2000, [16, 64, 256, 2000])]
)
def test_contexts_grow_by_four_to_the_longest(longest: int, lengths: list[int]) -> None:
    assert context_lengths(longest) == lengths


@pytest.mark.parametrize(
    ("num_tokens", "most", "sizes"),
    [(16, 99, [1, 2, 4, 8, 12]), (300, 99, [1, 2, 3]), (16, 4, [1, 2, 4]), (16, 1, [1]), (10_000, 99, [1])],
)
def test_batches_double_up_to_slots_memory_and_patience(num_tokens: int, most: int, sizes: list[int]) -> None:
    limits = Limits(max_model_len=10_000, kv_capacity_tokens=1000, max_num_seqs=12, block_size=16, vocab_size=100)
    assert batch_sizes(limits, num_tokens, most) == sizes


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), max_len=256)


def test_the_command_writes_a_file_that_a_scenario_can_use(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "mine.json"
    words = ["engine.device=cpu", "engine.num_threads=1", "engine.max_num_seqs=4", "served_model_name=tiny"]
    assert cli.main(["profile", "--out", str(out), f"model={tiny_folder}", *words]) == 0
    printed = capsys.readouterr().out
    assert "each prompt token" in printed and 'step_time = "mine.json"' in printed
    step_time = StepTime.named("mine.json", tmp_path)
    assert step_time.seconds(4, 400, 0) > 0
    origin = step_time.origin
    assert origin is not None
    assert (origin.kind, origin.model, origin.engine["num_threads"]) == ("measured", "tiny", 1)
    assert origin.num_samples > 30 and origin.num_held_out > 5
    assert origin.largest["num_decodes"] == 4
    assert "torch" in origin.versions and origin.machine["processor"]
    assert str(tiny_folder) not in out.read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["engine.max_num_seq=4"], 2, "did you mean 'max_num_seqs'"),
        (["--out", "no/such/folder/p.json"], 2, "there is no folder"),
        (["--out", "."], 2, "is a folder"),
        (["model=/no/such/model"], 1, "there is no folder"),
        (["--config", "none.yaml"], 2, "No such file"),
    ],
)
def test_a_wrong_command_measures_nothing(words: list[str], code: int, message: str, capsys: Capture) -> None:
    assert cli.main(["profile", *words]) == code
    assert message in capsys.readouterr().err
