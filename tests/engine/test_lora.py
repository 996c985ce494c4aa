"""Requests of different LoRA adapters, and of none, share steps; each gets the tokens that peft makes of it alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fairserve.config import EMBEDDED_MODEL
from fairserve.engine.embedded import ensure_embedded
from fairserve.engine.fused_decoder import FusedDecoder
from fairserve.engine.loading import LoadedModel, load_model, load_tokenizer, prepare_model
from fairserve.engine.lora import Factors, Lora, StepRows
from fairserve.errors import InvalidRequest, ModelError
from tests.engine.support import Driver, config, drive, prompt_of, reference, request, tiny
from tests.engine.test_fused_decoder import Rounded

LENGTHS = (1, 17, 40)
MAX_TOKENS = 10
NAMES = ("", "full", "part")
PROMPTS = {f"{name or 'base'}-{length}": prompt_of(length, length) for length in LENGTHS for name in NAMES}
"""The same prompts under each adapter and under none."""


def adapter_of(request_name: str) -> str:
    name = request_name.partition("-")[0]
    return "" if name == "base" else name


def wrapped(model: Any, name: str, seed: int = 3, std: float = 0.4, **changes: Any) -> Any:
    """peft's model with an adapter whose effect shows. "full" adapts every linear, "part" some of one layer, with ranks
    and scales of their own."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    if name == "part":
        one, other = ("c_attn", "c_fc") if model.config.model_type == "gpt2" else ("q_proj", "up_proj")
        settings = {"r": 3, "lora_alpha": 5, "target_modules": [one, other], "layers_to_transform": [1]}
        settings |= {"rank_pattern": {other: 6}, "alpha_pattern": {one: 9}, "use_rslora": True}
    with warnings.catch_warnings(action="ignore"):
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed + len(changes))
    for path, parameter in made.named_parameters():
        if "lora_" in path:
            parameter.data.normal_(std=std, generator=generator)
    return made.eval()


def saved(root: Path, kind: str = "llama") -> dict[str, str]:
    """Folders of the adapters."""
    for name in NAMES[1:]:
        wrapped(tiny(kind), name).save_pretrained(root / name)
    return {name: str(root / name) for name in NAMES[1:]}


def wanted(kind: str = "llama") -> dict[str, list[int]]:
    models = {name: wrapped(tiny(kind), name) if name else tiny(kind) for name in NAMES}
    return {name: reference(models[adapter_of(name)], prompt, MAX_TOKENS) for name, prompt in PROMPTS.items()}


def prepare(model: Any, adapters: dict[str, str], cpu_linear: str = "eager") -> LoadedModel:
    return prepare_model(model, config(cpu_linear=cpu_linear, adapters=adapters))


