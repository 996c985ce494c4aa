"""Callers whose replica dies: through the whole HTTP door, over the real backend with scripted replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.cluster.backend import HandleBackend
from fairserve.config import ApiConfig, FairServeArgs
from fairserve.engine.request import GenerateRequest
from tests.api.conftest import CONTEXT, MODEL, app_of, http_of
from tests.api.scripted import byte_tokenizer, events_of
from tests.cluster.dying import STARTED, Replica, died

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Replicas:
    """As many as are asked for. The first that a choice comes to plays ``first``, every other one what is left."""

    def __init__(self, first: list[Any]) -> None:
        self.first = first
        self.sent: list[GenerateRequest] = []

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, request: GenerateRequest, **_: Any) -> Any:
        self.sent.append(request)
        script = self.first if "~" not in request.request_id else [STARTED, *[1] * request.sampling.max_tokens]
        return Replica(script).outputs(request)


def service(replicas: Replicas, **api: Any) -> OpenAIService:
    config = ApiConfig(**api)
    args = FairServeArgs(served_model_name=MODEL, api=config)
    return OpenAIService(
        args,
        [ServedModel(args, HandleBackend(replicas, config), byte_tokenizer(), CONTEXT)],
        environ={},
        unix_time_s=lambda: 1.7e9,
    )


def body(path: str, **values: Any) -> dict[str, Any]:
    prompt = {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": MODEL, "max_tokens": 5, **prompt, **values}


async def ask(replicas: Replicas, path: str, values: dict[str, Any], **api: Any) -> httpx.Response:
    async with http_of(app_of(service(replicas, **api)), authorization="Bearer ann") as http:
        return await http.post(PATHS[path], json=body(path, **values))


def shown(answer: httpx.Response) -> Any:
    """The answer, without what is another one each time."""
    assert answer.status_code == 200, answer.text
    events = events_of(answer.content) if "event-stream" in answer.headers["content-type"] else [answer.json()]
    return [event if event == "[DONE]" else event | {"id": ""} for event in events]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_whole_answer_is_the_same_whether_replicas_died_or_not(path: str, n: int, logprobs: bool) -> None:
    values: dict[str, Any] = {"n": n}
    if logprobs:
        values |= {"logprobs": True, "top_logprobs": 0} if path == "chat" else {"logprobs": 0}
    quiet = await ask(Replicas([5]), path, values)
    replicas = Replicas([STARTED, 1, 1, died()])
    assert shown(await ask(replicas, path, values, retry_on_replica_death=True)) == shown(quiet)
    assert len(replicas.sent) == 2 * n
    usage = quiet.json()["usage"]
    assert usage["completion_tokens"] == 5 * n


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_is_the_same_event_for_event(path: str) -> None:
    values = {"stream": True, "stream_options": {"include_usage": True}}
    pieces: list[Callable[[Any], Any]] = [
        lambda event: [choice.get("delta", choice).get("content", choice.get("text")) for choice in event["choices"]],
        lambda event: [choice["finish_reason"] for choice in event["choices"]],
    ]
    quiet = shown(await ask(Replicas([1, 1, 1, 1, 1]), path, values))
    cut = shown(await ask(Replicas([1, 1, died()]), path, values, retry_on_replica_death=True))
    for piece in pieces:
        joined = ["".join(str(x) for event in one[:-2] for x in piece(event) if x) for one in (quiet, cut)]
        assert joined[0] == joined[1] != ""
    assert quiet[-2:] == cut[-2:], "the usage, and [DONE]"
    assert not any("error" in event for event in cut[:-1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte_a_death_is_503_and_says_when_to_come_back(path: str, stream: bool) -> None:
    answer = await ask(Replicas([STARTED, died()]), path, {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_failed")
    assert int(answer.headers["retry-after"]) >= 1
    assert "Actor" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
async def test_what_had_not_started_is_answered_as_if_nothing_had_happened(stream: bool) -> None:
    replicas = Replicas([died()])
    answer = await ask(replicas, "chat", {"stream": stream})
    assert shown(answer)
    assert len(replicas.sent) == 2
