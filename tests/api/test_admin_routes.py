"""Every route of the whole application, as a stranger finds it: whatever leads to the admin API asks for its key."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Mount, Route

from fairserve.api import admin_auth
from fairserve.api.admin import PREFIX
from fairserve.observe import dashboard
from tests.api.admin_kit import ADMIN, House, error_of, keyed

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "FOO")
OPEN_TO_ALL = {"/openapi.json", "/health", "/dashboard", "/dashboard/", "/dashboard/static/{version}/{name}"}
"""Health, our own description, and the dashboard's files: all the same for everybody. Its data come from /admin/v1."""
ASK_FOR_A_KEY = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/responses/{response_id}/input_items",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/models/{name:path}",
}
STRANGERS = (None, "alice-secret", "a guess", ADMIN[:-1], f"{ADMIN}x", ADMIN.upper())


def whole() -> House:
    house = keyed()
    dashboard.install(house.app)
    return house


def routes_of(app: FastAPI, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(where it is mounted, its path) of every route."""
    for route in app.routes:
        if isinstance(route, Mount):
            yield from routes_of(route.app, prefix + route.path)  # type: ignore[arg-type]
        else:
            assert isinstance(route, Route)
            yield prefix, prefix + route.path


def concrete(path: str) -> str:
    """The path with something in place of its parameters."""
    return re.sub(r"\{[^}]*\}", "abcdef", path)


ADMIN_PATHS = sorted({concrete(path) for prefix, path in routes_of(whole().app) if prefix})


def test_every_route_is_one_of_the_admin_api_or_is_known_here() -> None:
    found = list(routes_of(whole().app))
    assert {prefix for prefix, _ in found} == {"", PREFIX}
    assert {path for prefix, path in found if not prefix} == OPEN_TO_ALL | ASK_FOR_A_KEY
    assert len(ADMIN_PATHS) >= 12


def ways_to(path: str) -> list[str]:
    """Other ways to write a path, of which some lead to it."""
    head, tail = path[: len(PREFIX)], path[len(PREFIX) :]
    return [
        path,
        path + "/",
        path + "?limit=1",
        path + "%00",
        head + "/" + tail,
        head.replace("a", "%61") + tail,
        path.replace("/", "%2F"),
        "/." + path,
        "/v1/.." + path,
        "/" + path,
        path.upper(),
        path + ";x=1",
        head + "/%2e%2e" + path,
    ]


@pytest.mark.parametrize("path", [PREFIX, PREFIX + "/", PREFIX + "/nothing", *ADMIN_PATHS])
async def test_no_method_and_no_spelling_of_an_admin_route_gets_past_the_door(path: str) -> None:
    house = whole()
    transport = httpx.ASGITransport(house.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://fairserve") as http:
        for way in ways_to(path):
            if http.base_url.join(way).path.startswith("/v1/"):
                continue  # "//admin/v1/models" is a host and the path of another route
            for method in METHODS:
                answer = await http.request(method, way, json={"client": "bob"})
                # 404 and 405: the spelling leads nowhere. Never 200, and never what an admin would get to see.
                assert answer.status_code in (401, 404, 405), (method, way, answer.text)
                if way.split("?")[0] == path and path != PREFIX:
                    assert answer.status_code == 401, (method, way)
                    assert answer.headers["www-authenticate"] == "Bearer"
    assert not house.counter.calls


@pytest.mark.parametrize("key", STRANGERS)
async def test_no_other_key_opens_any_admin_route(key: str | None) -> None:
    house = whole()
    async with house.http(key) as http:
        for path in ADMIN_PATHS:
            for method in METHODS:
                assert (await http.request(method, path.removeprefix(PREFIX))).status_code == 401
    assert not house.counter.calls


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": ADMIN},
        {"authorization": f"Basic {ADMIN}"},
        {"authorization": f"Bearer\t{ADMIN}"},
        {"authorization": f"Bearer {ADMIN} {ADMIN}"},
        {"authorization": f"Bearer {ADMIN},x"},
        {"x-api-key": ADMIN},
        {"cookie": f"authorization=Bearer {ADMIN}"},
        {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1"},
        {"x-original-url": "/health", "x-rewrite-url": "/health"},
        {"x-http-method-override": "GET"},
    ],
    ids=str,
)
async def test_a_key_anywhere_but_in_one_bearer_header_opens_nothing(headers: dict[str, str]) -> None:
    house = whole()
    async with house.http(None) as http:
        error_of(await http.get("/overview", headers=headers), 401)
        error_of(await http.get(f"/overview?authorization=Bearer%20{ADMIN}&key={ADMIN}", headers=headers), 401)
    assert not house.counter.calls


async def test_two_authorization_headers_open_nothing_even_when_one_is_right() -> None:
    async with whole().http(None) as http:
        twice = [("authorization", f"Bearer {ADMIN}"), ("authorization", "Bearer alice-secret")]
        for headers in (twice, twice[::-1]):
            error_of(await http.get("/overview", headers=headers), 401)


async def test_the_page_of_the_dashboard_holds_no_data_and_asks_the_admin_api_for_them() -> None:
    house = whole()
    transport = httpx.ASGITransport(house.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://fairserve") as http:
        page = await http.get("/dashboard")
    assert page.status_code == 200
    assert not house.counter.calls
    assert not any(name in page.text for name in house.counter.rows if "/" in name)


async def test_a_websocket_is_not_let_in() -> None:
    house, sent = whole(), list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for path in (*ADMIN_PATHS, "/v1/chat/completions", "/dashboard"):
        scope = {"type": "websocket", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b""}
        await house.app(scope | {"subprotocols": [], "root_path": "", "scheme": "ws"}, receive, send)  # type: ignore[arg-type]
    assert {message["type"] for message in sent} == {"websocket.close"}
    assert not house.counter.calls


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    original = hmac.compare_digest

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return original(one, other)

    monkeypatch.setattr(admin_auth.hmac, "compare_digest", compare)
    house = whole()
    assert (await house.get("/overview", "a guess")).status_code == 401
    assert (await house.get("/overview", ADMIN)).status_code == 200
    assert len(compared) == 2
    assert all(len(one) == len(other) == 64 and ADMIN not in (one, other) for one, other in compared), "digests only"
