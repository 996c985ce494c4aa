"""The unmodified ``openai`` package over HTTP: blocking, asynchronous, and its helpers."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.api.tool_kit import TOOLS
from tests.clients.conftest import needs_grammar

MODEL = "tiny"
HI: list[Any] = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


def test_a_chat_and_a_completion_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello world", "stop")
    assert answer.system_fingerprint is not None
    assert client.chat.completions.with_raw_response.create(model=MODEL, messages=HI).headers["x-request-id"]
    assert [one.id for one in client.models.list()] == [MODEL]


def test_a_stream_can_be_iterated_and_left_early(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"


def test_the_streaming_helper_tells_each_event_and_the_whole(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HI, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.done") == 1
    assert final.choices[0].message.content == "Hello world"
    assert final.usage is not None


def test_a_loop_of_functions_ends_in_an_answer(client: openai.OpenAI) -> None:
    messages = list(HI)
    results = {"weather": lambda city: f"rain in {city}"}
    for _ in range(5):
        choice = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0]
        messages.append(choice.message)
        if choice.finish_reason != "tool_calls":
            break
        for call in choice.message.tool_calls or []:
            assert call.type == "function"
            result = results[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert (choice.finish_reason, choice.message.content) == ("stop", "It rains in Oslo.")
    assert len(messages) == 4


def test_calls_are_parsed_into_the_callers_models_and_sent_back(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    message = client.chat.completions.parse(model=MODEL, messages=HI, tools=tools).choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Oslo")
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    again = client.chat.completions.parse(model=MODEL, messages=[*HI, message, result], tools=tools)  # type: ignore[list-item]
    assert again.choices[0].message.content == "It rains in Oslo."


async def test_the_asynchronous_helper_parses_calls_as_they_stream(async_client: openai.AsyncOpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    async with async_client.chat.completions.stream(model=MODEL, messages=HI, tools=tools) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [event.parsed_arguments for event in done] == [Weather(city="Oslo")]
    assert final.choices[0].message.content == "Let me look."
    assert final.choices[0].finish_reason == "tool_calls"


async def test_an_asynchronous_stream_and_a_completion_answer(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello world"


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="gpt-4o", messages=HI)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, tool_choice="required")
    assert (caught.value.param, caught.value.code) == ("tool_choice", "invalid_value")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nobody").models.list()


@needs_grammar
def test_a_call_can_be_forced_and_an_answer_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].message.tool_calls
    parsed = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(city="Oslo")
