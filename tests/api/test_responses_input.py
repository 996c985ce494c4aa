"""Items of an input as turns of a chat: plain code, no service."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from fairserve.api.responses_input import messages_of

ASK: dict[str, Any] = {"role": "user", "content": "Oslo?"}
SAID: dict[str, Any] = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}


def call(number: int, **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"call_{number}", "name": "f", "arguments": "{}"} | more


def result(number: int, output: Any = "rain", **more: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"call_{number}", "output": output} | more


def shape(*items: Any) -> list[Any]:
    """Of each turn its role, and the ids of its calls or of the call that it answers."""
    return [
        (turn["role"], *(one["id"] for one in turn.get("tool_calls", ())), *filter(None, [turn.get("tool_call_id")]))
        for turn in messages_of(list(items))
    ]


def test_text_alone_is_what_the_user_says() -> None:
    assert messages_of("hi") == ({"role": "user", "content": "hi"},)


def test_calls_behind_what_the_assistant_said_are_of_that_turn() -> None:
    turns = [("user",), ("assistant", "call_1", "call_2"), ("tool", "call_1"), ("tool", "call_2")]
    assert shape(ASK, SAID, call(1), call(2), result(1), result(2)) == turns


def test_calls_without_text_are_a_turn_and_so_are_later_ones() -> None:
    turns = [("user",), ("assistant", "call_1"), ("tool", "call_1"), ("assistant", "call_2"), ("tool", "call_2")]
    assert shape(ASK, call(1), result(1), call(2), result(2)) == turns
    assert shape(ASK, call(1), SAID) == [("user",), ("assistant", "call_1"), ("assistant",)]


def test_parts_are_joined_also_of_a_result() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages_of([call(1), result(1, parts)])[1]["content"] == "a\nb"
    assert messages_of([{"role": "developer", "content": parts}]) == ({"role": "developer", "content": "a\nb"},)


def test_what_an_answer_has_beside_its_meaning_may_be_sent_back() -> None:
    part = {"type": "output_text", "text": "x", "annotations": [], "logprobs": [], "parsed": {"a": 1}}
    said = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [part]}
    called = call(1, id="fc_1", status="completed", parsed_arguments={"a": 1}, caller=None, namespace=None, async_=None)
    assert shape(ASK, said | {"phase": None}, called, result(1, id=None, status="completed", name="f")) == [
        ("user",),
        ("assistant", "call_1"),
        ("tool", "call_1"),
    ]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([result(1)], "item 0 answers the call 'call_1', and no function_call before it"),
        ([result(1), call(1)], "answers are not kept here"),
        ([call(1), result(2)], "item 1 answers the call 'call_2'"),
        ([call(1, call_id="")], "item 0 has 0 characters in 'call_id': 1 to 256"),
        ([call(1, name="x" * 257)], "item 0 has 257 characters in 'name'"),
        ([call(1, arguments={})], "item 0 has no string in 'arguments'"),
        ([call(1, call_id=None)], "item 0 has no string in 'call_id'"),
        ([call(1, namespace="n")], "item 0 has an unknown field 'namespace'"),
        ([call(1), result(1, 5)], "item 1 has neither a string nor a list of parts in 'output'"),
        ([call(1), result(1, [{"type": "input_image"}])], "part 0 of item 1 has type 'input_image'"),
        ([ASK | {"content": [{"type": "input_file", "file_id": "f"}]}], "has type 'input_file': only 'input_text'"),
        ([ASK | {"content": [{"type": "input_text", "text": 5}]}], "part 0 of item 0 has no string in 'text'"),
        ([ASK | {"role": "tool"}], "item 0 has role 'tool': allowed are user, assistant, system, developer"),
        ([{"type": "reasoning", "summary": []}], "item 0 has type 'reasoning': supported are message, function_call"),
        ([{"type": "item_reference", "id": "msg_1"}], "so send the item itself"),
        ([{"type": ["message"]}], "item 0 has type ['message']"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(items: list[Any], said: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        messages_of(items)
    assert said in caught.value.message()
