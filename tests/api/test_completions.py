"""Completions and models, through the unmodified openai package."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import Completion, Model

from tests.api.conftest import CONTEXT, MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend, words


async def test_a_completion_answers_with_text_and_usage(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    answer = await client.completions.create(model=MODEL, prompt="once")
    Completion.model_validate(answer.model_dump(), strict=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello world", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 2)
    assert backend.requests[0].sampling.max_tokens == 16


async def test_the_default_of_16_tokens_shrinks_to_what_is_left_of_the_context(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    await client.completions.create(model=MODEL, prompt="x" * (CONTEXT - 3))
    assert backend.requests[0].sampling.max_tokens == 3


async def test_a_list_of_prompts_is_answered_prompt_by_prompt(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    backend.script = lambda request: words(f"{tokenizer.decode(request.prompt_token_ids)}{request.sampling.seed}")(
        request
    )
    answer = await client.completions.create(model=MODEL, prompt=["a", "bb"], n=2, seed=5, extra_body={"best_of": 2})
    assert [choice.text for choice in answer.choices] == ["a5", "a6", "bb5", "bb6"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize(("prompt", "expected"), [([5, 6, 7], [(5, 6, 7)]), ([[5], [6, 7]], [(5,), (6, 7)])])
async def test_token_ids_are_taken_as_they_are(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, prompt: Any, expected: Any
) -> None:
    await client.completions.create(model=MODEL, prompt=prompt)
    assert [request.prompt_token_ids for request in backend.requests] == expected


async def test_completion_logprobs_have_offsets_that_go_on_through_a_stream(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    whole = await client.completions.create(model=MODEL, prompt="x", logprobs=2)
    Completion.model_validate(whole.model_dump(), strict=True)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.decode([41]), tokenizer.decode([42])]
    assert (logprobs.text_offset, logprobs.token_logprobs) == ([0, 1], [-0.5, -0.5])
    assert logprobs.top_logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2]
    stream = await client.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True)
    offsets = []
    async for chunk in stream:
        assert chunk.choices[0].logprobs is not None
        offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == [0, 1]


async def test_a_completion_streams_with_usage_at_the_end(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        Completion.model_validate(chunk.model_dump() | {"choices": []}, strict=True)
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == "Hello world"
        assert choices[-1].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 4)


async def test_the_models_are_listed_and_found(client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == [MODEL]
    found = await client.models.retrieve(MODEL)
    Model.model_validate(found.model_dump(), strict=True)
    assert (found.id, found.owned_by, found.model_extra) == (MODEL, "fairserve", {"max_model_len": CONTEXT})
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await client.models.retrieve("gpt-4")


async def test_health_is_200_when_ready_and_says_how_it_is_opened(
    backend: ScriptedBackend, make_service: ServiceMaker
) -> None:
    async with http_of(app_of(make_service())) as http:
        answer = await http.get("/health")
        assert answer.status_code == 200
        body = answer.json()
        assert (body["mode"], body["model"], body["replicas"], body["ready"]) == ("open", MODEL, 2, True)
        assert "anybody may call" in body["warning"]
        for bad in ({"ready": False}, {}, RuntimeError("no cluster")):
            backend.health_body = bad
            assert (await http.get("/health")).status_code == 503


async def test_health_needs_no_key_and_shows_no_warning_when_keyed(make_service: ServiceMaker) -> None:
    service = make_service(keys=[{"client": "alice", "key": "alice-secret"}])
    async with http_of(app_of(service)) as http:
        body = (await http.get("/health")).json()
    assert body["mode"] == "keyed"
    assert "warning" not in body
