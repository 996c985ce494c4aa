"""Finding and loading models: folders work, everything else says what was tried."""

from __future__ import annotations

import json

import pytest
import torch

from fairserve.config import EngineConfig
from fairserve.engine.loading import load_model, load_tokenizer
from fairserve.errors import ModelError
from tests.engine.support import TOKENIZER, drive, prepare, prompt_of, reference, request, tiny

CONFIG = EngineConfig(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = tiny("llama", vocab_size=300)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_a_local_folder_loads_with_tokenizer_and_all_its_ends(folder):
    loaded = load_model(str(folder), CONFIG)
    assert loaded.eos_token_ids == {7, 9}
    assert loaded.max_context == 128
    assert loaded.vocab_size == 300
    assert loaded.dtype == torch.float32
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hé")) == "hé"
    assert loaded.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, dim, bytes


def test_the_default_on_a_cpu_fuses_and_still_equals_generate(folder):
    loaded = load_model(str(folder), CONFIG)
    assert type(loaded.model).__name__ == "FusedDecoder"
    driver = drive(loaded)
    driver.add(request("r", prompt_of(20), max_tokens=10))
    driver.run()
    assert driver.tokens("r") == reference(tiny("llama", vocab_size=300), prompt_of(20), 10, eos=(7, 9))


def test_the_tokenizer_loads_without_weights(folder, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert load_tokenizer(str(folder)).encode("a")


def test_bfloat16_loads_and_runs(folder):
    loaded = load_model(str(folder), EngineConfig(device="cpu", dtype="bfloat16", cpu_linear="eager"))
    assert loaded.dtype == torch.bfloat16
    driver = drive(loaded)
    driver.add(*(request(f"r{i}", prompt_of(5 + 9 * i, i), temperature=0.8, max_tokens=6) for i in range(3)))
    driver.run()
    assert all(driver.last(f"r{i}").finish_reason in ("length", "stop") for i in range(3))


@pytest.mark.parametrize("load", [load_tokenizer, lambda model: load_model(model, CONFIG)])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param("/no/such/folder", "no folder /no/such/folder", id="folder"),
        pytest.param("./nothing", "no folder nothing", id="relative"),
        pytest.param("nobody/nothing", "no such model, no access, or no network", id="hub"),
    ],
)
def test_a_model_that_is_not_there_says_what_was_tried(load, model, said):
    with pytest.raises(ModelError, match=said) as caught:
        load(model)
    assert caught.value.model == model


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(tmp_path), CONFIG)


def test_a_folder_of_another_kind_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(ModelError, match="do not load"):
        load_model(str(tmp_path), CONFIG)


def test_a_gpu_that_is_not_there_is_said_to_be_missing(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match="no GPU"):
        load_model(str(folder), EngineConfig(device="cuda"))


def test_scaling_that_would_depend_on_the_batch_ends_the_context_where_it_begins():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    assert prepare(tiny("llama", rope_parameters=rope)).max_context == 64