def served(loaded: LoadedModel, **changes: Any) -> tuple[dict[str, list[int]], Driver]:
    """Tokens of all prompts, in one batch as far as it goes."""
    driver = drive(loaded, **{"max_num_seqs": len(PROMPTS), **changes})
    for name, prompt in PROMPTS.items():
        driver.add(replace(request(name, prompt, max_tokens=MAX_TOKENS), adapter=adapter_of(name)))
    driver.run()
    return {name: driver.tokens(name) for name in PROMPTS}, driver


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The adapters of the tiny Llama."""
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(folders) -> LoadedModel:
    """The tiny Llama with its adapters, as a decoder of few operations."""
    return prepare(tiny("llama"), folders, "fused")


@pytest.fixture(scope="module")
def llama_tokens() -> dict[str, list[int]]:
    return wanted()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "mistral"])
def test_each_request_of_a_mixed_batch_gets_the_tokens_of_peft(kind, tmp_path):
    folders, right = saved(tmp_path, kind), wanted(kind)
    for length in LENGTHS:
        said = {tuple(right[f"{name or 'base'}-{length}"]) for name in NAMES}
        assert len(said) == len(NAMES), "an adapter that shows"
    for cpu_linear in ("eager", "packed", "auto"):
        loaded = prepare(tiny(kind), folders, cpu_linear)
        assert isinstance(loaded.model, FusedDecoder) == (cpu_linear == "auto" and kind != "gpt2")
        assert served(loaded)[0] == right, cpu_linear


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_int8_rounds_the_base_and_leaves_adapters_as_they_are(kind, tmp_path):
    models = {name: wrapped(tiny(kind), name) if name else tiny(kind) for name in NAMES}
    for model in models.values():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != "default":  # peft's own
                    setattr(parent, name, Rounded(child))
    right = {name: reference(models[adapter_of(name)], prompt, MAX_TOKENS) for name, prompt in PROMPTS.items()}
    assert served(prepare(tiny(kind), saved(tmp_path, kind), "int8"))[0] == right


@pytest.mark.parametrize("cpu_linear", ["eager", "packed"])
def test_adapters_of_float32_serve_a_model_of_bfloat16(cpu_linear, folders):
    loaded = prepare(tiny("llama").bfloat16(), folders, cpu_linear)  # and its logits are near peft's
    said = served(loaded)[0]
    assert len({tuple(said[f"{name or 'base'}-40"]) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"max_num_batched_tokens": 9}, id="chunked"),
        pytest.param({"kv_cache_tokens": 160, "max_num_batched_tokens": 32}, id="preempted"),
        pytest.param({"block_size": 1, "kv_cache_tokens": 200, "max_num_seqs": 5}, id="scattered"),
    ],
)
def test_chunks_preemptions_and_scattered_blocks_change_nothing(changes, llama, llama_tokens, request):
    got, driver = served(llama, **changes)
    assert got == llama_tokens
    assert driver.num_preempted > 0 or "preempted" not in request.node.name


def test_requests_that_arrive_while_others_run_get_the_same_tokens(llama, llama_tokens):
    driver = drive(llama, max_num_batched_tokens=12)
    for name, prompt in reversed(PROMPTS.items()):
        driver.add(replace(request(name, prompt, max_tokens=MAX_TOKENS), adapter=adapter_of(name)))
        driver.step()
        driver.step()
    driver.run()
    assert {name: driver.tokens(name) for name in PROMPTS} == llama_tokens


def test_a_request_that_goes_on_from_a_replica_that_died_keeps_its_adapter(llama, llama_tokens):
    driver = drive(llama)
    for name in NAMES:
        said = llama_tokens[f"{name or 'base'}-17"]
        rest = request(name or "base", (*prompt_of(17, 17), *said[:4]), max_tokens=MAX_TOKENS - 4)
        driver.add(replace(rest, adapter=name, num_generated=4))
    driver.run()
    for name in NAMES:
        assert driver.tokens(name or "base") == llama_tokens[f"{name or 'base'}-17"][4:]


def test_weights_merged_by_peft_give_the_same(llama_tokens):
    for name in NAMES[1:]:
        merged = prepare(wrapped(tiny("llama"), name).merge_and_unload(), {}, "auto")
        driver = drive(merged)
        mine = [one for one in PROMPTS if adapter_of(one) == name]
        driver.add(*(request(one, PROMPTS[one], max_tokens=MAX_TOKENS) for one in mine))
        driver.run()
        assert {one: driver.tokens(one) for one in mine} == {one: llama_tokens[one] for one in mine}


def test_log_probabilities_of_a_prompt_are_those_under_its_adapter(llama):
    prompt = prompt_of(17)
    driver = drive(llama, max_num_batched_tokens=7)
    for name in NAMES:
        driver.add(replace(request(name or "base", prompt, max_tokens=1, prompt_logprobs=0), adapter=name))
    driver.run()
    for name in NAMES:
        model = wrapped(tiny("llama"), name) if name else tiny("llama")
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        got = [one.logprob for output in driver.outputs[name or "base"] for one in output.logprobs][: len(prompt) - 1]
        assert got == pytest.approx([right[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-3)


@pytest.mark.parametrize("cpu_linear", ["eager", "fused"])
def test_an_adapter_finds_nothing_that_another_one_left_in_the_prefix_cache(cpu_linear, folders, llama_tokens):
    driver = drive(prepare(tiny("llama"), folders, cpu_linear))
    for turn in ("first", "again"):
        for name in NAMES:
            request_id = f"{turn} {name}"
            driver.add(replace(request(request_id, prompt_of(40, 40), max_tokens=MAX_TOKENS), adapter=name))
            driver.run()
            assert driver.tokens(request_id) == llama_tokens[f"{name or 'base'}-40"]
            assert driver.last(request_id).usage.num_cached == (36 if turn == "again" else 0)


def test_an_unknown_adapter_is_refused_and_the_known_ones_named(llama, folders):
    driver = drive(llama)
    with pytest.raises(InvalidRequest, match=r"no adapter 'other' here; known: full, part") as refused:
        driver.add(replace(request("r", (1, 2)), adapter="other"))
    assert refused.value.param == "model"
    assert not driver.engine.has_work()
    with pytest.raises(InvalidRequest, match="known: none"):
        drive(prepare(tiny("llama"), {})).add(replace(request("r", (1, 2)), adapter="full"))


def test_steps_without_adapters_are_those_of_a_model_without(llama, llama_tokens):
    """To the bit: nothing is computed in another way or order."""
    alone = prepare(tiny("llama"), {}, "fused")
    logits = []
    for loaded in (alone, llama):
        driver = drive(loaded)
        driver.add(*(request(name, prompt, max_tokens=4, logprobs=3) for name, prompt in PROMPTS.items()))
        driver.run()
        logits.append({name: [one.logprobs for one in driver.outputs[name]] for name in PROMPTS})
    assert logits[0] == logits[1]


def test_the_model_is_sound_without_its_adapters(llama):
    driver = drive(llama)
    driver.add(replace(request("r", prompt_of(9), max_tokens=4), adapter="full"))
    driver.step()
    llama.adapters.step.names = ("nobody's",)  # left by a step that failed
    assert driver.engine._runner.is_sound()
    assert llama.adapters.step.names == ()


@pytest.mark.parametrize("spans", [[("x", 1, 2), ("", 3, 1), ("y", 4, 1), ("x", 5, 1)], [("", 0, 2), ("x", 2, 3)], []])
@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_rows_get_what_their_adapter_adds_and_no_more(spans, shape):
    table = {name: Factors(torch.randn(4, r), torch.randn(r, 3)) for name, r in (("x", 2), ("z", 5))}
    step = StepRows(torch.device("cpu"))
    step.begin(spans)
    x, y = torch.randn(*shape, 4), torch.randn(*shape, 8)
    x[..., 0, :] = float("nan")  # of a row without adapter
    right = y.clone().view(6, 8)
    for name, row, count in spans:
        if name in table:
            added = x.view(6, 4)[row : row + count] @ table[name].a @ table[name].b
            right[row : row + count, 2:5] += added
    part = y.split([2, 3, 3], dim=-1)[1]  # of a product for several linears
    if step.names:
        Lora(table, step).add(part, x)
    assert torch.allclose(y.view(6, 8), right, atol=1e-5)


# --------------------------------------------------------------------------------------------- what is not served


def changed(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)


def pickled(folder: Path) -> None:
    held = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (lambda f: changed(f, use_dora=True), r"sets use_dora = True; may be set: alpha_pattern, .*use_rslora"),
    "modules_to_save": (lambda f: changed(f, modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
    "bias": (lambda f: changed(f, bias="all"), "bias = 'all'"),
    "bias of B": (lambda f: changed(f, lora_bias=True), "lora_bias = True"),
    "a later peft's": (lambda f: changed(f, use_newest=True), "use_newest = True"),
    "another start": (lambda f: changed(f, init_lora_weights="pissa"), "changed the base's weights .*'pissa'"),
    "another task": (lambda f: changed(f, task_type="SEQ_CLS"), "task_type is SEQ_CLS, only CAUSAL_LM"),
    "another method": (lambda f: changed(f, peft_type="LOHA"), "only LORA is served"),
    "no method": (lambda f: changed(f, peft_type="NEW"), "peft cannot read its adapter_config.json"),
    "broken": (lambda f: (f / "adapter_config.json").write_text("{"), "peft cannot read its adapter_config.json"),
    "no such linears": (lambda f: changed(f, target_modules=["w1"]), "does not fit this model: Target modules"),
    "a rank": (lambda f: changed(f, r=5), "does not fit this model: .*size mismatch"),
    "too few": (lambda f: weights(f, lambda held: held.popitem()), "1 weights are missing and 0 belong nowhere"),
    "too many": (
        lambda f: changed(f, target_modules=["q_proj"]),
        "0 weights are missing and 24 belong nowhere, such as",
    ),
    "NaN": (lambda f: weights(f, lambda held: next(iter(held.values())).fill_(float("nan"))), "not finite"),
    "a pickle": (pickled, r"no adapter_model.safetensors; no other format is read \(adapter_model.bin is a pickle\)"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
}


@pytest.mark.parametrize("flaw", SPOILT)
def test_what_cannot_be_served_is_refused_with_its_reason(flaw, tmp_path):
    wrapped(tiny("llama"), "full").save_pretrained(tmp_path)
    spoil, words = SPOILT[flaw]
    spoil(tmp_path)
    with pytest.raises(ModelError, match=words) as refused:
        prepare(tiny("llama"), {"mine": str(tmp_path)})
    assert f"model 'mine': the LoRA adapter in {str(tmp_path)!r} cannot be served: " in str(refused.value)


def test_an_adapter_of_the_head_is_refused(tmp_path):
    wrapped(tiny("llama"), "full", target_modules=["q_proj", "lm_head"]).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(
        ModelError, match=r"it adapts lm_head \(Linear\); only linears between embedding and output head"
    ):
        prepare(tiny("llama"), {"mine": str(tmp_path)})


def test_an_adapter_of_the_embedding_is_refused(tmp_path):
    wrapped(tiny("llama"), "full", target_modules=["embed_tokens"]).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(ModelError, match=r"more than LoRA's two matrices .*embed_tokens.lora_embedding_A"):
        prepare(tiny("llama"), {"mine": str(tmp_path)})


def test_an_adapter_that_brings_embeddings_of_its_own_is_refused(tmp_path):
    """peft would load them over the base's, for everybody."""
    wrapped(tiny("llama"), "full").save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"more than LoRA's two matrices .*embed_tokens.weight"):
        prepare(tiny("llama"), {"mine": str(tmp_path)})


