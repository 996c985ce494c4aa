"""The embedded model: fetched once, checked, converted, and refused when it is not what it should be."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fairserve.engine import embedded
from fairserve.engine.embedded import EmbeddedModel, ensure_embedded, is_ready
from fairserve.errors import ModelError

GGUF = b"not a real model " * 100


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """A small wheel put there by hand, and the description that fits it."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", GGUF)
        archive.writestr("tiny.dist-info/LICENSE", "do what you like")
    monkeypatch.setenv("FAIRSERVE_MODEL_WHEEL", str(wheel))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return EmbeddedModel("tiny", "tiny", "1.0", digest, "tiny/model.gguf", "tiny.dist-info/LICENSE")


class Converter:
    """Copies instead of converting, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_calls = 0
        self.error = error

    def __call__(self, gguf: Path, folder: Path) -> None:
        self.num_calls += 1
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")
        if self.error:
            raise self.error


def ensure(spec: EmbeddedModel, root: Path, converter: Converter, lines: list[str] | None = None) -> Path:
    return embedded._ensure(spec, root, (lines if lines is not None else []).append, converter)


def test_the_model_is_built_once_and_only_checked_afterwards(spec: EmbeddedModel, tmp_path: Path) -> None:
    converter, lines = Converter(), list[str]()
    folder = ensure(spec, tmp_path / "cache", converter, lines)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "LICENSE").read_text() == "do what you like"
    assert any("converting" in line for line in lines)
    lines.clear()
    assert ensure(spec, tmp_path / "cache", converter, lines) == folder
    assert (converter.num_calls, lines) == (1, [])


def test_nothing_but_the_model_and_the_lock_is_left_in_the_cache(spec: EmbeddedModel, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    (root / ".tiny.building-killed").mkdir(parents=True)
    ensure(spec, root, Converter())
    assert sorted(path.name for path in root.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "no manifest", "broken manifest"])
def test_a_damaged_folder_is_built_again(spec: EmbeddedModel, tmp_path: Path, damage: str) -> None:
    converter = Converter()
    folder = ensure(spec, tmp_path / "cache", converter)
    match damage:
        case "shorter":
            (folder / "model.safetensors").write_bytes(GGUF[:-1])
        case "changed":
            (folder / "config.json").write_text("[]")
        case "missing":
            (folder / "config.json").unlink()
        case "no manifest":
            (folder / embedded.MANIFEST).unlink()
        case "broken manifest":
            (folder / embedded.MANIFEST).write_text("[1")
    assert not is_ready(folder, spec.wheel_sha256)
    ensure(spec, tmp_path / "cache", converter)
    assert converter.num_calls == 2
    assert is_ready(folder, spec.wheel_sha256, full=True)


def test_a_flipped_byte_in_a_large_file_is_found_by_the_full_check(
    spec: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "MAX_QUICK_BYTES", 100)
    folder = ensure(spec, tmp_path / "cache", Converter())
    (folder / "model.safetensors").write_bytes(b"N" + GGUF[1:])
    assert is_ready(folder, spec.wheel_sha256)
    assert not is_ready(folder, spec.wheel_sha256, full=True)


def test_two_starts_at_once_build_it_once(spec: EmbeddedModel, tmp_path: Path) -> None:
    converter, root, together = Converter(), tmp_path / "cache", threading.Barrier(4)

    def start() -> None:
        together.wait()
        ensure(spec, root, converter)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converter.num_calls == 1


def test_a_wheel_with_a_wrong_digest_is_refused_before_it_is_unpacked(spec: EmbeddedModel, tmp_path: Path) -> None:
    other = EmbeddedModel("tiny", "tiny", "1.0", "0" * 64, spec.gguf, spec.license)
    converter = Converter()
    with pytest.raises(ModelError, match="not the expected one"):
        ensure(other, tmp_path / "cache", converter)
    assert converter.num_calls == 0
    assert not (tmp_path / "cache" / "tiny").exists()


def test_a_failed_conversion_leaves_no_half_model(spec: EmbeddedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="conversion failed: RuntimeError: no memory"):
        ensure(spec, tmp_path / "cache", Converter(RuntimeError("no memory")))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".tiny.lock"]


def test_without_a_network_the_error_says_how_to_bring_the_wheel_by_hand(
    spec: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAIRSERVE_MODEL_WHEEL")

    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "tiny==1.0" and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(embedded.subprocess, "run", no_network)
    with pytest.raises(ModelError, match=r"no route to host.*FAIRSERVE_MODEL_WHEEL"):
        ensure(spec, tmp_path / "cache", Converter())


def test_a_wheel_by_hand_that_is_not_there_is_named(
    spec: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRSERVE_MODEL_WHEEL", str(tmp_path / "nowhere.whl"))
    with pytest.raises(ModelError, match=r"nowhere\.whl"):
        ensure(spec, tmp_path / "cache", Converter())


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(spec: EmbeddedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="FAIRSERVE_CACHE"):
        ensure(spec, tmp_path / "file", Converter())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        ensure_embedded("smollm3")


def test_the_cache_follows_its_own_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FAIRSERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_root() == Path("/home/someone/.cache/fairserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert embedded.cache_root() == Path("/xdg/fairserve")
    monkeypatch.setenv("FAIRSERVE_CACHE", "/chosen")
    assert embedded.cache_root() == Path("/chosen")


def test_importing_the_module_imports_no_torch() -> None:
    code = "import sys, fairserve.engine.embedded; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.model
def test_the_embedded_model_loads_tied_and_knows_the_capital_of_france() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_embedded()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
