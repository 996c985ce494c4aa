"""Everything a caller can do wrong: a clear 4xx with an OpenAI error body, never a 500, never a hang."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import CONTEXT, MODEL
from tests.api.scripted import ScriptedBackend

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"model": MODEL, "prompt": "hi"}


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() >= {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    return dict(body["error"])


async def refused(http: httpx.AsyncClient, body: Any, path: str = CHAT, status: int = 400) -> dict[str, Any]:
    return error_of(await http.post(path, json=body), status)


async def posted(http: httpx.AsyncClient, content: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    return await http.post(path, content=content, headers={"content-type": "application/json"} | headers)


@pytest.fixture(autouse=True)
def _nothing_reaches_the_backend(backend: ScriptedBackend) -> Any:
    yield
    assert backend.requests == []


WRONG_IN_BOTH: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "10"),
    ("max_tokens", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.5),
    ("n", 0),
    ("n", -3),
    ("n", 1_000_000),
    ("n", 10**100),
    ("n", "2"),
    ("seed", 2**63),
    ("seed", 1.5),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", ["x" * 1000]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["x"]),
    ("stop_token_ids", [1] * 1000),
    ("ignore_eos", "yes"),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("model", 3),
    ("model", ""),
    ("model", None),
    ("metadata", "x"),
    ("user", 5),
    ("logprobs", "yes"),
]


@pytest.mark.parametrize(("path", "good"), [(CHAT, GOOD), (COMPLETIONS, PLAIN)], ids=["chat", "completions"])
@pytest.mark.parametrize(("field", "value"), WRONG_IN_BOTH, ids=[f"{f}={str(v)[:12]}" for f, v in WRONG_IN_BOTH])
async def test_a_wrong_value_is_refused_and_its_field_named(
    http: httpx.AsyncClient, path: str, good: dict[str, Any], field: str, value: Any
) -> None:
    error = await refused(http, good | {field: value}, path)
    assert re.match(rf"{field}($|[.\[])", error["param"])
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


WRONG_IN_CHAT: list[tuple[str, Any, str]] = [
    ("messages", [], "messages"),
    ("messages", None, "messages"),
    ("messages", "hi", "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"content": "x"}], "messages[0].role"),
    ("messages", [{"role": "robot", "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}], "messages[0].content[0].y"),
    ("messages", [{"role": "user", "content": [{"type": {}, "text": "x"}]}], "messages[0].content[0].type"),
    ("messages", [1] * 100_000, "messages[0]"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("logprobs", 2, "logprobs"),
    ("top_logprobs", 5, "top_logprobs"),
    ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
]


@pytest.mark.parametrize(("field", "value", "param"), WRONG_IN_CHAT, ids=[str(w)[:60] for w in WRONG_IN_CHAT])
async def test_a_wrong_chat_is_refused_at_the_right_place(
    http: httpx.AsyncClient, field: str, value: Any, param: str
) -> None:
    assert (await refused(http, GOOD | {field: value}))["param"] == param


@pytest.mark.parametrize(
    "value",
    [None, 5, {}, [], "", [""], ["a", 1], [1, "a"], [-1], [True], [1.5], [[]], [[1], []], [[1], "a"], [[[1]]], [10**6]],
    ids=str,
)
async def test_a_wrong_prompt_is_refused(http: httpx.AsyncClient, value: Any) -> None:
    assert (await refused(http, PLAIN | {"prompt": value}, COMPLETIONS))["param"] == "prompt"


async def test_completions_take_at_most_20_logprobs(http: httpx.AsyncClient) -> None:
    assert (await refused(http, PLAIN | {"logprobs": 21}, COMPLETIONS))["param"] == "logprobs"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "data:..."}}, {"type": "input_audio"}, {"type": "file"}]
)
async def test_a_part_that_is_not_text_is_refused_by_its_type(http: httpx.AsyncClient, part: dict[str, Any]) -> None:
    error = await refused(http, GOOD | {"messages": [{"role": "user", "content": [part]}]})
    assert part["type"] in error["message"]
    assert "only 'text' parts are supported" in error["message"]


@pytest.mark.parametrize(
    ("field", "near"), [("max_token", "max_tokens"), ("temprature", "temperature"), ("stop_sequence", "stop")]
)
async def test_an_unknown_field_is_refused_with_the_nearest_known_name(
    http: httpx.AsyncClient, field: str, near: str
) -> None:
    error = await refused(http, GOOD | {field: 1})
    assert (error["param"], error["code"]) == (field, "unknown_parameter")
    assert near in error["message"]


async def test_an_unknown_field_inside_a_message_is_named_with_its_place(http: httpx.AsyncClient) -> None:
    error = await refused(http, GOOD | {"messages": [{"role": "user", "contnet": "x"}]})
    assert error["param"] == "messages[0].contnet"
    assert "did you mean 'content'?" in error["message"]


async def test_an_endless_field_name_does_not_come_back_whole(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=GOOD | {"x" * 1_000_000: 1})
    error_of(answer)
    assert len(answer.content) < 2_000


UNSUPPORTED: list[tuple[str, Any, Any]] = [
    ("tools", [], [{"type": "function", "function": {"name": "f"}}]),
    ("functions", [], [{"name": "f"}]),
    ("modalities", ["text"], ["text", "audio"]),
    ("store", False, True),
    ("reasoning_effort", None, "high"),
    ("audio", None, {"voice": "alloy"}),
]


@pytest.mark.parametrize(("field", "neutral", "asking"), UNSUPPORTED, ids=[u[0] for u in UNSUPPORTED])
async def test_what_is_not_supported_yet_is_refused_unless_it_asks_for_nothing(
    http: httpx.AsyncClient, backend: ScriptedBackend, field: str, neutral: Any, asking: Any
) -> None:
    error = await refused(http, GOOD | {field: asking})
    code = "unsupported_value" if field == "reasoning_effort" else "unsupported_parameter"
    assert (error["param"], error["code"]) == (field, code)
    assert "not supported" in error["message"]
    assert (await http.post(CHAT, json=GOOD | {field: neutral})).status_code == 200
    backend.requests.clear()
    backend.finished.clear()


@pytest.mark.parametrize(("field", "neutral", "asking"), [("suffix", "", "."), ("best_of", 1, 3)])
async def test_completions_refuse_what_they_cannot_do(
    http: httpx.AsyncClient, backend: ScriptedBackend, field: str, neutral: Any, asking: Any
) -> None:
    error = await refused(http, PLAIN | {field: asking}, COMPLETIONS)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert (await http.post(COMPLETIONS, json=PLAIN | {field: neutral})).status_code == 200
    backend.requests.clear()
    backend.finished.clear()


async def test_two_different_maximums_contradict_each_other(http: httpx.AsyncClient) -> None:
    error = await refused(http, GOOD | {"max_tokens": 5, "max_completion_tokens": 6})
    assert error["param"] == "max_completion_tokens"


async def test_another_model_is_404(http: httpx.AsyncClient) -> None:
    error = await refused(http, GOOD | {"model": "gpt-4"}, status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert MODEL in error["message"]


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens"), [(CONTEXT, None), (CONTEXT + 1, None), (CONTEXT - 5, 6), (1, 10**9), (1, 10**100)]
)
async def test_more_than_the_context_holds_is_refused_with_the_numbers(
    http: httpx.AsyncClient, num_prompt: int, max_tokens: int | None
) -> None:
    body = PLAIN | {"prompt": "x" * num_prompt, "max_tokens": max_tokens}
    error = await refused(http, body, COMPLETIONS)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert str(num_prompt) in error["message"]
    assert str(CONTEXT) in error["message"]


async def test_too_many_sequences_are_refused_before_anything_is_tokenized(http: httpx.AsyncClient) -> None:
    for body in ({"prompt": ["x"] * 129}, {"prompt": ["x"] * 65, "n": 2}):
        error = await refused(http, PLAIN | body, COMPLETIONS)
        assert error["param"] == "n"
        assert "128" in error["message"]


BROKEN: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("cut short", b'{"model": "tiny"'),
    ("two values", json.dumps(GOOD).encode() + b"{}"),
    ("a list", b"[]"),
    ("a string", b'"hi"'),
    ("null", b"null"),
    ("invalid utf-8", b'{"model": "\xff\xfe"}'),
    ("lone surrogate", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("utf-16", json.dumps(GOOD).encode("utf-16")),
    ("NaN temperature", json.dumps(GOOD | {"temperature": float("nan")}).encode()),
    ("Infinity top_p", json.dumps(GOOD | {"top_p": float("inf")}).encode()),
    ("1e999", b'{"temperature": 1e999, ' + json.dumps(GOOD).encode()[1:]),
    ("an endless number", b'{"n": ' + b"9" * 100_000 + b"}"),
    ("deep lists", b'{"messages": ' + b"[" * 100_000),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ("deep in a known field", b'{"model": "tiny", "messages": ' + b"[" * 150 + b"]" * 150 + b"}"),
    ("zeros", b"\x00" * 1000),
]


@pytest.mark.parametrize("raw", [raw for _, raw in BROKEN], ids=[name for name, _ in BROKEN])
async def test_what_is_not_a_json_request_is_refused(http: httpx.AsyncClient, raw: bytes) -> None:
    error_of(await posted(http, raw))


async def test_ten_megabytes_are_refused_by_their_announced_length(http: httpx.AsyncClient) -> None:
    error = error_of(await posted(http, b"x" * 10_000_000), 413)
    assert error["code"] == "body_too_large"
    assert "2000000" in error["message"]


async def test_ten_megabytes_in_chunks_are_refused_before_the_end(http: httpx.AsyncClient) -> None:
    num_sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b"x" * 100_000

    error_of(await posted(http, chunks()), 413)
    assert num_sent <= 22


async def test_a_lying_length_does_not_help(http: httpx.AsyncClient) -> None:
    error_of(await posted(http, b"x" * 3_000_000, **{"content-length": "10"}), 413)
    error_of(await posted(http, b"{}", **{"content-length": "9" * 5_000}), 413)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_body_that_does_not_say_json_is_415(http: httpx.AsyncClient, content_type: str) -> None:
    answer = await posted(http, json.dumps(GOOD).encode(), **{"content-type": content_type})
    assert error_of(answer, 415)["code"] == "wrong_content_type"


async def test_a_compressed_body_is_415(http: httpx.AsyncClient) -> None:
    error_of(await posted(http, b"\x1f\x8b", **{"content-encoding": "gzip"}), 415)


async def test_a_charset_after_the_content_type_is_fine(http: httpx.AsyncClient) -> None:
    answer = await posted(http, b"{}", **{"content-type": "Application/JSON; charset=utf-8"})
    assert error_of(answer)["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/models/", 405, "method_not_allowed"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_a_wrong_route_or_method_is_an_openai_error(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    assert error_of(await http.request(method, path), status)["code"] == code