def test_an_adapter_of_another_base_is_refused(folders):
    with pytest.raises(ModelError, match=r"does not fit this model: .*size mismatch"):
        prepare(tiny("llama", intermediate_size=56), folders)


def test_a_model_that_comes_with_an_adapter_gets_no_others(folders):
    with pytest.raises(ModelError, match="the model itself comes with an adapter"):
        prepare(wrapped(tiny("llama"), "part").base_model.model, folders)


@pytest.mark.parametrize("where", ["/nowhere", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(where):
    with pytest.raises(ModelError, match="there is no folder"):
        prepare(tiny("llama"), {"mine": where})


def test_what_computes_something_else_than_peft_is_refused(folders, monkeypatch):
    monkeypatch.setattr(Lora, "add", lambda self, y, x: y)
    with pytest.raises(ModelError, match="'full': the LoRA adapter computes something else here than through peft"):
        prepare(tiny("llama"), folders)


@pytest.mark.parametrize("changes", [{"adapters": {"a b": "x"}}, {"adapters": {"": "x"}}, {"adapters": {"a": ""}}])
def test_names_and_places_are_checked(changes):
    with pytest.raises(ValidationError):
        config(**changes)


def test_one_process_is_asked_for():
    with pytest.raises(ValidationError, match="adapters are served with tensor_parallel_size 1 only, not 2"):
        config(adapters={"a": "x"}, tensor_parallel_size=2)


# ---------------------------------------------------------------------------------------------- the embedded model


@pytest.mark.model
def test_the_embedded_model_serves_adapters_that_peft_made(tmp_path):
    names = {"": 0, "ann": 1, "ben": 2}
    adapters = {name: str(tmp_path / name) for name in names if name}
    right: dict[str, list[int]] = {}
    prompt = tuple(load_tokenizer(EMBEDDED_MODEL).encode("Three prime numbers and the capital of France are"))
    base = AutoModelForCausalLM.from_pretrained(ensure_embedded(EMBEDDED_MODEL), dtype=torch.float32)
    for name, seed in names.items():
        model = wrapped(base, "full", seed=seed, std=0.1) if name else base
        right[name] = reference(model, prompt, 6, eos=[0, 2])
        if name:
            model.save_pretrained(adapters[name])
            model.unload()
    assert len({tuple(said) for said in right.values()}) == len(right), "adapters that show"
    driver = drive(load_model(EMBEDDED_MODEL, config(cpu_linear="auto", adapters=adapters)), max_num_batched_tokens=16)
    for name in names:
        driver.add(replace(request(name, prompt, max_tokens=6), adapter=name))
    driver.run()
    assert {name: driver.tokens(name) for name in names} == right
