"""/v1/responses through the unmodified ``openai`` package: whole, streamed, refused and broken off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from fairserve.api.responses_schema import NO_STATE
from fairserve.engine.request import GenerateRequest
from fairserve.errors import ClientQueueFull, ReplicaFailed
from tests.api.admin_kit import error_of
from tests.api.conftest import CONTEXT, MODEL, ServiceMaker, app_of, http_of
from tests.api.responses_kit import PATH, answer_of, events_of
from tests.api.scripted import Call, ScriptedBackend, Step, byte_tokenizer, output, settled, words

BODY: dict[str, Any] = {"model": MODEL, "input": "hi"}
HI_TEXT = "<|user|>hi\n<|assistant|>"
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


def prompt_of(request: GenerateRequest, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(request.prompt_token_ids)))


async def after_the_first_word(client: openai.AsyncOpenAI, gate: asyncio.Event, backend: ScriptedBackend) -> list[Any]:
    """The events of a stream whose second word waits at the gate until the first is out."""

    async def opened() -> None:
        await backend.until(lambda: backend.num_taken == 1)
        await settled()
        gate.set()

    opening = asyncio.ensure_future(opened())
    events = [event async for event in await client.responses.create(**BODY, stream=True)]
    await opening
    return events


def strict(answer: Response) -> None:
    """It is what the package's own model says, field by field: the client itself does not check."""
    Response.model_validate(answer.model_dump(), strict=False)


async def test_text_comes_back_with_usage_and_what_was_asked(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words("Hello", " world", cached=8)
    answer = await client.responses.create(
        model=MODEL, input="hi", temperature=0.5, top_p=0.9, max_output_tokens=7, metadata={"a": "b"}, user="u1"
    )
    strict(answer)
    assert answer.output_text == "Hello world"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.id.startswith("resp_") and answer.output[0].id.startswith("msg_")  # type: ignore[union-attr]
    usage = answer.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (len(HI_TEXT), 2, len(HI_TEXT) + 2)
    assert usage.input_tokens_details.cached_tokens == 8
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.9, 7)
    assert (answer.metadata, answer.user) == ({"a": "b"}, "u1")
    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 7)


async def test_instructions_and_messages_become_the_chats_turns(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, tokenizer: Any
) -> None:
    first = await client.responses.create(model=MODEL, input="hi", instructions="Be brief.")
    earlier: Any = [item.model_dump(exclude_none=True) for item in first.output]
    parts: Any = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    turns: Any = [{"role": "user", "content": "hi"}, *earlier, {"role": "user", "type": "message", "content": parts}]
    await client.responses.create(model=MODEL, input=turns)
    assert prompt_of(backend.requests[0], tokenizer) == "<|system|>Be brief.\n" + HI_TEXT
    assert (
        prompt_of(backend.requests[1], tokenizer) == "<|user|>hi\n<|assistant|>Hello world\n<|user|>a\nb\n<|assistant|>"
    )


