"""Whatever JSON comes, parsing answers with a request or with InvalidRequest, and what it accepts is in range."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairserve.api.openai_schema import ChatRequest, CompletionRequest, Sampled, parse
from fairserve.api.responses_schema import OUR_NAMES, ResponsesRequest
from fairserve.errors import InvalidRequest

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KINDS = [ChatRequest, CompletionRequest]
FIELDS = sorted({*ChatRequest.model_fields, *ChatRequest.unsupported, *CompletionRequest.model_fields})
START = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def check(kind: type[Sampled], raw: bytes) -> None:
    body: Any = None
    refusal = ""
    try:
        body = parse(kind, raw)
    except InvalidRequest as error:
        refusal = str(error)
    if body is None:
        assert 0 < len(refusal) < 1_000
        return
    sampling = body.sampling(max_tokens=5, choice=2)
    assert sampling.temperature == 0 or 0.01 <= sampling.temperature <= 2
    assert 0 < sampling.top_p <= 1
    assert all(math.isfinite(x) for x in (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty))
    assert sampling.seed is None or -(2**63) <= sampling.seed < 2**63
    assert body.asked_output is None or body.asked_output > 0 or (body.asked_output == 0 and body.echo)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), VALUES, max_size=4))
def test_any_json_object_is_a_request_or_invalid(kind: type[Sampled], changes: dict[str, Any]) -> None:
    start = START if kind is ChatRequest else {"model": "tiny", "prompt": "hi"}
    check(kind, json.dumps(start | changes).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_request_or_invalid(kind: type[Sampled], raw: bytes) -> None:
    check(kind, raw)


@settings(max_examples=100, deadline=None)
@given(message=st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), VALUES, max_size=4))
def test_any_message_is_a_message_or_invalid(message: dict[str, Any]) -> None:
    check(ChatRequest, json.dumps({"model": "tiny", "messages": [message]}).encode())


CALL_IDS = st.sampled_from(["a", "b"])
PARTS = st.lists(st.builds(lambda text: {"type": "input_text", "text": text}, st.text(max_size=8)), max_size=3)
ITEMS = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "developer"]),
        st.text(max_size=8) | PARTS,
    ),
    st.builds(lambda call_id: {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}, CALL_IDS),
    st.builds(lambda call_id: {"type": "function_call_output", "call_id": call_id, "output": "rain"}, CALL_IDS),
)
WORSE = st.dictionaries(st.sampled_from(["type", "role", "content", "call_id", "name", "output", "id"]), VALUES)
TOOL = {"type": "function", "name": "f"}
TOLD = st.fixed_dictionaries(
    {"input": st.lists(ITEMS, min_size=1, max_size=6) | st.lists(ITEMS | WORSE, max_size=4)},
    optional={
        "tools": st.just([TOOL]) | st.lists(WORSE, max_size=2),
        "tool_choice": st.sampled_from(["none", "auto", TOOL, {"type": "allowed_tools", "tools": [TOOL]}]) | VALUES,
    },
)
OTHERS = st.dictionaries(
    st.sampled_from([*ResponsesRequest.model_fields, *ResponsesRequest.unsupported]), VALUES, max_size=2
)


@settings(max_examples=80, deadline=None)
@given(told=TOLD, others=OTHERS)
def test_any_response_asked_for_is_a_chat_or_invalid_in_its_own_words(
    told: dict[str, Any], others: dict[str, Any]
) -> None:
    raw = json.dumps({"model": "tiny"} | others | told).encode("utf-8", "surrogatepass")
    chat: Any = None
    refusal, param = "", None
    try:
        chat = parse(ResponsesRequest, raw).as_chat()
    except InvalidRequest as error:
        refusal, param = str(error), error.param
    assert isinstance(chat, ChatRequest) or 0 < len(refusal) < 1_000
    assert not refusal.startswith(tuple(OUR_NAMES)) and param not in OUR_NAMES
