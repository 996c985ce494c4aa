"""Chat completions, through the unmodified openai package."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fairserve.engine.request import GenerateRequest, RequestOutput, TokenLogprob, Usage
from tests.api.conftest import CONTEXT, MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import Pause, ScriptedBackend, byte_tokenizer, output, words

HI = [{"role": "user", "content": "hi"}]
HI_TEXT = "<|user|>hi\n<|assistant|>"


async def test_a_chat_answers_with_text_usage_and_a_finish_reason(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    backend.script = words("Hello", " world", cached=8)
    answer = await client.chat.completions.create(model=MODEL, messages=HI)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello world", "stop")
    assert (answer.model, answer.created, answer.id[:9]) == (MODEL, 1_700_000_000, "chatcmpl-")
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(HI_TEXT), 2, len(HI_TEXT) + 2)
    assert usage.prompt_tokens_details.cached_tokens == 8
    (request,) = backend.requests
    assert tokenizer.decode(request.prompt_token_ids) == HI_TEXT
    assert (request.client, request.weight, request.max_waiting) == ("alice", 1.0, None)


async def test_a_chat_without_max_tokens_may_use_what_is_left_of_the_context(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI)
    assert backend.requests[0].sampling.max_tokens == CONTEXT - len(HI_TEXT)


async def test_the_configured_default_of_max_tokens_holds_for_chat(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    async with http_of(app_of(make_service(default_max_tokens=7))) as http:
        await http.post("/v1/chat/completions", json={"model": MODEL, "messages": HI})
    assert backend.requests[0].sampling.max_tokens == 7


async def test_max_completion_tokens_is_another_name_of_max_tokens(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=5)
    assert backend.requests[0].sampling.max_tokens == 5


async def test_every_sampling_parameter_reaches_the_engine(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=HI,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        stop=["a", "b"],
        seed=3,
        user="somebody",
        metadata={"trace": "1"},
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [7, 8],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
        },
    )
    sampling = backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed, sampling.repetition_penalty) == (0.05, 3, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (7, 8))
    assert (sampling.ignore_eos, sampling.include_stop_str_in_output, sampling.logprobs) == (True, True, None)


async def test_null_means_left_out(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=None, temperature=None, stop=None, n=None, seed=None, stream=None
    )
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.stop, sampling.seed) == (1.0, (), None)


async def test_a_single_stop_string_is_a_list_of_one(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI, stop="END")
    assert backend.requests[0].sampling.stop == ("END",)


async def test_a_tiny_temperature_acts_as_a_hundredth_and_zero_stays_greedy(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    for temperature in (1e-40, 0.0):
        await client.chat.completions.create(model=MODEL, messages=HI, temperature=temperature)
    assert [request.sampling.temperature for request in backend.requests] == [0.01, 0.0]


async def test_eight_choices_are_eight_requests_with_their_own_ids_and_seeds(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = lambda request: words(f"choice {request.sampling.seed}")(request)
    answer = await client.chat.completions.create(model=MODEL, messages=HI, n=8, seed=100)
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert [choice.message.content for choice in answer.choices] == [f"choice {100 + i}" for i in range(8)]
    assert len({request.request_id for request in backend.requests}) == 8
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(HI_TEXT), 8)


async def test_a_seed_at_the_end_of_the_range_wraps_instead_of_overflowing(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI, n=2, seed=2**63 - 1)
    assert {request.sampling.seed for request in backend.requests} == {2**63 - 1, -(2**63)}


async def test_text_parts_are_joined_and_every_role_is_rendered(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "go", "name": "bob"},
    ]
    await client.chat.completions.create(model=MODEL, messages=messages)
    text = tokenizer.decode(backend.requests[0].prompt_token_ids)
    assert text == "<|system|>be brief\n<|user|>one\ntwo\n<|assistant|>ok\n<|user|>go\n<|assistant|>"


async def test_a_developer_is_a_system_to_a_template_that_does_not_know_developers(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    await client.chat.completions.create(model=MODEL, messages=[{"role": "developer", "content": "x"}])
    assert tokenizer.decode(backend.requests[0].prompt_token_ids) == "<|system|>x\n<|assistant|>"


async def test_a_template_that_refuses_a_conversation_is_the_callers_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="this template has no tools"):
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "tool", "content": "42", "tool_call_id": "call_1"}]
        )


async def test_a_model_without_a_template_cannot_chat(make_service: ServiceMaker) -> None:
    app = app_of(make_service(tokenizer=byte_tokenizer(chat_template=None)))
    async with http_of(app) as http:
        answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": HI})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"


async def test_a_prompt_too_long_for_the_event_loop_gives_the_same_tokens(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI)
    monkeypatch.setattr("fairserve.api.prompts.INLINE_CHARS", 0)
    await client.chat.completions.create(model=MODEL, messages=HI)
    first, second = backend.requests
    assert first.prompt_token_ids == second.prompt_token_ids


async def test_logprobs_name_tokens_bytes_and_alternatives(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(one.token, one.logprob, one.bytes) for one in content] == [
        (text := tokenizer.decode([token_id]), -0.5, list(text.encode())) for token_id in (41, 42)
    ]
    assert [alternative.logprob for alternative in content[0].top_logprobs] == [-0.5, -1.5]


async def test_logprobs_without_alternatives_ask_for_none(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True)
    assert backend.requests[0].sampling.logprobs == 0
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


async def test_part_of_a_character_and_a_probability_of_zero_survive_json(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    half = tokenizer.encode("€")[0]  # 0xE2, the first of three bytes

    def script(request: GenerateRequest) -> list[Any]:
        logprob = TokenLogprob(half, float("-inf"))
        return [RequestOutput(request.request_id, "€", (half,), Usage(1, 0, 1), (logprob,), "length")]

    backend.script = script
    answer = await client.chat.completions.create(model=MODEL, messages=HI, logprobs=True)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    token = answer.choices[0].logprobs.content[0]
    assert (token.token, token.bytes, token.logprob) == (r"bytes:\xe2", [0xE2], -9999.0)


# ------------------------------------------------------------------------------------------------------ streams


async def chunks_of(client: openai.AsyncOpenAI, **options: Any) -> list[ChatCompletionChunk]:
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True, **options)
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    return chunks


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.delta.content or "" for choice in choices if choice.index == index)


async def test_a_stream_says_the_role_once_and_the_finish_reason_last(client: openai.AsyncOpenAI) -> None:
    chunks = await chunks_of(client)
    assert text_of(chunks) == "Hello world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_include_usage_adds_a_last_chunk_without_choices(client: openai.AsyncOpenAI) -> None:
    chunks = await chunks_of(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(HI_TEXT), 2)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


async def test_continuous_usage_is_in_each_chunk_what_its_choice_took_until_then(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = lambda request: ["a", Pause(), "b", Pause(), "", output(request, "c", 4, finish="stop")]
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chunks_of(client, n=2, seed=0, stream_options=options)
    for index in range(2):
        usages = [chunk.usage for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [one.completion_tokens for one in usages if one is not None] == [1, 2, 4]
        assert {one.prompt_tokens for one in usages if one is not None} == {len(HI_TEXT)}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    quiet: Any = {"continuous_usage_stats": True}
    assert all("usage" not in chunk.model_fields_set for chunk in await chunks_of(client, stream_options=quiet))


async def test_eight_choices_stream_side_by_side(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request: words("c", f"{request.sampling.seed}")(request)
    chunks = await chunks_of(client, n=8, seed=0, stream_options={"include_usage": True})
    assert [text_of(chunks, index) for index in range(8)] == [f"c{i}" for i in range(8)]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(HI_TEXT), 16)


async def test_logprobs_stream_with_their_tokens(client: openai.AsyncOpenAI) -> None:
    chunks = await chunks_of(client, logprobs=True, top_logprobs=1)
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [one for logprob in logprobs if logprob is not None for one in logprob.content or []]
    assert len(tokens) == 2
    assert all(len(one.top_logprobs) == 1 for one in tokens)


async def test_an_output_with_nothing_to_say_makes_no_event(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words("a", "", "", "b")
    chunks = await chunks_of(client)
    assert text_of(chunks) == "ab"
    assert all(choice.delta.content or choice.finish_reason for chunk in chunks for choice in chunk.choices)


async def test_the_stop_string_that_ended_the_text_is_told(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    def script(request: GenerateRequest) -> list[Any]:
        usage = Usage(request.num_input, 0, 1)
        return [RequestOutput(request.request_id, "so ", (1,), usage, finish_reason="stop", stop_reason="END")]

    backend.script = script
    answer = await client.chat.completions.create(model=MODEL, messages=HI, stop="END")
    assert (answer.choices[0].finish_reason, answer.choices[0].model_extra) == ("stop", {"stop_reason": "END"})


async def test_outputs_that_are_ready_together_become_one_event(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = lambda request: (
        [output(request, "x", i + 1) for i in range(99)] + [output(request, "x", 100, finish="length")]
    )
    chunks = await chunks_of(client, stream_options={"include_usage": True})
    assert text_of(chunks) == "x" * 100
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 100
    assert len(chunks) < 10
