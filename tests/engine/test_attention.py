"""Attention: grouping of decodes, windows, and models that must be refused rather than served wrongly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fairserve.engine.attention import LayerCaches
from fairserve.engine.attention_sdpa import SPLIT_TOKENS, SdpaAttention, group_decodes, zeros_on_touch
from fairserve.engine.runner import Runner
from fairserve.engine.sampling import Sampler
from fairserve.engine.sizing import why_not
from fairserve.errors import ConfigError, ModelError
from tests.engine.support import EOS, VOCABULARY, drive, prepare, prompt_of, reference, request, tiny

SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("slot_dim", [0, 1])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5, unique_by=lambda copy: copy[1]))
def test_blocks_are_copied_as_if_all_were_read_before_any_is_written(slot_dim, copies):
    class Caches(LayerCaches):
        pass

    Caches.slot_dim = slot_dim
    cache = Caches(12, 2, torch.float32, torch.device("cpu"))
    before = torch.arange(24.0).view((12, 2) if slot_dim == 0 else (2, 12))
    for layer in range(2):
        cache._keys[layer], cache._values[layer] = before.clone(), before + 100
    Runner(torch.nn.Identity(), cache, 2, torch.device("cpu"), Sampler(), spare_block=6).copy(copies)
    wanted = before.clone().transpose(0, slot_dim)
    for source, block in copies:
        wanted[2 * block : 2 * block + 2] = before.transpose(0, slot_dim)[2 * source : 2 * source + 2]
    for layer in range(2):
        assert torch.equal(cache._keys[layer], wanted.transpose(0, slot_dim))
        assert torch.equal(cache._values[layer], wanted.transpose(0, slot_dim) + 100)


def test_sequences_at_equal_distances_are_one_batch():
    assert group_decodes([0, 100, 200, 300], [20, 30, 25, 20], 400) == [(0, 4, 100)]


def test_a_gap_starts_a_new_batch():
    assert group_decodes([0, 100, 300, 400], [20, 20, 20, 20], 500) == [(0, 2, 100), (2, 2, 100)]


def test_one_long_sequence_does_not_pad_the_others():
    long = 10 * SPLIT_TOKENS
    assert group_decodes([0, 4000, 8000], [10, 12, long], 12000) == [(0, 2, 4000), (2, 1, 0)]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 90)), max_size=12, unique_by=lambda lane: lane[0]),
    st.integers(8, 100),
)
def test_every_sequence_is_in_one_batch_and_no_batch_leaves_the_cache(lanes, stride):
    lanes = sorted((lane, min(length, stride)) for lane, length in lanes)
    starts, lengths = [lane * stride for lane, _ in lanes], [length for _, length in lanes]
    num_slots = max((s + n for s, n in zip(starts, lengths, strict=True)), default=0)
    covered = []
    for first, count, distance in group_decodes(starts, lengths, num_slots):
        covered += range(first, first + count)
        longest = max(lengths[first : first + count])
        for i in range(count):
            assert starts[first] + i * distance == starts[first + i]
            assert starts[first + i] + longest <= num_slots
    assert covered == list(range(len(lanes)))


@pytest.mark.parametrize("num_batched", [5, 64])
@pytest.mark.parametrize("window", [3, 16])
def test_a_sliding_window_hides_what_transformers_hides(window, num_batched):
    model = tiny("mistral", sliding_window=window)
    prompts = {f"r{i}": prompt_of(length, i) for i, length in enumerate((2, 30, 50, 15))}
    wanted = {name: reference(model, prompt, 25) for name, prompt in prompts.items()}
    driver = drive(prepare(model), max_num_batched_tokens=num_batched)
    driver.add(*(request(name, prompt, max_tokens=25) for name, prompt in prompts.items()))
    driver.run()
    assert {name: driver.tokens(name) for name in prompts} == wanted


def test_layers_with_and_without_a_window_live_together():
    changes = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 3}
    model = tiny("qwen2", **changes)
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    wanted = reference(model, prompt_of(40), 20)
    driver = drive(prepare(model), max_num_batched_tokens=16)
    driver.add(request("r", prompt_of(40), max_tokens=20))
    driver.run()
    assert driver.tokens("r") == wanted


def test_a_mixture_of_experts_is_served():
    torch.manual_seed(2)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE, num_key_value_heads=2, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
            num_experts_per_tok=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, eos_token_id=EOS,
        )
    ).eval()  # fmt: skip
    wanted = reference(model, prompt_of(20), 12)
    driver = drive(prepare(model))
    driver.add(request("r", prompt_of(20), max_tokens=12))
    driver.run()
    assert driver.tokens("r") == wanted


def _gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, num_key_value_heads=2, intermediate_size=48, head_dim=8, attn_logit_softcapping=2.0)
    )


def _gpt_oss() -> GptOssForCausalLM:
    return GptOssForCausalLM(
        GptOssConfig(
            **SHAPE, num_key_value_heads=2, intermediate_size=48, head_dim=8, num_local_experts=2,
            num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        pytest.param(_gemma2, "softcap", id="soft caps"),
        pytest.param(_gpt_oss, "s_aux", id="attention sinks"),
        pytest.param(lambda: BloomForCausalLM(BloomConfig(**SHAPE)), "attention", id="alibi"),
        pytest.param(lambda: MambaForCausalLM(MambaConfig(**SHAPE, state_size=4)), "attention", id="recurrent state"),
    ],
)
def test_a_model_that_we_would_compute_wrongly_is_refused(build, reason):
    torch.manual_seed(1)
    with pytest.raises(ModelError, match=reason):
        prepare(build().eval())


def test_a_window_that_attention_does_not_pass_on_is_refused():
    model = tiny("llama")
    model.config.sliding_window = 8
    with pytest.raises(ModelError, match="window"):
        prepare(model)


def test_xformers_without_a_gpu_is_refused_with_the_setting_named(llama):
    with pytest.raises(ConfigError, match=r"engine\.attention"):
        drive(llama, attention="xformers")


def test_another_attention_is_taken_only_when_it_computes_the_same(llama):
    class Whole(SdpaAttention):
        block_size_multiple = 64

    class Wrong(SdpaAttention):
        def attend(self, layer, query, key, value, scale, window):
            return super().attend(layer, query, key, value, 2 * scale, window)

    class Broken(SdpaAttention):
        def begin(self, layout):
            raise NotImplementedError("no kernel for this GPU")

    assert why_not(Whole, llama) is None
    assert "computes something else" in (why_not(Wrong, llama) or "")
    assert "no kernel for this GPU" in (why_not(Broken, llama) or "")


def test_an_untouched_cache_takes_no_memory():
    cache = zeros_on_touch((2, 1 << 20, 64), torch.float32, torch.device("cpu"))  # 512 MiB if it were written
    assert cache.shape == (2, 1 << 20, 64)
    cache[1, -1] = 1.0
    assert cache[:, -3:].sum() == 64


def test_the_cache_and_the_context_shrink_to_what_was_asked(llama):
    limits = drive(llama, kv_cache_tokens=50, block_size=16).engine.limits
    assert limits.kv_capacity_tokens == 48
    assert limits.max_model_len == 48
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        drive(llama, kv_cache_tokens=3)
