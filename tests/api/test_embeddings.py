"""Embeddings through the unmodified openai package: over a tiny model for the numbers, over a script for the rules."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse

from fairserve.config import EngineConfig, FairServeArgs
from fairserve.engine.request import RequestOutput, Usage
from tests.api.conftest import CONTEXT, MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend


@torch.inference_mode()
def vector_of(model: Any, tokens: list[int]) -> list[float]:
    pooled = model.model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
    return (pooled / pooled.norm()).tolist()


TEXTS = ["One text.", "Another, which is quite a bit longer than the first, and than one step."]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
async def test_every_way_to_write_inputs_gives_transformers_own_vectors(
    real_client: openai.AsyncOpenAI, real_engine: Any, real_model: Any, as_ids: bool, encoding: Any
) -> None:
    ids = [real_engine.tokenizer.encode(text) for text in TEXTS]
    inputs: Any = ids if as_ids else TEXTS
    wanted = [vector_of(real_model, tokens) for tokens in ids]
    noise = real_client.completions.create(model=MODEL, prompt="x", max_tokens=40, extra_body={"ignore_eos": True})
    both, one, _ = await asyncio.gather(
        real_client.embeddings.create(model=MODEL, input=inputs, encoding_format=encoding, user="somebody"),
        real_client.embeddings.create(model=MODEL, input=inputs[0], encoding_format=encoding),
        noise,
    )
    for answer, vectors in ((both, wanted), (one, wanted[:1])):
        for data in answer.data:
            if encoding == "base64":
                raw: Any = data.embedding  # who asks for it by name gets it as it is
                data.embedding = list(struct.unpack("<32f", base64.b64decode(raw)))
        CreateEmbeddingResponse.model_validate(answer.model_dump(), strict=True)
        assert [data.index for data in answer.data] == list(range(len(vectors)))
        for data, vector in zip(answer.data, vectors, strict=True):
            assert data.embedding == pytest.approx(vector, abs=1e-4)
            assert sum(x * x for x in data.embedding) == pytest.approx(1, abs=1e-5)
    assert (both.usage.prompt_tokens, both.usage.total_tokens) == (sum(map(len, ids)),) * 2


async def test_an_input_is_charged_like_any_prompt_and_has_no_output(
    real_client: openai.AsyncOpenAI, real_engine: Any
) -> None:
    before = set(real_engine.ledger.is_finished)
    await real_client.embeddings.create(model=MODEL, input=TEXTS)
    new = sorted(real_engine.ledger.is_finished - before)
    ledger = real_engine.ledger
    assert [ledger.num_input[one] for one in new] == [len(real_engine.tokenizer.encode(text)) for text in TEXTS]
    assert [(ledger.num_output[one], ledger.num_cached[one]) for one in new] == [(0, 0)] * 2


def embedding_client(backend: ScriptedBackend, make_service: ServiceMaker, pooling: str) -> Any:
    service = make_service()
    service._models[0].pooling = None if pooling == "off" else pooling
    return http_of(app_of(service), authorization="Bearer alice")


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_the_setting_says_how_it_is_pooled(
    backend: ScriptedBackend, make_service: ServiceMaker, pooling: Any
) -> None:
    backend.script = lambda request: [
        RequestOutput(
            request.request_id,
            "",
            (),
            Usage(request.num_input, 0, 0),
            finish_reason="length",
            embedding=bytes([0, 0, 128, 63]),
        )
    ]
    async with embedding_client(backend, make_service, pooling) as http:
        answer = await http.post("/v1/embeddings", json={"model": MODEL, "input": ["ab", "c"]})
    assert answer.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": [1.0]} for i in range(2)],
        "model": MODEL,
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    assert [(one.pooling, one.sampling.max_tokens, one.client) for one in backend.requests] == [
        (pooling, 0, "alice")
    ] * 2


@pytest.mark.parametrize(
    ("pooling", "body", "said"),
    [
        ("off", {"input": "x"}, "engine.pooling is off"),
        ("mean", {"input": ""}, "input: must hold at least one token"),
        ("mean", {"input": []}, "input: must be a string or token ids"),
        ("mean", {"input": ["a", ""]}, "input: must hold at least one token"),
        ("mean", {"input": [300]}, "input: token ids must be below"),
        ("mean", {"input": ["x"] * 129}, "input: 129 prompts with n = 1 asks for more than 128 sequences"),
        ("mean", {"input": "x" * (CONTEXT + 1)}, f"the prompt has {CONTEXT + 1} tokens"),
        ("mean", {"input": "x", "dimensions": 8}, "dimensions: is not supported yet"),
        ("mean", {"input": "x", "encoding_format": "int8"}, "encoding_format: Input should be 'float' or 'base64'"),
        ("mean", {"input": "x", "n": 2}, "n: unknown field"),
        ("mean", {}, "input: Field required"),
        ("mean", {"input": "x", "model": "other"}, "not served here"),
    ],
)
async def test_what_cannot_be_is_refused_and_reaches_no_engine(
    backend: ScriptedBackend, make_service: ServiceMaker, pooling: str, body: dict[str, Any], said: str
) -> None:
    async with embedding_client(backend, make_service, pooling) as http:
        answer = await http.post("/v1/embeddings", json={"model": MODEL} | body)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert said in error["message"]
    if "input" in said:
        assert error["param"] == "input"
    assert backend.requests == []


def test_off_written_plainly_in_yaml_is_off() -> None:
    assert EngineConfig.model_validate({"pooling": False}).pooling == FairServeArgs().engine.pooling == "off"
