"""Bodies that never end, headers without measure: every request ends, with an error that says the limit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from fairserve.api.admin_auth import AdminDoor
from fairserve.api.http_errors import MAX_FIELD_BYTES, MAX_FIELDS
from tests.api.admin_kit import error_of, keyed
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
JSON = {"content-type": "application/json"}


async def endless(first: bytes) -> AsyncIterator[bytes]:
    """A caller who begins a body and then keeps the connection open."""
    yield first
    await asyncio.Event().wait()


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_does_not_end_is_408_and_reaches_nobody(
    make_service: ServiceMaker, backend: ScriptedBackend, path: str
) -> None:
    app = app_of(make_service(read_timeout_s=0.01))
    async with http_of(app, authorization="Bearer alice") as http:
        error = error_of(await http.post(path, content=endless(b'{"mod'), headers=JSON), 408)
    assert error["code"] == "body_too_slow"
    assert "0.01 s" in error["message"]
    assert backend.requests == []


async def test_a_change_whose_body_does_not_end_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    house = keyed()
    monkeypatch.setattr(AdminDoor.__init__, "__defaults__", (100_000, 0.01))
    async with house.http() as http:
        answer = await http.patch("/clients/greedy", content=endless(b'{"wei'), headers=JSON)
    assert error_of(answer, 408)["code"] == "body_too_slow"
    assert not house.counter.calls


@pytest.mark.parametrize(
    "more",
    [{f"x-{i}": "y" for i in range(MAX_FIELDS)}, {"x-long": "y" * MAX_FIELD_BYTES}],
    ids=["many", "long"],
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/dashboard", "/admin/v1/overview", "/nothing"])
async def test_too_many_or_too_long_headers_are_431_before_anything_else(
    http: httpx.AsyncClient, path: str, more: dict[str, str]
) -> None:
    error = error_of(await http.get(path, headers=more), 431)
    assert error["code"] == "headers_too_large"
    assert str(MAX_FIELDS) in error["message"] and str(MAX_FIELD_BYTES) in error["message"]
    assert "yyy" not in error["message"]


async def test_headers_within_the_limits_pass(http: httpx.AsyncClient) -> None:
    many = {f"x-{i}": "y" for i in range(MAX_FIELDS - 10)}
    assert (await http.get("/v1/models", headers=many)).status_code == 200
    assert (await http.get("/v1/models", headers={"x-long": "y" * (MAX_FIELD_BYTES - 1000)})).status_code == 200


DEEP = [
    ("a list", "[" * 40_000 + "]" * 40_000),
    ("an object", '{"a":' * 10_000 + "1" + "}" * 10_000),
    ("in a field", '{"fairness.quantum": ' + "[" * 900 + "]" * 900 + "}"),
    ("an endless number", '{"fairness.quantum": ' + "9" * 90_000 + "}"),
    ("a large number", '{"fairness.rpm_limit": ' + "9" * 4_000 + "}"),
    ("not UTF-8", '{"fairness.quantum": "\udcff"}'),
]


@pytest.mark.parametrize("raw", [raw for _, raw in DEEP], ids=[name for name, _ in DEEP])
@pytest.mark.parametrize(("verb", "path"), [("PATCH", "/settings"), ("PATCH", "/clients/greedy"), ("POST", "/keys")])
async def test_a_strange_change_is_the_callers_mistake(verb: str, path: str, raw: str) -> None:
    house = keyed()
    async with house.http() as http:
        answer = await http.request(verb, path, content=raw.encode(errors="surrogateescape"), headers=JSON)
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [[0]] * 100_000},
        {"prompt": ["x"] * 100_000},
        {"prompt": [0] * 600_000},
        {"prompt": "x" * 1_900_000},
        {"prompt": "hi", "stop": ["x"] * 100_000},
        {"prompt": "hi", "stop_token_ids": [1] * 100_000},
        {"prompt": "hi", "metadata": {str(i): "" for i in range(100_000)}},
    ],
    ids=lambda body: str(body)[:40],
)
async def test_a_very_long_list_or_text_is_refused(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    raw = json.dumps({"model": MODEL} | body).encode()
    answer = await http.post("/v1/completions", content=raw, headers=JSON)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.content) < 2_000
