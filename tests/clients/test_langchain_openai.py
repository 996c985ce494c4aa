"""The unmodified ``langchain-openai`` package: ``ChatOpenAI`` with nothing but another base URL, over both routes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from tests.api.served import API_KEY, Served
from tests.api.tool_kit import TOOLS
from tests.clients.conftest import needs_grammar

langchain_openai = pytest.importorskip("langchain_openai", reason="pip install 'fairserve[clients]'")


class Weather(BaseModel):
    """Today's weather in a city."""

    city: str


@pytest.fixture(params=["chat", "responses"])
def chat(served: Served, request: pytest.FixtureRequest) -> Any:
    return langchain_openai.ChatOpenAI(
        model="tiny",
        base_url=served.url + "/v1",
        api_key=API_KEY,
        timeout=60,
        max_retries=0,
        stream_usage=True,
        use_responses_api=request.param == "responses",
    )


def test_invoke_answers_with_text_and_usage(chat: Any) -> None:
    answer = chat.invoke([("system", "Be brief."), ("human", "hi")])
    assert answer.text == "Hello world"
    ending = {"status": "completed"} if chat.use_responses_api else {"finish_reason": "stop"}
    assert answer.response_metadata.items() >= ending.items()
    assert answer.usage_metadata["output_tokens"] == 2


def test_stream_adds_up_to_the_answer(chat: Any) -> None:
    whole = None
    for chunk in chat.stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.text == "Hello world"
    assert whole.usage_metadata["output_tokens"] == 2


@pytest.mark.asyncio(loop_scope="module")  # the package keeps its asynchronous connections for all its clients
async def test_ainvoke_and_a_batch_answer(chat: Any) -> None:
    assert (await chat.ainvoke("hi")).text == "Hello world"
    assert [one.text for one in await chat.abatch(["hi", "ho"])] == ["Hello world"] * 2


def test_bound_tools_are_called_and_answered(chat: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    bound = chat.bind_tools(TOOLS)
    call = bound.invoke("hi")
    assert [(one["name"], one["args"]) for one in call.tool_calls] == [("weather", {"city": "Oslo"})]
    result = ToolMessage("rain", tool_call_id=call.tool_calls[0]["id"])
    assert bound.invoke([HumanMessage("hi"), call, result]).text == "It rains in Oslo."


def test_calls_of_a_stream_add_up(chat: Any) -> None:
    whole = None
    for chunk in chat.bind_tools(TOOLS).stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.text == "Let me look."
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("weather", {"city": "Oslo"})]


@needs_grammar
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output_is_an_object(chat: Any, method: str) -> None:
    assert chat.with_structured_output(Weather, method=method).invoke("hi in JSON") == Weather(city="Oslo")
