"""Items and their events, of a model's words in pieces of any size."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseOutputItem
from pydantic import TypeAdapter

from fairserve.api.responses_output import Event, Items
from fairserve.api.tool_calls import CallParser
from fairserve.api.tool_formats import FORMATS
from fairserve.engine.request import TokenLogprob
from tests.api.test_tool_calls import MARKS
from tests.api.tool_kit import CALL

TEXT = f"I look. {CALL} and then"
SPOKEN = f"{TEXT} é"
WEATHER: Any = {"weather": None}
CALLS = ['<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', '[TOOL_CALLS]g{"x": 2}', " Now.", " x"] * 3
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseOutputItem)


def byte_text(token_id: int) -> tuple[str, list[int] | None]:
    """A token for each byte."""
    return chr(token_id), [token_id]


def scored(text: str) -> list[TokenLogprob]:
    return [TokenLogprob(byte, -0.5) for byte in text.encode()]


def items(*, has_functions: bool = True, is_piecewise: bool = True) -> Items:
    parser = CallParser(FORMATS["hermes"], WEATHER, is_piecewise=is_piecewise)
    return Items("1", byte_text, parser if has_functions else None)


def said(text: str, size: int, **how: Any) -> tuple[list[Event], list[Any]]:
    made = items(**how)
    events = []
    for at in range(0, len(text), size):
        events += made.push(text[at : at + size], scored(text[at : at + size]))
    events += made.finish(False)
    return events, made.so_far()


def gist(told: list[Any]) -> list[Any]:
    return [
        one["arguments"] if one["type"] == "function_call" else (one["content"][0]["text"], bytes_of(one))
        for one in told
    ]


def bytes_of(message: Any) -> bytes:
    return b"".join(bytes(one["bytes"]) for one in message["content"][0]["logprobs"])


@pytest.mark.parametrize("size", [1, 2, 7, 1_000])
@pytest.mark.parametrize("is_piecewise", [True, False])
def test_text_on_both_sides_of_a_call_has_its_own_item_and_its_own_tokens(size: int, is_piecewise: bool) -> None:
    events, told = said(SPOKEN, size, is_piecewise=is_piecewise)
    before, call, after = gist(told)
    assert (before[0], call, after[0]) == ("I look.", '{"city": "Oslo"}', " and then é")
    assert (before[1], after[1].lstrip()) == (b"I look.", "and then é".encode())
    assert [one["id"] for one in told] == ["msg_1_0", "fc_1_1", "msg_1_2"]
    done = [fields["item"] for kind, fields in events if kind == "output_item.done"]
    assert done == told


@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_without_functions_every_token_is_in_the_message_whatever_its_text(size: int) -> None:
    made = items(has_functions=False)
    events = []
    for at in range(0, len(CALL), size):
        events += made.push(CALL[at : at + size], scored("??"))
    made.push("", scored("!"))
    events += made.finish(False)
    (told,) = made.so_far()
    assert told["content"][0]["text"] == CALL
    assert len(told["content"][0]["logprobs"]) == 2 * len(range(0, len(CALL), size)) + 1
    deltas = [fields for kind, fields in events if kind == "output_text.delta"]
    assert all(len(one["logprobs"]) == 2 for one in deltas)


def test_tokens_whose_text_waits_come_with_it() -> None:
    made = items()
    assert made.push("a <too", scored("a <too"))[-1][1]["delta"] == "a"
    ((_, fields),) = made.push("thbrush", scored("thbrush"))
    assert fields["delta"] == " <toothbrush"
    assert bytes(byte for one in fields["logprobs"] for byte in one["bytes"]) == b" <toothbrush"


def test_a_token_that_shows_a_space_which_the_text_has_not_is_one_of_it() -> None:
    parser = CallParser(FORMATS["hermes"], WEATHER)
    made = Items("1", lambda _: (" Hello", None), parser)
    (*_, (_, fields)) = made.push("Hello", [TokenLogprob(1, -0.5)])
    assert [one["token"] for one in fields["logprobs"]] == [" Hello"]
    assert bytes(fields["logprobs"][0]["bytes"]) == b" Hello", "this route's tokens always have bytes"


def test_broken_arguments_end_an_item_that_is_incomplete() -> None:
    _, (call,) = said('<tool_call>{"name": "weather", "arguments": {"city" "Oslo"}}</tool_call>', 5)
    assert (call["status"], call["arguments"]) == ("incomplete", '{"city" "Oslo"}')


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["hermes", "llama3_json", "mistral"]),
    words=st.lists(st.sampled_from([*CALLS, *MARKS, *'{}[],;"\\ \nfgx']), max_size=25),
    is_parallel=st.booleans(),
    is_piecewise=st.booleans(),
)
def test_whatever_a_model_says_is_items_that_are_told_as_they_end(
    name: str, words: list[str], is_parallel: bool, is_piecewise: bool
) -> None:
    functions: Any = {"f": None, "g": None}
    parser = CallParser(FORMATS[name], functions, is_parallel=is_parallel, is_piecewise=is_piecewise)
    made = Items("1", byte_text, parser)
    events = [event for word in words for event in made.push(word, scored(word))] + made.finish(False)
    told = made.so_far()
    assert [fields["item"] for kind, fields in events if kind == "output_item.done"] == told
    assert [fields["output_index"] for kind, fields in events if kind == "output_item.added"] == [*range(len(told))]
    for one in told:
        ITEM.validate_python(one)
        assert one["type"] == "function_call" or bytes_of(one).decode() == one["content"][0]["text"]
