"""``client.responses`` of the unmodified ``openai`` package over HTTP: blocking, asynchronous, and its helpers."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.api.responses_kit import TOOLS
from tests.clients.conftest import needs_grammar

MODEL = "tiny"
ASK: dict[str, Any] = {"model": MODEL, "input": "hi"}


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


WEATHER_TOOL: Any = openai.pydantic_responses_function_tool(Weather, name="weather")


def test_a_response_answers_and_a_stream_can_be_left_early(client: openai.OpenAI) -> None:
    answer = client.responses.create(**ASK, instructions="Be brief.")
    assert (answer.output_text, answer.status) == ("Hello world", "completed")
    assert client.responses.with_raw_response.create(**ASK).headers["x-request-id"]
    with client.responses.create(**ASK, stream=True) as stream:
        assert next(iter(stream)).type == "response.created"
    kinds = [event.type for event in client.responses.create(**ASK, stream=True)]
    assert kinds[-1] == "response.completed"


def test_the_streaming_helper_tells_each_event_and_the_whole(client: openai.OpenAI) -> None:
    with client.responses.stream(**ASK) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert texts[-1] == final.output_text == "Hello world"
    assert final.usage is not None and final.usage.output_tokens == 2


def test_a_loop_of_functions_ends_in_an_answer(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "hi"}]
    results = {"weather": lambda city: f"rain in {city}"}
    for _ in range(5):
        answer = client.responses.create(model=MODEL, input=turns, tools=TOOLS)  # type: ignore[arg-type]
        turns += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        for call in calls:
            result = results[call.name](**json.loads(call.arguments))
            turns.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
        if not calls:
            break
    assert answer.output_text == "It rains in Oslo."
    assert [turn["type"] if isinstance(turn, dict) and "type" in turn else "other" for turn in turns].count(
        "function_call_output"
    ) == 1


async def test_the_asynchronous_helper_parses_calls_as_they_stream(async_client: openai.AsyncOpenAI) -> None:
    async with async_client.responses.stream(**ASK, tools=[WEATHER_TOOL]) as stream:
        pieces = [event.delta async for event in stream if event.type == "response.function_call_arguments.delta"]
        final = await stream.get_final_response()
    message, call = final.output
    assert final.output_text == "Let me look." and message.type == "message"
    assert call.type == "function_call" and call.parsed_arguments == Weather(city="Oslo")
    assert "".join(pieces) == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    turns: Any = [{"role": "user", "content": "hi"}, *final.output, result]
    again = await async_client.responses.parse(model=MODEL, input=turns, tools=[WEATHER_TOOL])
    assert again.output_text == "It rains in Oslo."


async def test_an_asynchronous_stream_answers(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.responses.create(**ASK, stream=True)
    deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Hello world"
    assert (await async_client.responses.create(**ASK)).output_text == "Hello world"


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.responses.create(model="gpt-4o", input="hi")
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.retrieve(client.responses.create(**ASK).id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASK, tools=[{"type": "web_search"}])
    assert (caught.value.param, caught.value.code) == ("tools[0].type", "unsupported_value")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nobody").responses.create(**ASK)


@needs_grammar
def test_a_call_can_be_forced_and_an_answer_parsed(client: openai.OpenAI) -> None:
    forced = client.responses.create(**ASK, tools=[WEATHER_TOOL], tool_choice="required")
    assert [item.type for item in forced.output][-1] == "function_call"
    parsed = client.responses.parse(**ASK, text_format=Weather)
    assert parsed.output_parsed == Weather(city="Oslo")
