"""Functions that the model may call, through the unmodified openai package."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fairserve.engine.request import GenerateRequest
from tests.api import tool_kit
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend, byte_tokenizer, output, words
from tests.api.tool_kit import CALL, TIME, TOOLS, WEATHER

ASK: list[Any] = [{"role": "user", "content": "Oslo?"}]
CHAT = "/v1/chat/completions"
GOOD = {"model": MODEL, "messages": ASK, "tools": TOOLS}
ROOM = 5_000


@pytest.fixture
async def http(make_service: ServiceMaker) -> AsyncIterator[httpx.AsyncClient]:
    app = app_of(make_service(tokenizer=byte_tokenizer(tool_kit.HERMES), context=ROOM))
    async with http_of(app, authorization="Bearer alice") as http:
        yield http


@pytest.fixture
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="alice", base_url="http://fairserve/v1", http_client=http, max_retries=0)


def prompt_of(backend: ScriptedBackend) -> str:
    text = byte_tokenizer().decode(backend.requests[-1].prompt_token_ids)
    assert isinstance(text, str)
    return text


async def asked(client: openai.AsyncOpenAI, **more: Any) -> ChatCompletion:
    answer = await client.chat.completions.create(**{"model": MODEL, "messages": ASK, "tools": TOOLS} | more)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    return answer


async def test_a_call_is_told_as_a_call(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = words(CALL)
    choice = (await asked(client)).choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert call.id.startswith("call_")


async def test_text_before_calls_stays_and_two_calls_are_two(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words("I look.\n", CALL, '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    message = (await asked(client)).choices[0].message
    assert message.content == "I look."
    assert [call.function.name for call in message.tool_calls or [] if call.type == "function"] == ["weather", "time"]
    message = (await asked(client, parallel_tool_calls=False)).choices[0].message
    assert len(message.tool_calls or []) == 1


async def test_tools_are_rendered_by_the_template_without_strict(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    strict = {"type": "function", "function": TIME["function"] | {"strict": True}}
    await asked(client, tools=[WEATHER, strict])
    first, second, *_ = prompt_of(backend).splitlines()
    assert json.loads(first.removeprefix("<|tool|>")) == WEATHER
    assert json.loads(second.removeprefix("<|tool|>")) == TIME


async def test_with_tool_choice_none_the_model_hears_of_no_tools_and_calls_none(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words(CALL)
    choice = (await asked(client, tool_choice="none")).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert "<|tool|>" not in prompt_of(backend)


async def test_a_malformed_call_is_text(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = words('<tool_call>{"name": "weather", "arguments": {"city": </tool_call>')
    choice = (await asked(client)).choices[0]
    assert choice.message.content == '<tool_call>{"name": "weather", "arguments": {"city": </tool_call>'
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


async def test_calls_that_are_cut_by_the_limit_keep_its_finish_reason(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words(CALL, "<tool_c", finish="length")
    choice = (await asked(client)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("length", "<tool_c")
    assert len(choice.message.tool_calls or []) == 1


async def test_a_loop_of_calls_and_results_comes_back_to_the_model(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words(CALL)
    message = (await asked(client)).choices[0].message
    assert message.tool_calls is not None
    call_id = message.tool_calls[0].id
    backend.script = words("It rains.")
    again: list[Any] = [*ASK, message, {"role": "tool", "tool_call_id": call_id, "content": "rain"}]
    answer = await asked(client, messages=again)
    assert answer.choices[0].message.content == "It rains."
    turns = prompt_of(backend).split("<|user|>")[1]
    assert turns == f"Oslo?\n<|assistant|>{CALL}\n<|tool|>rain[{call_id}]\n<|assistant|>"


async def test_arguments_of_a_former_call_that_are_no_json_are_shown_as_they_are(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"a": '}}
    turns: list[Any] = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    await asked(client, messages=[*turns, {"role": "tool", "tool_call_id": "1", "content": "?"}])
    assert '"arguments": "{\\"a\\": "' in prompt_of(backend)


async def test_what_client_packages_add_to_an_answer_and_send_back_is_not_told(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    function = {"name": "time", "arguments": "{}", "parsed_arguments": {"secret": 1}}
    added = {"parsed": {"secret": 2}, "provider_specific_fields": {"secret": 3}}
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]} | added
    messages = [*ASK, turn, {"role": "tool", "tool_call_id": "1", "content": "noon"}]
    assert (await http.post(CHAT, json=GOOD | {"messages": messages})).status_code == 200
    assert "secret" not in prompt_of(backend)
    assert "noon" in prompt_of(backend)


# ------------------------------------------------------------------------------------------------------ streams


async def chunks_of(client: openai.AsyncOpenAI, **more: Any) -> list[ChatCompletionChunk]:
    options: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS} | more
    chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **options)]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    return chunks


async def test_a_stream_gives_text_then_name_and_id_then_pieces_of_arguments(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    text = "I look. " + CALL
    backend.script = one_at_a_time(list(text))
    chunks = await chunks_of(client, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0] * len(calls)
    assert (calls[0].id or "").startswith("call_")
    assert [call.id for call in calls[1:]] == [None] * (len(calls) - 1)
    names = [call.function.name for call in calls if call.function]
    assert names == ["weather"] + [None] * (len(calls) - 1)
    arguments = [call.function.arguments or "" for call in calls if call.function]
    assert json.loads("".join(arguments)) == {"city": "Oslo"}
    assert len(arguments) > 5
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage is not None


def one_at_a_time(texts: list[str]) -> Any:
    """Every text has been sent on before the next one is made."""

    def open_later(pause: asyncio.Event, rounds: int = 30) -> None:
        if rounds:
            asyncio.get_running_loop().call_soon(open_later, pause, rounds - 1)
        else:
            pause.set()

    def script(request: GenerateRequest) -> Iterator[Any]:
        for i, text in enumerate(texts):
            yield output(request, text, i + 1, finish="stop" if i == len(texts) - 1 else None)
            pause = asyncio.Event()
            open_later(pause)
            yield pause

    return script


async def test_every_choice_of_a_stream_has_its_own_calls(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda request: words(CALL if request.request_id.endswith("-1") else "no")(request)
    choices = [choice for chunk in await chunks_of(client, n=2) for choice in chunk.choices]
    assert {choice.index for choice in choices if choice.delta.tool_calls} == {1}
    assert {choice.index: choice.finish_reason for choice in choices} == {0: "stop", 1: "tool_calls"}


async def test_the_streaming_helper_puts_calls_together(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = words("I look. ", *CALL)
    async with client.chat.completions.stream(model=MODEL, messages=ASK, tools=TOOLS) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})


# -------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (tool_kit.LLAMA, '{"name": "weather", "parameters": {"city": "Oslo"}}'),
        (tool_kit.MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]'),
        (tool_kit.PYTHONIC, "[weather(city='Oslo')]"),
        (tool_kit.QWEN3_CODER, "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"),
    ],
)
async def test_the_template_says_how_calls_are_read(
    make_service: ServiceMaker, backend: ScriptedBackend, template: str, said: str
) -> None:
    backend.script = words(said)
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template), context=ROOM))) as http:
        answer = (await http.post(CHAT, json=GOOD)).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


async def test_a_format_can_be_forced(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    backend.script = words('{"name": "time", "parameters": {}}')
    service = make_service(tokenizer=byte_tokenizer(tool_kit.HERMES), context=ROOM, tool_format="llama3_json")
    async with http_of(app_of(service)) as http:
        answer = (await http.post(CHAT, json=GOOD)).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "time"


async def test_a_marker_that_is_a_special_token_stays_in_the_text(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    tokenizer = byte_tokenizer(tool_kit.MISTRAL)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]"]})
    async with http_of(app_of(make_service(tokenizer=tokenizer, context=ROOM))) as http:
        for more in ({}, {"tool_choice": "none"}):
            assert (await http.post(CHAT, json=GOOD | more)).status_code == 200
    assert [request.sampling.skip_special_tokens for request in backend.requests] == [False, True]


# --------------------------------------------------------------------------------------------------- bad requests


async def refused(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(CHAT, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert isinstance(error, dict)
    return error


async def test_a_template_without_tools_refuses_them(make_service: ServiceMaker) -> None:
    for template in (tool_kit.TURNS, "{{ messages }} <tool_call>"):
        async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template), context=ROOM))) as http:
            error = await refused(http, GOOD)
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        assert "chat template" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME | {"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [TIME, WEATHER, TIME]}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "time"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [{"id": "1", "function": TIME["function"]}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
    ids=str,
)
async def test_what_is_wrong_about_tools_is_named(http: httpx.AsyncClient, change: dict[str, Any], param: str) -> None:
    assert (await refused(http, GOOD | change))["param"] == param


async def test_what_replaced_functions_is_named(http: httpx.AsyncClient) -> None:
    assert "'tools' instead" in (await refused(http, GOOD | {"functions": [{"name": "f"}]}))["message"]


async def test_a_template_that_fails_on_a_tool_is_the_callers_error(make_service: ServiceMaker) -> None:
    template = "{% for t in tools or [] %}{{ t.function.parameters.required + 1 }}{% endfor %}<tool_call>"
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template), context=ROOM))) as http:
        error = await refused(http, GOOD)
    assert (error["code"], error["param"]) == ("chat_template", "messages")
    assert "TypeError" in error["message"]


FORCED = ["required", {"type": "function", "function": {"name": "time"}}]


@pytest.mark.parametrize("choice", FORCED)
async def test_a_forced_call_comes_with_its_grammar(
    http: httpx.AsyncClient, backend: ScriptedBackend, choice: Any
) -> None:
    assert (await http.post(CHAT, json=GOOD | {"tool_choice": choice})).status_code == 200
    grammar: Any = backend.requests[0].sampling.grammar
    assert (grammar.kind, '"time"' in grammar.text) == ("lark", True)


async def test_what_a_call_cannot_be_held_to_is_told(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    either = {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": either}}
    backend.script = words("[f(a=1)]")
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(tool_kit.PYTHONIC), context=ROOM))) as http:
        error = await refused(http, GOOD | {"tools": [tool], "tool_choice": "required"})
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        assert "'oneOf'" in error["message"]
        assert (await http.post(CHAT, json=GOOD | {"tools": [tool]})).status_code == 200


async def test_an_answer_in_json_leaves_room_for_calls(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    form = {"response_format": {"type": "json_object"}}
    assert (await http.post(CHAT, json=GOOD | form)).status_code == 200
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None and "start: answer | call" in grammar.text


async def test_a_form_that_is_no_json_is_told_beside_tools_as_without(http: httpx.AsyncClient) -> None:
    error = await refused(http, GOOD | {"guided_json": '{"type": '})
    assert error["code"] == "invalid_grammar"
    assert "is not JSON" in error["message"]


async def test_an_answer_of_another_form_leaves_no_room_for_calls(http: httpx.AsyncClient) -> None:
    form = {"guided_choice": ["yes", "no"]}
    assert (await refused(http, GOOD | form))["param"] == "tools"
    assert (await http.post(CHAT, json=GOOD | form | {"tool_choice": "none"})).status_code == 200
