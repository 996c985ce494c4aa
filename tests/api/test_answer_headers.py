"""What the headers of an answer say, whole, streamed or refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from fairserve.api.answer_headers import AnswerHeaders, duration
from fairserve.clock import VirtualClock
from fairserve.dispatch.messages import Standing
from fairserve.engine.request import GenerateRequest
from fairserve.errors import BudgetSpent, ClientRateLimited
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import Script, ScriptedBackend, output

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def granted(standing: Standing) -> Script:
    """The first of two outputs says what the counter actor said with the grant."""

    def script(request: GenerateRequest) -> list[Any]:
        first = replace(output(request, "Hello", 1), waited_s=0.25, standing=standing)
        return [first, output(request, " world", 2, finish="stop")]

    return script


STANDING = Standing(lead=-12.5, max_requests=20, requests_left=17, requests_reset_s=1.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "1ms"),
        (0.25, "250ms"),
        (1.5, "1.5s"),
        (59.9996, "60s"),
        (360, "6m0s"),
        (7384.2, "2h3m4s"),
        (math.inf, "744h0m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_times_of_an_answer_count_from_its_beginning_and_to_the_first_token() -> None:
    clock = VirtualClock(100.0)
    headers = AnswerHeaders(clock)
    request = GenerateRequest("r", "ann", (1, 2, 3))
    clock.advance(0.25)
    headers.saw({0: output(request, "", 0)})
    clock.advance(0.25)
    headers.saw({0: output(request, "a", 1)})
    clock.advance(1.0)
    assert headers.first({0: output(request, "a", 1)}) == {"server-timing": "ttft;dur=500.0"}
    whole = headers.whole({0: replace(output(request, "ab", 2), waited_s=0.125)})
    assert whole["server-timing"] == "queue;dur=125.0, ttft;dur=500.0, total;dur=1500.0"


async def test_a_whole_answer_says_all_it_knows(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = granted(STANDING)
    answer = await http.post("/v1/chat/completions", json=CHAT | {"n": 2})
    headers, usage = answer.headers, answer.json()["usage"]
    assert headers["x-fairserve-queue-ms"] == "250.0"
    assert headers["x-fairserve-counter-position"] == "-12.5"
    assert headers["x-fairserve-charged-tokens"] == str(2 * usage["prompt_tokens"] + usage["completion_tokens"])
    assert (
        headers["server-timing"].startswith("queue;dur=250.0, ttft;dur=") and "total;dur=" in headers["server-timing"]
    )
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("20", "17")
    assert headers["x-ratelimit-reset-requests"] == "1.5s"
    assert headers["x-request-id"]


async def test_a_stream_says_with_its_first_byte_what_is_known_by_then_and_the_rest_with_its_usage(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = granted(STANDING)
    raw = await client.chat.completions.with_raw_response.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    assert raw.headers["x-fairserve-queue-ms"] == "250.0"
    assert raw.headers["server-timing"].startswith("queue;dur=250.0, ttft;dur=")
    assert "total" not in raw.headers["server-timing"] and "x-fairserve-charged-tokens" not in raw.headers
    assert raw.headers["x-ratelimit-remaining-requests"] == "17"
    chunks = [chunk async for chunk in raw.parse()]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.model_extra or {})["charged_tokens"] == usage.total_tokens


async def test_without_the_counter_actor_an_answer_claims_no_limits(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit") or "position" in name]
    assert "ttft;dur=" in answer.headers["server-timing"]


async def test_a_refusal_names_the_limit_in_openais_headers(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.script = lambda _: [ClientRateLimited("alice", 5, 12.2)]
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "13"
    told = {name: answer.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")}
    assert told == {"limit": "5", "remaining": "0", "reset": "12.2s"}


async def test_a_key_sends_its_budgets_with_every_request(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    key = {"client": "ann", "key": "fs-ann-secret", "budgets": {"day": {"soft": 5, "hard": 9}, "month": {"hard": 99}}}
    async with http_of(app_of(make_service(keys=[key])), authorization="Bearer fs-ann-secret") as http:
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert backend.requests[0].budgets == (("day", 5, 9), ("month", None, 99))


async def test_the_nearest_budget_and_a_soft_one_that_is_passed_are_told(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.script = granted(STANDING._replace(max_tokens=900, tokens_left=80, tokens_reset_s=3600, budget="day ann"))
    headers = (await http.post("/v1/chat/completions", json=CHAT)).headers
    told = {name: headers[f"x-ratelimit-{name}-tokens"] for name in ("limit", "remaining", "reset")}
    assert told == {"limit": "900", "remaining": "80", "reset": "1h0m0s"}
    assert headers["x-fairserve-token-budget"] == "day ann" and "x-fairserve-soft-budget-passed" not in headers
    backend.script = granted(STANDING._replace(passed="month acme"))
    headers = (await http.post("/v1/chat/completions", json=CHAT)).headers
    assert headers["x-fairserve-soft-budget-passed"] == "month acme" and "x-ratelimit-limit-tokens" not in headers


@pytest.mark.parametrize(("wait_s", "is_final"), [(86_400.0, True), (5.0, False)])
async def test_a_spent_budget_is_openais_insufficient_quota_with_its_numbers(
    http: httpx.AsyncClient, backend: ScriptedBackend, wait_s: float, is_final: bool
) -> None:
    numbers = {"client": "ann", "budget": "day", "of": "acme", "limit": 900, "used": 890, "promised": 4, "asked": 20}
    numbers |= {"resets_at": "2026-11-22T00:00:00Z", "reset_s": 86_400.0, "retry_after_s": wait_s}
    backend.script = lambda _: [BudgetSpent(**numbers)]
    answer = await http.post("/v1/chat/completions", json=CHAT)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert error["details"] == numbers | {"retry_after_s": int(wait_s)}
    assert "2026-11-22T00:00:00Z" in error["message"]
    assert answer.headers["retry-after"] == str(int(wait_s)), "more than an hour, too"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "6"
    assert answer.headers["x-fairserve-token-budget"] == "day acme"
    assert answer.headers.get("x-should-retry") == ("false" if is_final else None)
