"""The comparison of engines without any engine: what is sent when, what is counted, what a process may do wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import driver, environments
from benchmarks.peers.driver import Spec
from benchmarks.peers.environments import PEERS, CannotInstall, Peer
from benchmarks.peers.figures import Difference, differences, figures_of, over_rounds, quantile, told
from benchmarks.peers.gguf_files import convert
from benchmarks.peers.processes import DriverFailed, Process


class Counting:
    """Makes a token for every running request in each step; request 0 gets its first two together."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.most = 0

    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        self.running[request] = num_output
        self.most = max(self.most, len(self.running))

    def step(self) -> list[tuple[int, Sequence[int]]]:
        made: list[tuple[int, Sequence[int]]] = []
        for request, left in list(self.running.items()):
            num = 2 if request == 0 and left == 4 else 1
            made.append((request, [request] * num))
            self.running[request] = left - num
            if left == num:
                del self.running[request]
        return made


@pytest.mark.parametrize("concurrency", [1, 3, 9])
def test_so_many_requests_as_asked_are_with_the_engine_and_all_get_their_tokens(concurrency: int) -> None:
    engine = Counting()
    made = driver._run(engine, [[1]] * 5, concurrency, num_output=4)
    assert engine.most == min(concurrency, 5)
    assert [request["tokens"] for request in made] == [[i] * 4 for i in range(5)]
    assert all(len(request["token_s"]) == 4 and len(request["sent_s"]) == 1 for request in made)
    assert all(request["sent_s"][0] <= request["token_s"][0] for request in made)


def test_figures_are_counted_from_the_first_request_sent_to_the_last_token() -> None:
    requests = [
        {"sent_s": [10.0], "token_s": [10.5, 10.6, 10.9], "tokens": [1, 2, 3]},
        {"sent_s": [11.0], "token_s": [11.1, 11.4, 12.0], "tokens": [4, 5, 6]},
    ]
    figures = figures_of(requests)
    assert figures.output_tokens_per_s == pytest.approx(6 / 2.0)
    assert (figures.ttft_p50, figures.ttft_p99) == pytest.approx((100.0, 500.0))
    assert (figures.inter_token_p50, figures.inter_token_p99) == pytest.approx((300.0, 600.0))
    assert over_rounds([figures, figures])["ttft_p99"]["median"] == pytest.approx(500.0)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_the_first_token_that_differs_is_told_with_the_gap_of_the_reference() -> None:
    found = differences([[1, 2, 3], [1, 9, 9]], [[1, 2, 3], [1, 2, 3], [7, 7, 7]], [[1.0] * 3, [2.0, 1e-4, 3.0], []])
    assert found == [Difference(1, 1, 1e-4)]
    assert told(found, 2) == "1 of 2 differ; logits gap there: largest 0.0001; 1 below 0.001"
    assert told([], 4) == "4 of 4 equal"


def test_a_driver_that_ends_is_told_with_its_last_words() -> None:
    with (
        Process(sys.executable, "no_such_driver", Spec("model", 1, 1, 8)) as process,
        pytest.raises(DriverFailed, match="no_such_driver"),
    ):
        process.ready()


def test_a_driver_that_says_nothing_is_ended() -> None:
    with Process(sys.executable, "driver", Spec("model", 1, 1, 8), limit_s=0.05) as process:
        process.pause()
        with pytest.raises(DriverFailed, match=r"no answer within 0\.05 s"):
            process.ready()


def test_ours_and_transformers_need_no_environment_of_their_own() -> None:
    assert {environments.python_of(PEERS[name]) for name in ("ours", "transformers")} == {sys.executable}


def test_what_cannot_be_installed_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments.sys, "executable", "/bin/false")
    with pytest.raises(CannotInstall, match=r"never cannot be installed: .* it said nothing"):
        environments.python_of(Peer("never", "never", "fp32", packages=("never==1",)), tmp_path)


@pytest.mark.parametrize("words", [["--peers", "ours,theirs"], ["--rounds", "0"], ["--concurrency", "0,8"]])
def test_what_cannot_be_compared_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(words)
    assert "known are ours" in (said := capsys.readouterr().err) or "at least 1" in said


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0])
def test_a_gguf_file_keeps_its_metadata_and_its_weights(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    matrix = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
    source = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    source.add_uint32("llama.block_count", 30)
    source.add_array("tokenizer.ggml.tokens", ["a", "b"])
    source.add_tensor("norm.weight", np.arange(3, dtype=np.float32))
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    source.add_tensor("blk.0.weight", gguf.quantize(matrix, q4_1), raw_dtype=q4_1)
    source.write_header_to_file()
    source.write_kv_data_to_file()
    source.write_tensors_to_file()
    source.close()
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", kind)
    made = gguf.GGUFReader(tmp_path / "b.gguf")
    assert made.get_field("llama.block_count").contents() == 30
    assert made.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    norm, weight = made.tensors
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32 and list(norm.data) == [0.0, 1.0, 2.0]
    assert weight.tensor_type == kind
    meant = gguf.dequantize(gguf.quantize(matrix, q4_1), q4_1)
    assert np.abs(gguf.dequantize(weight.data, kind) - meant).max() < (1e-9 if kind.name == "F32" else 0.01)