async def test_left_open_the_output_may_fill_the_context(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.responses.create(model=MODEL, input="hi")
    assert backend.requests[0].sampling.max_tokens == CONTEXT - len(HI_TEXT)


async def test_what_is_cut_off_is_incomplete_and_says_why(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = words("Hello", finish="length")
    answer = await client.responses.create(**BODY)
    strict(answer)
    assert answer.status == answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(("finish", "last"), [("stop", "response.completed"), ("length", "response.incomplete")])
async def test_a_stream_has_every_event_in_order_and_the_last_holds_all(
    client: openai.AsyncOpenAI, backend: ScriptedBackend, finish: Any, last: str
) -> None:
    gate = asyncio.Event()
    backend.script = lambda request: ["Hello", gate, output(request, " world", 2, finish=finish)]
    events = await after_the_first_word(client, gate, backend)
    assert [event.type for event in events] == [*ORDER, last]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        type(event).model_validate(event.model_dump(), strict=False)
    assert [event.delta for event in events if event.type == "response.output_text.delta"] == ["Hello", " world"]
    final: Any = events[-1]
    strict(final.response)
    assert final.response.output_text == "Hello world" == events[6].text  # type: ignore[union-attr]
    assert final.response.usage.output_tokens == 2
    assert events[0].response.status == "in_progress" and events[0].response.id == final.response.id  # type: ignore[union-attr]
    assert events[2].item.id == events[4].item_id == final.response.output[0].id  # type: ignore[union-attr]


async def test_the_packages_stream_helper_collects_the_answer(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(**BODY) as stream:
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_response()
    assert kinds[-1] == "response.completed" and answer.output_text == "Hello world"


async def test_events_are_named_and_nothing_follows_the_last(http: httpx.AsyncClient) -> None:
    answer = await http.post(PATH, json=BODY | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    for block in blocks:
        named, data = block.split("\n")
        assert named.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert blocks[-1].startswith("event: response.completed")


LOGPROBS: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


async def test_log_probabilities_of_an_answer_are_those_of_its_tokens(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answer = answer_of(await http.post(PATH, json=BODY | LOGPROBS))
    assert answer.top_logprobs == 2 and backend.requests[0].sampling.logprobs == 2
    (message,) = answer.output
    (part,) = message.content  # type: ignore[union-attr]
    tokens = part.logprobs or []  # type: ignore[union-attr]
    assert [(one.logprob, [other.logprob for other in one.top_logprobs]) for one in tokens] == [
        (-0.5, [-0.5, -1.5])
    ] * 2
    assert all(bytes(one.bytes).decode() == one.token for one in tokens)
    plain = answer_of(await http.post(PATH, json=BODY | {"include": LOGPROBS["include"]}))
    assert [len(one.top_logprobs) for one in plain.output[0].content[0].logprobs] == [0, 0]  # type: ignore[union-attr]


async def test_log_probabilities_stream_with_their_text_and_the_end_repeats_them(http: httpx.AsyncClient) -> None:
    events = events_of(await http.post(PATH, json=BODY | LOGPROBS | {"stream": True}))
    deltas = [one.logprobs for one in events if one.type == "response.output_text.delta"]
    (done,) = [one.logprobs for one in events if one.type == "response.output_text.done"]
    (whole,) = [content.logprobs for content in events[-1].response.output[0].content]
    flat = [(one.token, one.logprob) for some in deltas for one in some]
    assert len(flat) == 2 and flat == [(one.token, one.logprob) for one in done]
    assert flat == [(one.token, one.logprob) for one in whole]


async def test_what_none_of_our_answers_has_may_be_included(http: httpx.AsyncClient) -> None:
    asked = {"include": ["reasoning.encrypted_content", "file_search_call.results"], "max_tool_calls": 3}
    answer = answer_of(await http.post(PATH, json=BODY | asked))
    assert answer.max_tool_calls == 3
    assert answer.output[0].content[0].logprobs == []  # type: ignore[union-attr]


async def test_labels_and_neutral_values_are_taken_and_come_back(http: httpx.AsyncClient) -> None:
    labels = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}}
    neutral = {
        "background": False,
        "context_management": [],
        "conversation": None,
        "include": [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "prompt": None,
        "prompt_cache_retention": "in_memory",
        "reasoning": {"effort": "medium", "summary": "auto"},
        "service_tier": "auto",
        "stream_options": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
    }
    raw = await http.post(PATH, json=BODY | labels | neutral)
    told = answer_of(raw).model_dump()
    assert {name: told[name] for name in labels} == labels
    assert (told["reasoning"]["effort"], told["service_tier"]) == ("medium", "default")
    assert (told["truncation"], told["background"], told["parallel_tool_calls"]) == ("disabled", False, False)
    assert raw.json()["text"] == neutral["text"]


async def test_effort_reaches_a_template_that_knows_it_and_is_refused_by_name_elsewhere(
    http: httpx.AsyncClient, make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    error = error_of(await http.post(PATH, json=BODY | {"reasoning": {"effort": "high"}}), 400)
    assert error["param"] == "reasoning.effort" and error["message"].startswith("reasoning.effort: not supported")
    template = "{{ reasoning_effort }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    async with http_of(app_of(make_service(tokenizer=tokenizer))) as knowing:
        answer = answer_of(await knowing.post(PATH, json=BODY | {"reasoning": {"effort": "high"}}))
    assert prompt_of(backend.requests[-1], tokenizer) == "high|hi"
    assert answer.reasoning is not None and answer.reasoning.effort == "high"


async def test_a_service_tier_that_the_key_may_ask_for_is_used_and_told(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    keys = [{"client": "ann", "key": "fs-ann-secret", "service_tiers": ["flex"]}]
    service = make_service(keys=keys, service_tiers={"flex": 0.5})
    async with http_of(app_of(service), authorization="Bearer fs-ann-secret") as http:
        for tier, used in (("flex", "flex"), ("priority", "default"), (None, None)):
            assert answer_of(await http.post(PATH, json=BODY | {"service_tier": tier})).service_tier == used
    assert [request.client for request in backend.requests] == ["ann+flex", "ann", "ann"]


async def test_a_schema_of_the_text_is_the_grammar_of_the_output_and_parses(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words('{"city": ', '"Oslo"}')
    answer = await client.responses.parse(**BODY, text_format=Weather)
    assert answer.output_parsed == Weather(city="Oslo")
    grammar: Any = backend.requests[0].sampling.grammar
    assert grammar.kind == "json_schema" and '"city"' in grammar.text
    async with client.responses.stream(**BODY, text_format=Weather) as stream:
        done = [event.parsed async for event in stream if event.type == "response.output_text.done"]
    assert done == [Weather(city="Oslo")]


async def test_nothing_is_stored_and_the_answer_says_so(http: httpx.AsyncClient) -> None:
    for asked in ({}, {"store": True}, {"store": False}, {"store": None}):
        assert (await http.post(PATH, json=BODY | asked)).json()["store"] is False


async def test_vllms_ignore_eos_and_stop_hold_as_in_a_chat(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    assert (await http.post(PATH, json=BODY | {"ignore_eos": True, "stop": None})).status_code == 200
    assert (await http.post(PATH, json=BODY | {"stop": ["x", "y"]})).status_code == 200
    sampled = [(request.sampling.ignore_eos, request.sampling.stop) for request in backend.requests]
    assert sampled == [(True, ()), (False, ("x", "y"))]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", NO_STATE),
    ({"input": []}, "input", "must be a string or a list of messages"),
    ({"input": 5}, "input", "must be a string or a list of messages"),
    ({"input": [5]}, "input", "item 0 is not an object"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input", "message, function_call, function_call_output"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "send the item itself"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input", "item 0 has role 'robot': allowed are user"),
    ({"input": [{"role": "user"}]}, "input", "item 0 has neither a string nor a list of parts"),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input", "unknown field 'colour'"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
        "part 0 of item 0 has type 'input_image'",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 5_000}, "input", "5000 were asked for"),
    ({"stop": ""}, "stop", "must have 1 to"),
    ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
    ({"background": True}, "background", "is not supported yet: leave it out, or send false"),
    ({"truncation": "auto"}, "truncation", 'leave it out, or send "disabled"'),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation in 'input' instead"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "'instructions' and 'input' instead"),
    ({"include": ["everything"]}, "include[0]", "'message.output_text.logprobs'"),
    ({"include": "message.output_text.logprobs"}, "include", "valid list"),
    ({"top_logprobs": 2}, "top_logprobs", "'message.output_text.logprobs' in 'include'"),
    (LOGPROBS | {"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'minimal'"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", 'leave it out, or send "auto"'),
    ({"service_tier": "fast"}, "service_tier", "'priority'"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", 'or send "medium"'),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "text.format.name: must have"),
    ({"max_tokens": 5}, "max_tokens", "did you mean 'max_output_tokens'?"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format"),
    ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
    ({"metadata": {"call_index": "many"}}, "metadata", "call_index"),
]


@pytest.mark.parametrize(
    ("fields", "param", "said"), WRONG, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(WRONG)]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_is_a_400_that_names_the_field_of_this_route(
    http: httpx.AsyncClient, backend: ScriptedBackend, fields: dict[str, Any], param: str, said: str, stream: bool
) -> None:
    error = error_of(await http.post(PATH, json=BODY | {"stream": stream} | fields), 400)
    assert said in error["message"], error
    assert str(error["param"]).startswith(param), error
    assert backend.requests == []


async def test_a_refusal_is_a_429_also_of_a_stream(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda _: [ClientQueueFull("alice", 5, 5, 2.0)]
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.responses.create(**BODY, stream=stream)
        assert caught.value.code == "client_queue_full"


async def test_a_failure_after_the_first_byte_is_the_last_event_and_keeps_the_text(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    gate = asyncio.Event()
    backend.script = lambda _: ["Hello", gate, ReplicaFailed("boom")]
    events = await after_the_first_word(client, gate, backend)
    assert [event.type for event in events] == [*ORDER[:5], "response.failed"]
    failed: Any = events[-1].response  # type: ignore[union-attr]
    strict(failed)
    assert (failed.status, failed.error.code, failed.output_text) == ("failed", "server_error", "Hello")
    assert "boom" not in failed.error.message


async def test_a_failure_before_the_first_byte_has_a_status(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = lambda _: [ReplicaFailed("boom")]
    error_of(await http.post(PATH, json=BODY | {"stream": True}), 503)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_ends_the_generation(app: Any, backend: ScriptedBackend, stream: bool) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        return [output(request, "Hello", 1), asyncio.Event()]

    backend.script = script
    call = Call(app, BODY | {"stream": stream}, PATH)
    await backend.until(lambda: backend.num_taken == 1 or bool(backend.requests))
    await settled()
    call.hang_up()
    await backend.until(lambda: bool(backend.cancelled))
    await asyncio.wait({call.task})


async def test_strangers_are_turned_away_before_the_body_is_read(make_service: Any) -> None:
    app = app_of(make_service(keys=[{"client": "ann", "key": "fs-ann-secret"}]))
    async with http_of(app) as http:
        error_of(await http.post(PATH, content=b"{"), 401)


async def test_limits_and_times_are_in_the_headers_here_too(client: openai.AsyncOpenAI) -> None:
    raw = await client.responses.with_raw_response.create(**BODY)
    assert "total;dur=" in raw.headers["server-timing"]
    assert raw.headers["x-fairserve-charged-tokens"] == str(raw.parse().usage.total_tokens)  # type: ignore[union-attr]


async def test_a_real_model_says_what_it_says_in_a_chat_token_by_token(real_client: openai.AsyncOpenAI) -> None:
    chat = await real_client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    choice = chat.choices[0]
    asked = BODY | LOGPROBS | {"temperature": 0, "max_output_tokens": 12}
    answer = await real_client.responses.create(**asked)
    events = [event async for event in await real_client.responses.create(**asked, stream=True)]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    wanted = [(one.token, pytest.approx(one.logprob, abs=1e-4)) for one in choice.logprobs.content]
    for whole in (answer, events[-1].response):  # type: ignore[union-attr]
        strict(whole)
        part: Any = whole.output[0].content[0]  # type: ignore[union-attr]
        assert part.text == choice.message.content
        assert [(one.token, one.logprob) for one in part.logprobs] == wanted
        assert whole.status == ("incomplete" if choice.finish_reason == "length" else "completed")
