"""Interaction, call index and application: where a caller may say them, what is refused, and who is believed."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from fairserve.api.identity import Client
from fairserve.api.labels import Labels, labels_of
from fairserve.config import ApiKey
from fairserve.errors import InvalidRequest
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": MODEL, "messages": HI}

BOT = {"client": "acme/bots/bot", "key": "sk-bot-secret", "applications": ["chat", "summary"]}
ONE = {"client": "acme/ops/ann", "key": "sk-ann-secret", "applications": ["chat"]}
PLAIN = {"client": "bob", "key": "sk-bob-secret"}
GATEWAY = {"client": "gateway", "key": "sk-gateway-secret"}
TRUST: dict[str, Any] = {"trusted_client_header": "X-Client-Id", "trusted_gateways": ["gateway"]}

ID, INDEX, APPLICATION = "X-Fairserve-Interaction-Id", "X-Fairserve-Call-Index", "X-Fairserve-Application"


def told(backend: ScriptedBackend) -> set[tuple[str, str, int]]:
    """What the engine heard: application, interaction, call index."""
    return {(request.application, request.interaction, request.call_index) for request in backend.requests}


def read(headers: dict[str, str] | None = None, metadata: dict[str, str] | None = None, **client: Any) -> Labels:
    return labels_of(Headers(headers or {}), metadata or {}, Client("ann", **client))


# ------------------------------------------------------------------------------------------- by the openai package


async def test_metadata_of_the_openai_package_reaches_the_engine(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    metadata = {"interaction_id": "task-7:a.b_c", "call_index": "3", "trace": "anything else is left alone"}
    await client.chat.completions.create(model=MODEL, messages=HI, metadata=metadata)
    assert told(backend) == {("", "task-7:a.b_c", 3)}


async def test_headers_of_the_openai_package_reach_the_engine_also_from_a_stream(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, extra_headers={ID: "task-7", INDEX: "1000000"}
    )
    assert [chunk async for chunk in stream]
    assert told(backend) == {("", "task-7", 1_000_000)}


async def test_the_same_label_may_come_both_ways(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.chat.completions.create(
        model=MODEL, messages=HI, metadata={"interaction_id": "t", "call_index": "2"}, extra_headers={ID: "t"}
    )
    assert told(backend) == {("", "t", 2)}


async def test_all_parts_of_one_request_are_the_same_call(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI, n=3, extra_headers={ID: "t", INDEX: "4"})
    await client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, extra_body={"metadata": {"interaction_id": "t", "call_index": "4"}}
    )
    assert len(backend.requests) == 3 + 4
    assert told(backend) == {("", "t", 4)}


async def test_a_request_without_labels_stands_alone(client: openai.AsyncOpenAI, backend: ScriptedBackend) -> None:
    await client.chat.completions.create(model=MODEL, messages=HI, metadata={})
    assert told(backend) == {("", "", 0)}


async def test_labels_that_differ_are_a_bad_request_that_names_both_places_and_no_value(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=HI, metadata={"interaction_id": "mine"}, extra_headers={ID: "yours"}
        )
    assert (caught.value.code, caught.value.param) == ("conflicting_labels", "metadata.interaction_id")
    assert ID in caught.value.message and "metadata.interaction_id" in caught.value.message
    assert "mine" not in caught.value.message and "yours" not in caught.value.message
    assert backend.requests == []


# ---------------------------------------------------------------------------------------------------- what is refused

WRONG = [
    (ID, "interaction_id", ["", "x" * 129, "two words", "a/b", "ünï", "a,b", "a\n"]),
    (INDEX, "call_index", ["", "-1", "1.5", "one", "1000001", "10000000", "+1", "0x1", "1e3", "٣", "01", "1 "]),
    (APPLICATION, "application", ["", "x" * 65, "two words", "a/b", "a@b"]),
]
CASES = [(header, key, value) for header, key, values in WRONG for value in values]


@pytest.mark.parametrize(("header", "key", "value"), CASES, ids=[f"{key}={value[:9]!r}" for _, key, value in CASES])
def test_a_label_of_the_wrong_form_is_refused_wherever_it_stands_and_not_repeated(
    header: str, key: str, value: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"metadata\.{key} must be (1-|an integer)") as caught:
        read({ID: "t"} if header == INDEX else None, {key: value})
    assert (caught.value.fields["param"], caught.value.fields["code"]) == (f"metadata.{key}", "invalid_label")
    assert len(value) < 2 or value not in str(caught.value)
    raw = [(header.lower().encode(), value.encode("utf-8"))]
    with pytest.raises(InvalidRequest, match=rf"header {header} must be"):
        labels_of(Headers(raw=raw), {}, Client("ann"))


@pytest.mark.parametrize(("value", "number"), [("0", 0), ("9", 9), ("999999", 999_999), ("1000000", 1_000_000)])
def test_a_call_index_is_a_number_from_0_to_a_million(value: str, number: int) -> None:
    assert read({ID: "x" * 128, INDEX: value}) == Labels("", "x" * 128, number)


def test_a_call_index_without_an_interaction_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=rf"send {ID} or metadata\.interaction_id with it"):
        read({INDEX: "0"})


def test_a_header_that_comes_twice_is_refused_even_with_one_value() -> None:
    raw = [(ID.lower().encode(), b"t"), (ID.lower().encode(), b"t")]
    with pytest.raises(InvalidRequest, match="is given 2 times"):
        labels_of(Headers(raw=raw), {}, Client("ann"))


@pytest.mark.parametrize(
    ("metadata", "param", "code", "words"),
    [
        ({"k": 1}, "metadata.k", "invalid_type", "must be a string"),
        ({"call_index": 1}, "metadata.call_index", "invalid_type", "must be a string"),
        ({"k": None}, "metadata.k", "invalid_type", "must be a string"),
        ({"k": "x" * 513}, "metadata.k", "string_above_max_length", "513 characters, at most 512"),
        ({"x" * 65: "v"}, "metadata", "property_name_above_max_length", "65 characters, at most 64"),
        ({str(i): "v" for i in range(17)}, "metadata", "object_above_max_properties", "17 pairs, at most 16"),
        ([["k", "v"]], "metadata", "invalid_type", "must be an object"),
    ],
)
async def test_metadata_beyond_openais_limits_is_refused(
    make_service: ServiceMaker, backend: ScriptedBackend, metadata: Any, param: str, code: str, words: str
) -> None:
    async with http_of(app_of(make_service())) as http:
        answer = await http.post(CHAT, json=GOOD | {"metadata": metadata})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert words in error["message"]
    assert backend.requests == []


async def test_metadata_at_openais_limits_is_fine(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    metadata = {f"{i:064}": "x" * 512 for i in range(16)}
    async with http_of(app_of(make_service())) as http:
        assert (await http.post(CHAT, json=GOOD | {"metadata": metadata})).status_code == 200


# ------------------------------------------------------------------------------------------ whose label is believed


@pytest.mark.parametrize("sent", ["chat", "summary"])
@pytest.mark.parametrize("way", ["header", "metadata"])
async def test_a_registered_application_reaches_the_engine(
    make_service: ServiceMaker, backend: ScriptedBackend, sent: str, way: str
) -> None:
    headers = {APPLICATION: sent} if way == "header" else {}
    body = GOOD | ({"metadata": {"application": sent}} if way == "metadata" else {})
    async with http_of(app_of(make_service(keys=[BOT])), authorization="Bearer sk-bot-secret") as http:
        assert (await http.post(CHAT, json=body, headers=headers)).status_code == 200
    assert told(backend) == {(sent, "", 0)}


async def test_an_application_that_the_key_does_not_register_is_refused_with_those_it_does(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    async with http_of(app_of(make_service(keys=[BOT, ONE])), authorization="Bearer sk-bot-secret") as http:
        answer = await http.post(CHAT, json=GOOD, headers={APPLICATION: "cheap-label"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unknown_application")
    assert "only: chat, summary" in error["message"]
    assert "cheap-label" not in answer.text
    assert backend.requests == []


@pytest.mark.parametrize(("key", "default"), [(ONE, "chat"), (BOT, "chat"), (PLAIN, "")], ids=["one", "two", "none"])
async def test_the_first_registered_application_holds_for_callers_who_send_none(
    make_service: ServiceMaker, backend: ScriptedBackend, key: dict[str, Any], default: str
) -> None:
    async with http_of(app_of(make_service(keys=[key])), authorization=f"Bearer {key['key']}") as http:
        assert (await http.post(CHAT, json=GOOD)).status_code == 200
    assert told(backend) == {(default, "", 0)}


@pytest.mark.parametrize("keys", [[PLAIN], []], ids=["key without applications", "open"])
async def test_without_a_registered_application_the_label_is_ignored_but_not_the_interaction(
    make_service: ServiceMaker, backend: ScriptedBackend, keys: list[dict[str, Any]]
) -> None:
    async with http_of(app_of(make_service(keys=keys)), authorization="Bearer sk-bob-secret") as http:
        answer = await http.post(CHAT, json=GOOD, headers={APPLICATION: "chat", ID: "t"})
    assert answer.status_code == 200
    assert told(backend) == {("", "t", 0)}


@pytest.mark.parametrize(
    ("named", "sent", "application"),
    [
        ("acme/ops/ann", "anything", "anything"),
        ("acme/ops/ann", None, "chat"),
        ("acme/bots/bot", None, "chat"),
        ("new/client", "anything", "anything"),
        ("new/client", None, ""),
        (None, "anything", "anything"),
    ],
)
async def test_a_trusted_gateway_may_name_any_application(
    make_service: ServiceMaker, backend: ScriptedBackend, named: str | None, sent: str | None, application: str
) -> None:
    service = make_service(keys=[BOT, ONE, GATEWAY], **TRUST)
    headers = {"x-client-id": named, APPLICATION: sent}
    async with http_of(app_of(service), authorization="Bearer sk-gateway-secret") as http:
        answer = await http.post(CHAT, json=GOOD, headers={k: v for k, v in headers.items() if v is not None})
    assert answer.status_code == 200
    assert backend.requests[0].client == (named or "gateway")
    assert told(backend) == {(application, "", 0)}


async def test_in_open_mode_a_callers_name_makes_no_gateway(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    async with http_of(app_of(make_service(**TRUST)), authorization="Bearer gateway") as http:
        await http.post(CHAT, json=GOOD, headers={APPLICATION: "chat", "x-client-id": "ann"})
    assert told(backend) == {("", "", 0)}


def test_two_keys_of_one_client_may_register_different_applications_and_a_gateway_knows_both(
    make_service: ServiceMaker,
) -> None:
    other = ONE | {"key": "sk-other-secret", "applications": ["batch"]}
    service = make_service(keys=[ONE, other, GATEWAY], **TRUST)

    def applications(secret: str, **more: str) -> tuple[str, ...]:
        return service.identify(Headers({"authorization": f"Bearer {secret}"} | more)).applications

    assert applications("sk-ann-secret") == ("chat",)
    assert applications("sk-other-secret") == ("batch",)
    assert applications("sk-gateway-secret", **{"x-client-id": "acme/ops/ann"}) == ("chat", "batch")


@pytest.mark.parametrize("names", [["chat", "chat"], [""], ["a b"], ["x" * 65], "chat", ["a/b"]], ids=str)
def test_a_wrong_list_of_applications_is_refused_in_the_settings(names: Any) -> None:
    with pytest.raises(ValidationError, match="applications"):
        ApiKey(client="ann", key="sk-ann-secret", applications=names)
