"""What the service does when the cluster cannot, or fails: before the first byte a status, after it an event."""

from __future__ import annotations

import asyncio
import logging
import pickle
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from fairserve.api.app import create_app
from fairserve.errors import (
    BodyTooLarge,
    ClientQueueFull,
    ClusterQueueFull,
    FairServeError,
    InteractionThrottled,
    InvalidRequest,
    ModelFailed,
    PromptTooLong,
    RateLimited,
    Refused,
    ReplicaFailed,
    RequestTimeout,
    Unauthenticated,
    UnknownModel,
    WrongContentType,
)
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import Call, ScriptedBackend, events_of, output, settled, words

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": MODEL, "messages": HI}


@pytest.mark.parametrize(
    ("refusal", "code", "retry_after", "numbers"),
    [
        (ClientQueueFull("alice", 7, 7, 2.1), "client_queue_full", "3", {"num_waiting": 7, "limit": 7}),
        (ClusterQueueFull(100, 100, 0.01), "cluster_queue_full", "1", {"num_waiting": 100, "limit": 100}),
        (RateLimited("alice", 60, 41.0), "rate_limited", "41", {"client": "alice", "limit": 60}),
        (RateLimited("alice", 60, float("inf")), "rate_limited", "3600", {}),
        (RateLimited("alice", 60, float("nan")), "rate_limited", "1", {}),
        (RateLimited("alice", 60, 0.0), "rate_limited", "1", {}),
        (
            InteractionThrottled("alice", "", 61, 50, 7.2),
            "interaction_throttled",
            "8",
            {"client": "alice", "application": "", "num_recent": 61, "limit": 50},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_429_with_the_limit_and_when_to_come_back(
    http: httpx.AsyncClient,
    backend: ScriptedBackend,
    refusal: Refused,
    code: str,
    retry_after: str,
    numbers: dict[str, Any],
    stream: bool,
) -> None:
    backend.script = lambda _: [refusal]
    answer = await http.post(CHAT, json=GOOD | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"]) == (429, retry_after)
    assert (error["type"], error["code"]) == ("rate_limit_error", code)
    assert error["details"].items() >= numbers.items()
    assert error["details"]["retry_after_s"] == int(retry_after)
    assert str(refusal.fields["limit"]) in error["message"]


async def test_a_throttled_interaction_says_why_whose_limit_it_was_and_when_to_come_back(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.script = lambda _: [InteractionThrottled("acme/ann", "chat", 61, 50, 6.5)]
    answer = await http.post(CHAT, json=GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json() == {
        "error": {
            "message": "the cluster is overloaded and starts no new interaction for application 'chat' of client "
            "'acme/ann', which sent 61 requests in the last 60 s, its limit is 50; retry in 6 s",
            "type": "rate_limit_error",
            "param": None,
            "code": "interaction_throttled",
            "details": {
                "client": "acme/ann",
                "application": "chat",
                "num_recent": 61,
                "limit": 50,
                "retry_after_s": 7,
            },
        }
    }


def test_a_client_throttled_as_a_whole_reads_of_no_application() -> None:
    assert "application" not in str(InteractionThrottled("ann", "", 61, 50, 7.0))
    assert "interaction for client 'ann'," in str(InteractionThrottled("ann", "", 61, 50, 7.0))


async def test_the_openai_package_sees_a_rate_limit_error(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    backend.script = lambda _: [ClientQueueFull("alice", 7, 7, 2.0)]
    with pytest.raises(openai.RateLimitError, match="its limit is 7") as caught:
        await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    assert caught.value.response.headers["retry-after"] == "2"


async def test_a_refusal_that_ray_has_wrapped_shows_its_own_words_and_no_traceback(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("generate", "Traceback: /root/secret.py", ClientQueueFull("alice", 7, 7, 2.0))
    backend.script = lambda _: [wrapped.as_instanceof_cause()]
    answer = await http.post(CHAT, json=GOOD)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["message"] == str(ClientQueueFull("alice", 7, 7, 2.0))


async def test_one_refused_choice_refuses_the_request_and_cancels_the_others(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    never = asyncio.Event()
    backend.script = lambda request: [ClusterQueueFull(5, 5, 1.0)] if request.sampling.seed == 2 else [never]
    answer = await http.post(CHAT, json=GOOD | {"n": 4, "seed": 0, "stream": True})
    assert answer.status_code == 429
    assert len(backend.cancelled) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", ["raised", "error", "abort", "no finish reason"])
async def test_a_failed_replica_is_503_and_worth_a_retry_and_tells_no_internals(
    http: httpx.AsyncClient, backend: ScriptedBackend, ending: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Any) -> list[Any]:
        match ending:
            case "raised":
                return [ReplicaFailed("CUDA error at /root/secret.py")]
            case "no finish reason":
                return []
            case _:
                return [output(request, "", 0, finish=ending)]  # type: ignore[arg-type]

    backend.script = script
    answer = await http.post(CHAT, json=GOOD | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "replica_failed")
    assert int(answer.headers["retry-after"]) >= 1
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_model_fails_on_is_500_and_not_worth_a_retry(
    http: httpx.AsyncClient, backend: ScriptedBackend, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = lambda request: [
        replace(output(request, "", 0, finish="error"), error="IndexError at /root/secret.py", error_code="model_error")
    ]
    answer = await http.post(CHAT, json=GOOD | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"], error["param"]) == (
        500,
        "server_error",
        "model_error",
        None,
    )
    assert answer.headers["x-should-retry"] == "false", "the openai package would try three times"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_500_with_an_id_that_the_log_knows_and_nothing_else(
    http: httpx.AsyncClient, backend: ScriptedBackend, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = lambda _: [ZeroDivisionError("at /root/secret.py")]
    answer = await http.post(CHAT, json=GOOD | {"stream": stream})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "ZeroDivision" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_every_answer_has_an_id_of_its_own(http: httpx.AsyncClient) -> None:
    answers = [await http.get(path) for path in ("/health", "/v1/models", "/nothing", "/nothing")]
    answers.append(await http.post(CHAT, json=GOOD, headers={"x-request-id": "chosen-by-the-caller"}))
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 5
    assert all(len(one) == len("req_") + 32 for one in ids)


@pytest.mark.parametrize("given", ["5b1c2f0e-served-by-ray", "", "short", "with space and more", "x" * 200])
async def test_behind_a_server_that_makes_ids_its_id_is_used_and_not_sent_twice(
    make_service: ServiceMaker, backend: ScriptedBackend, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service()
    backend.script = lambda _: [ZeroDivisionError()]
    async with http_of(create_app(lambda: service, id_from_server=True)) as http:
        answer = await http.post(CHAT, json=GOOD, headers={"x-request-id": given})
    assert "x-request-id" not in answer.headers
    shown = given if given == "5b1c2f0e-served-by-ray" else "req_"
    assert f"(request {shown}" in answer.json()["error"]["message"]
    assert f"request {shown}" in caplog.text


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ReplicaFailed("gone"), "replica_failed"),
        (ModelFailed("secret"), "model_error"),
        (ClientQueueFull("alice", 1, 1, 1.0), "client_queue_full"),
        (KeyError("secret"), "internal_error"),
    ],
)
async def test_an_error_after_the_first_byte_is_an_event_and_then_done(
    http: httpx.AsyncClient, backend: ScriptedBackend, failure: Exception, code: str
) -> None:
    # The pause lets the first word out: what fails before anything was sent gets a status of its own.
    gate = asyncio.Event()
    backend.script = lambda _: ["He", gate, "llo", failure]
    opener = asyncio.ensure_future(_open(gate, backend))
    answer = await http.post(CHAT, json=GOOD | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200
    *before, error, done = events_of(answer.content)
    assert "".join(event["choices"][0]["delta"]["content"] for event in before) == "Hello"
    assert (error["error"]["code"], done) == (code, "[DONE]")
    assert "secret" not in answer.text
    await opener


async def _open(gate: asyncio.Event, backend: ScriptedBackend) -> None:
    """Open the gate when the first word is out."""
    await backend.until(lambda: backend.num_taken > 0)
    await settled()
    gate.set()


async def test_the_openai_package_raises_on_an_error_event(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    gate = asyncio.Event()
    backend.script = lambda _: ["He", gate, ReplicaFailed("gone")]
    opener = asyncio.ensure_future(_open(gate, backend))
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    chunks = aiter(stream)
    assert (await anext(chunks)).choices[0].delta.content == "He"
    with pytest.raises(openai.APIError, match="failed: try again"):
        await anext(chunks)
    await opener


class ManualTimeouts:
    """Time-outs that expire when the test says so."""

    def __init__(self) -> None:
        self.made: list[tuple[float, asyncio.Timeout]] = []

    def __call__(self, delay_s: float) -> asyncio.Timeout:
        self.made.append((delay_s, asyncio.timeout(None)))
        return self.made[-1][1]

    def expire(self) -> None:
        self.made[-1][1].reschedule(0.0)


@pytest.fixture
def timeouts() -> ManualTimeouts:
    return ManualTimeouts()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_504_and_cancelled(
    make_service: ServiceMaker, backend: ScriptedBackend, timeouts: ManualTimeouts, stream: bool
) -> None:
    backend.script = lambda _: [asyncio.Event()]
    app = app_of(make_service(timeout=timeouts, request_timeout_s=12.0))
    async with http_of(app) as http:
        waiting = asyncio.ensure_future(http.post(CHAT, json=GOOD | {"stream": stream, "n": 3}))
        await backend.until(lambda: len(backend.requests) == 3)
        timeouts.expire()
        answer = await waiting
    assert [delay_s for delay_s, _ in timeouts.made] == [12.0]
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"
    assert "12 s" in answer.json()["error"]["message"]
    assert len(backend.cancelled) == 3


async def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    make_service: ServiceMaker, backend: ScriptedBackend, timeouts: ManualTimeouts
) -> None:
    backend.script = lambda _: ["He", asyncio.Event()]
    call = Call(app_of(make_service(timeout=timeouts)), GOOD | {"stream": True})
    assert await call.status() == 200
    (first,) = await call.events()
    assert first["choices"][0]["delta"]["content"] == "He"
    timeouts.expire()
    error, done = await call.events()
    assert (error["error"]["code"], done) == ("request_timeout", "[DONE]")
    assert len(backend.cancelled) == 1
    await call.task


async def test_a_time_out_inside_the_backend_is_not_taken_for_the_callers(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.script = lambda _: [TimeoutError()]
    assert (await http.post(CHAT, json=GOOD)).status_code == 500


async def test_a_stream_sends_each_word_when_it_comes_not_at_the_end(app: Any, backend: ScriptedBackend) -> None:
    gate = asyncio.Event()
    backend.script = lambda request: ["one", gate, *words("two")(request)]
    call = Call(app, GOOD | {"stream": True})
    assert await call.status() == 200
    (first,) = await call.events()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "one"}
    assert call.sent.empty()
    gate.set()
    (second,) = await call.events()
    assert (second["choices"][0]["delta"], second["choices"][0]["finish_reason"]) == ({"content": "two"}, "stop")
    assert await call.events() == ["[DONE]"]
    await call.task


async def test_no_header_is_sent_before_the_first_output(app: Any, backend: ScriptedBackend) -> None:
    gate = asyncio.Event()
    backend.script = lambda request: [gate, *words("x")(request)]
    call = Call(app, GOOD | {"stream": True})
    await backend.until(lambda: len(backend.requests) == 1)
    await settled()
    assert call.sent.empty()
    gate.set()
    assert await call.status() == 200
    await call.task


async def test_a_stream_tells_proxies_not_to_buffer_it(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=GOOD | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-length" not in answer.headers


async def test_an_ordinary_request_logs_nothing_worse_than_debug(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fairserve"):
        await http.post(CHAT, json=GOOD)
    assert not [record for record in caplog.records if record.name.startswith("fairserve")]


@pytest.mark.parametrize(
    "error",
    [
        PromptTooLong(9001, 1, 8192),
        UnknownModel("a", "b"),
        Unauthenticated("who?"),
        InvalidRequest("no", param="n", code="c"),
        BodyTooLarge(5),
        WrongContentType("x"),
        RequestTimeout(3.0),
        ReplicaFailed("gone"),
        ModelFailed("NaN"),
        ClientQueueFull("alice", 1, 1, 1.0),
        InteractionThrottled("alice", "chat", 61, 50, 7.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_says_the_same_after_crossing_a_process(error: FairServeError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.fields, vars(copy)) == (type(error), str(error), error.fields, vars(error))
