"""Ids that nobody can guess or choose, and requests that nobody else can end."""

from __future__ import annotations

import re

import httpx
import pytest
from starlette.routing import Mount

from fairserve.api.app import create_app
from tests.api.admin_kit import keyed
from tests.api.conftest import MODEL, ServiceMaker, http_of
from tests.api.scripted import ScriptedBackend

CHAT = "/v1/chat/completions"
GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "n": 2}
CHOSEN = "the-id-that-i-chose"
HEX = "[0-9a-f]{32}"


@pytest.mark.parametrize("id_from_server", [False, True])
async def test_no_id_inside_is_made_from_what_a_caller_sent(
    make_service: ServiceMaker, backend: ScriptedBackend, id_from_server: bool
) -> None:
    service = make_service()
    sent = {"x-request-id": CHOSEN, "idempotency-key": CHOSEN, "x-client-request-id": CHOSEN}
    ids = []
    async with http_of(create_app(lambda: service, id_from_server=id_from_server)) as http:
        for _ in range(3):
            answer = await http.post(CHAT, json=GOOD | {"metadata": {"request_id": CHOSEN}}, headers=sent)
            ids.append(answer.json()["id"])
    assert all(re.fullmatch(f"chatcmpl-{HEX}", one) for one in ids)
    inside = [request.request_id for request in backend.requests]
    assert inside == [f"{one}-{choice}" for one in ids for choice in range(2)]
    assert len(set(inside)) == 6, "a repeated id of a caller's makes new requests"


async def test_without_a_proxy_the_id_is_ours_whatever_the_caller_sends(http: httpx.AsyncClient) -> None:
    answers = [await http.get("/v1/models", headers={"x-request-id": CHOSEN}) for _ in range(2)]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert ids[0] != ids[1]
    assert all(re.fullmatch(f"req_{HEX}", one) for one in ids)


@pytest.mark.parametrize(
    "given", ["shortid", "a b c d e f", "0123456\r\nevil: 1", "x" * 129, "<script>alert(1)</script>"]
)
async def test_behind_a_proxy_an_id_of_a_strange_form_is_not_taken_over(
    make_service: ServiceMaker, backend: ScriptedBackend, given: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service()
    backend.script = lambda _: [RuntimeError("broken")]
    async with http_of(create_app(lambda: service, id_from_server=True)) as http:
        answer = await http.post(CHAT, json=GOOD, headers={"x-request-id": given.replace("\r\n", " ")})
    assert answer.status_code == 500
    assert re.search(f"request req_{HEX}", answer.json()["error"]["message"])
    assert given not in caplog.text


def test_there_is_no_route_by_which_a_request_could_be_named_and_ended() -> None:
    """A request ends with its own connection. DELETE exists for keys alone, and no path takes a request's id but those
    of responses, which are all answered alike: none is stored."""
    app = keyed().app
    routes = [*app.routes, *(inner for route in app.routes if isinstance(route, Mount) for inner in route.routes)]
    deletes = {route.path for route in routes if "DELETE" in (getattr(route, "methods", None) or ())}
    assert deletes == {"/keys/{id}", "/v1/responses/{response_id}"}
    posts = {route.path for route in routes if "POST" in (getattr(route, "methods", None) or ())}
    served = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize"}
    assert posts == served | {"/keys", "/v1/responses/{response_id}/cancel"}
