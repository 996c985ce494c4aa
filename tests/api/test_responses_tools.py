"""Functions that the model may call through /v1/responses: whole, as typed events, and with what came of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from tests.api import tool_kit
from tests.api.admin_kit import error_of
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.responses_kit import PATH, TOOLS, answer_of, events_of, kinds_of
from tests.api.scripted import ScriptedBackend, byte_tokenizer, words
from tests.api.tool_kit import CALL, TIME, WEATHER

BODY: dict[str, Any] = {"model": MODEL, "input": "Oslo?", "tools": TOOLS}
TIME_CALL = '\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ROOM = 5_000
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
TEXT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


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


# -------------------------------------------------------------------------------------------------------- answers


async def test_a_call_is_an_item_of_its_own(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = words(CALL)
    answer = answer_of(await http.post(PATH, json=BODY))
    (item,) = answer.output
    assert isinstance(item, ResponseFunctionToolCall)
    assert (item.name, json.loads(item.arguments), item.status) == ("weather", {"city": "Oslo"}, "completed")
    assert (item.id or "").startswith("fc_") and item.call_id.startswith("call_")
    assert (answer.status, answer.output_text) == ("completed", "")


async def test_text_before_calls_is_an_item_before_theirs(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = words("I look.\n", CALL, TIME_CALL)
    for more, kinds in (({}, ["weather", "time"]), ({"parallel_tool_calls": False}, ["weather"])):
        answer = answer_of(await http.post(PATH, json=BODY | more))
        message, *calls = answer.output
        assert (message.type, answer.output_text) == ("message", "I look.")
        assert [call.name for call in calls if call.type == "function_call"] == kinds
        assert len({item.id for item in answer.output}) == len(answer.output)
        assert answer.parallel_tool_calls is (more == {})


async def test_what_was_asked_about_tools_comes_back(http: httpx.AsyncClient) -> None:
    strict = TOOLS[0] | {"strict": True}
    told: list[Any] = ["required", {"type": "function", "name": "time"}]
    for choice in told:
        raw = await http.post(PATH, json=BODY | {"tools": [strict, TOOLS[1]], "tool_choice": choice})
        answer_of(raw)
        assert raw.json()["tool_choice"] == choice
        bare = {"type": "function", "name": "time", "description": None, "parameters": None, "strict": False}
        assert raw.json()["tools"] == [strict, bare]


async def test_the_template_gets_functions_as_a_chat_gives_them(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    answer_of(await http.post(PATH, json=BODY | {"tools": [TOOLS[0], TOOLS[1] | {"strict": True}]}))
    first, second, *_ = prompt_of(backend).splitlines()
    assert json.loads(first.removeprefix("<|tool|>")) == WEATHER
    assert json.loads(second.removeprefix("<|tool|>")) == TIME


async def test_with_tool_choice_none_a_call_is_text(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = words(CALL)
    assert answer_of(await http.post(PATH, json=BODY | {"tool_choice": "none"})).output_text == CALL
    assert "<|tool|>" not in prompt_of(backend)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "time"}])
async def test_a_forced_call_comes_with_its_grammar(
    http: httpx.AsyncClient, backend: ScriptedBackend, choice: Any
) -> None:
    answer_of(await http.post(PATH, json=BODY | {"tool_choice": choice}))
    grammar: Any = backend.requests[0].sampling.grammar
    assert (grammar.kind, '"time"' in grammar.text) == ("lark", True)
    assert ('"weather"' in grammar.text) == (choice == "required")


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_of_allowed_tools_the_model_hears_of_no_others(
    http: httpx.AsyncClient, backend: ScriptedBackend, mode: str
) -> None:
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "time"}]}
    raw = await http.post(PATH, json=BODY | {"tool_choice": choice})
    assert answer_of(raw).tools[1].type == "function"
    assert raw.json()["tool_choice"] == choice
    assert "time" in prompt_of(backend) and "weather" not in prompt_of(backend)
    grammar: Any = backend.requests[0].sampling.grammar
    assert (grammar is not None) == (mode == "required")


async def test_an_answer_in_json_leaves_room_for_calls(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    answer_of(await http.post(PATH, json=BODY | {"text": {"format": {"type": "json_object"}}}))
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None and "start: answer | call" in grammar.text


async def test_an_answer_that_is_cut_behind_a_call_keeps_the_call(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.script = words(CALL, "<tool_c", finish="length")
    answer = answer_of(await http.post(PATH, json=BODY))
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert [(item.type, item.status) for item in answer.output if item.type in ("function_call", "message")] == [
        ("function_call", "completed"),
        ("message", "incomplete"),
    ]


# --------------------------------------------------------------------------------------------------------- events


async def test_a_stream_has_the_events_of_each_item_one_after_the_other(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.script = words("I look. ", *CALL, *TIME_CALL)
    events = events_of(await http.post(PATH, json=BODY | {"stream": True}))
    assert kinds_of(events) == [
        "created",
        "in_progress",
        *TEXT_EVENTS,
        *CALL_EVENTS,
        *CALL_EVENTS,
        "completed",
    ]
    final = events[-1].response
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    for index, item in enumerate(final.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        added, done = mine[0].item, mine[-1].item
        assert added.status == "in_progress" and done == item
        assert item.type != "message" or added.content == [], "its part is added by an event of its own"
        assert {event.item_id for event in mine[1:-1]} == {item.id} == {added.id}
        if item.type == "function_call":
            deltas = [event.delta for event in mine if event.type == "response.function_call_arguments.delta"]
            assert (added.name, added.call_id, added.arguments) == (item.name, item.call_id, "")
            assert "".join(deltas) == item.arguments == mine[-2].arguments
            assert mine[-2].name == item.name, "earlier versions of the package ask for it"
    assert json.loads(final.output[1].arguments) == {"city": "Oslo"}


async def test_arguments_come_as_the_model_says_them(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    from tests.api.test_tools import one_at_a_time

    backend.script = one_at_a_time([*CALL])
    events = events_of(await http.post(PATH, json=BODY | {"stream": True}))
    assert sum(event.type == "response.function_call_arguments.delta" for event in events) > 5


async def test_a_call_that_is_cut_is_incomplete(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = words(*CALL[:60], finish="length")
    events = events_of(await http.post(PATH, json=BODY | {"stream": True}))
    assert kinds_of(events)[2:] == [*CALL_EVENTS, "incomplete"]
    (item,) = events[-1].response.output
    assert (item.status, item.arguments) == ("incomplete", CALL[45:60])


async def test_an_empty_answer_is_a_message_without_text(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = words("")
    events = events_of(await http.post(PATH, json=BODY | {"stream": True}))
    assert kinds_of(events)[2:-1] == [kind for kind in TEXT_EVENTS if not kind.endswith(".delta")]
    assert events[-1].response.output_text == ""


@pytest.mark.parametrize(
    ("template", "said", "id_chars"),
    [
        (tool_kit.LLAMA, '{"name": "weather", "parameters": {"city": "Oslo"}}', 29),
        (tool_kit.MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]', 9),
    ],
)
async def test_the_template_says_how_calls_are_read_and_how_long_their_ids_are(
    make_service: ServiceMaker, backend: ScriptedBackend, template: str, said: str, id_chars: int
) -> None:
    backend.script = words(*said)
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template), context=ROOM))) as http:
        whole = answer_of(await http.post(PATH, json=BODY))
        streamed = events_of(await http.post(PATH, json=BODY | {"stream": True}))[-1].response
    for answer in (whole, streamed):
        (call,) = answer.output
        assert (call.name, call.arguments, len(call.call_id)) == ("weather", '{"city": "Oslo"}', id_chars)


# -------------------------------------------------------------------------------------------------- the whole loop


async def test_calls_and_results_come_back_to_the_model_as_a_chats_turns(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words("I look.", CALL, TIME_CALL)
    first = await client.responses.create(**BODY)
    calls = [item for item in first.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    backend.script = words("It rains.")
    turns: Any = [{"role": "user", "content": "Oslo?"}, *first.output, *results]
    again = await client.responses.create(**BODY | {"input": turns})
    assert again.output_text == "It rains."
    said = prompt_of(backend).split("<|user|>")[1]
    one, two = (call.call_id for call in calls)
    time_call = TIME_CALL.strip()
    assert (
        said == f"Oslo?\n<|assistant|>I look.{CALL}{time_call}\n<|tool|>rain[{one}]\n<|tool|>rain[{two}]\n<|assistant|>"
    )


async def test_calls_are_parsed_into_models_whole_and_streamed_and_sent_back(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words(CALL)
    tools: Any = [openai.pydantic_responses_function_tool(Weather, name="weather")]
    asked: Any = {"model": MODEL, "input": "Oslo?", "tools": tools}
    parsed = await client.responses.parse(**asked)
    async with client.responses.stream(**asked) as stream:
        snapshots = [event async for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed = await stream.get_final_response()
    assert json.loads(snapshots[-1].snapshot) == {"city": "Oslo"}
    for answer in (parsed, streamed):
        (call,) = answer.output
        assert call.type == "function_call" and call.parsed_arguments == Weather(city="Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    backend.script = words("It rains.")
    turns: Any = [{"role": "user", "content": "Oslo?"}, *streamed.output, result]
    assert (await client.responses.parse(**asked | {"input": turns})).output_text == "It rains."
    assert "parsed" not in prompt_of(backend)


# ---------------------------------------------------------------------------------------------------- bad requests

HOSTED: list[dict[str, Any]] = [
    {"type": "web_search"},
    {"type": "web_search_preview"},
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "mcp", "server_label": "x", "server_url": "https://example.org"},
    {"type": "image_generation"},
    {"type": "computer_use_preview"},
    {"type": "local_shell"},
    {"type": "custom", "name": "f"},
]


@pytest.mark.parametrize("tool", HOSTED, ids=lambda tool: tool["type"])
async def test_a_tool_that_would_run_here_is_refused_by_its_type(
    http: httpx.AsyncClient, backend: ScriptedBackend, tool: dict[str, Any]
) -> None:
    error = error_of(await http.post(PATH, json=BODY | {"tools": [TOOLS[0], tool]}), 400)
    assert (error["param"], error["code"]) == ("tools[1].type", "unsupported_value")
    assert repr(tool["type"]) in error["message"] and "'function'" in error["message"]
    assert backend.requests == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [TOOLS[1], TOOLS[0], TOOLS[1]]}, "tools"),
        ({"tools": [TOOLS[1]] * 129}, "tools"),
        ({"tools": {"type": "function"}}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "rm"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice"),
        ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "rm"}]}},
            "tool_choice",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
    ],
    ids=str,
)
async def test_what_is_wrong_about_tools_is_named_as_this_route_has_it(
    http: httpx.AsyncClient, backend: ScriptedBackend, change: dict[str, Any], param: str
) -> None:
    assert error_of(await http.post(PATH, json=BODY | change), 400)["param"] == param
    assert backend.requests == []


async def test_a_template_without_tools_refuses_them(make_service: ServiceMaker) -> None:
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(tool_kit.TURNS), context=ROOM))) as http:
        error = error_of(await http.post(PATH, json=BODY), 400)
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "chat template" in error["message"]
