"""The rest of a chat: how it is rendered, tiers, users, and what says that two answers came about alike."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from fairserve.api.chats import fingerprint_of
from fairserve.api.identity import Client, Identities
from fairserve.config import ApiConfig, ApiKey, FairServeArgs
from fairserve.engine.request import GenerateRequest
from fairserve.errors import ConfigError
from tests.api import tool_kit
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend, byte_tokenizer, events_of

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": MODEL, "messages": HI}
OPEN_END = [*HI, {"role": "assistant", "content": "Once upon"}]


async def prompt_of(http: httpx.AsyncClient, backend: ScriptedBackend, **more: Any) -> str:
    answer = await http.post(CHAT, json=GOOD | more)
    assert answer.status_code == 200, answer.text
    text = byte_tokenizer().decode(backend.requests[-1].prompt_token_ids)
    assert isinstance(text, str)
    return text


async def refused(http: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await http.post(CHAT, json=GOOD | more)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert isinstance(error, dict)
    return error


# ---------------------------------------------------------------------------------------------------- rendering


async def test_the_last_message_is_continued(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for more in ({}, {"add_generation_prompt": False}):
        text = await prompt_of(http, backend, messages=OPEN_END, continue_final_message=True, **more)
        assert text == "<|user|>hi\n<|assistant|>Once upon"


async def test_a_conversation_can_be_rendered_without_the_next_turn(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    assert await prompt_of(http, backend, add_generation_prompt=False) == "<|user|>hi\n"
    assert await prompt_of(http, backend, add_generation_prompt=True) == "<|user|>hi\n<|assistant|>"


async def test_continuing_excludes_a_new_turn_and_needs_an_assistants_text(http: httpx.AsyncClient) -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert (await refused(http, messages=OPEN_END, **both))["param"] == "add_generation_prompt"
    assert (await refused(http, continue_final_message=True))["param"] == "continue_final_message"


async def test_a_template_that_drops_the_last_message_cannot_continue_it(make_service: ServiceMaker) -> None:
    template = "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template)))) as http:
        error = await refused(http, messages=OPEN_END, continue_final_message=True)
    assert error["code"] == "chat_template"


async def test_variables_reach_the_template(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(tool_kit.HERMES)))) as http:
        text = await prompt_of(http, backend, chat_template_kwargs={"mood": "cheerful", "unknown": True})
    assert "<|mood|>cheerful\n" in text


@pytest.mark.parametrize(
    "name", ["chat_template", "tools", "tokenize", "messages", "conversation", "add_generation_prompt"]
)
async def test_a_request_brings_no_template_and_no_option_of_the_renderer(http: httpx.AsyncClient, name: str) -> None:
    error = await refused(http, chat_template_kwargs={name: "{{ 1 }}"})
    assert error["param"] == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("value", [{"a": []}, {"a": {}}, {"a": None}, [], {str(i): 1 for i in range(17)}], ids=str)
async def test_variables_are_few_and_plain(http: httpx.AsyncClient, value: Any) -> None:
    assert (await refused(http, chat_template_kwargs=value))["param"].startswith("chat_template_kwargs")


async def test_an_effort_is_told_to_a_template_that_knows_it(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    template = "{{ reasoning_effort or 'none' }}:{{ messages[0].content }}"
    async with http_of(app_of(make_service(tokenizer=byte_tokenizer(template)))) as http:
        assert await prompt_of(http, backend, reasoning_effort="high") == "high:hi"


async def test_what_openais_clients_send_unasked_asks_for_nothing(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    more = {"reasoning_effort": "medium", "verbosity": "medium", "prompt_cache_key": "me", "store": False}
    assert await prompt_of(http, backend, **more) == await prompt_of(http, backend)


# -------------------------------------------------------------------------------------------------- fingerprint


async def test_an_answer_says_by_what_it_was_made(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HI)  # type: ignore[arg-type]
    stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)  # type: ignore[arg-type]
    text = await client.completions.create(model=MODEL, prompt="hi")
    found = {answer.system_fingerprint, text.system_fingerprint} | {c.system_fingerprint async for c in stream}
    assert found == {fingerprint_of(FairServeArgs(served_model_name=MODEL))}


def test_a_fingerprint_changes_with_what_changes_outputs_only() -> None:
    first = fingerprint_of(FairServeArgs())
    assert first == fingerprint_of(FairServeArgs.model_validate({"num_replicas": 7, "fairness": {"policy": "drr"}}))
    changes: list[dict[str, Any]] = [{"model": "other"}, {"engine": {"dtype": "bfloat16"}}, {"engine": {"seed": 1}}]
    assert len({first, *(fingerprint_of(FairServeArgs.model_validate(change)) for change in changes)}) == 4


# -------------------------------------------------------------------------------------------------------- tiers

TIERS = {"flex": 0.5, "priority": 2.0}
ANN = {"client": "ann", "key": "secret-of-ann", "weight": 3.0, "service_tiers": ["flex", "priority"]}
BEN = {"client": "ben", "key": "secret-of-ben"}


async def tier_of(http: httpx.AsyncClient, backend: ScriptedBackend, key: str, **more: Any) -> tuple[Any, str, float]:
    answer = await http.post(CHAT, json=GOOD | more, headers={"authorization": f"Bearer {key}"})
    told = ChatCompletion.model_validate(answer.json(), strict=True).service_tier
    request = backend.requests[-1]
    return told, request.client, request.weight


async def test_a_tier_is_a_client_of_its_own_with_its_weight(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    async with http_of(app_of(make_service(keys=[ANN, BEN], service_tiers=TIERS))) as http:
        assert await tier_of(http, backend, "secret-of-ann") == (None, "ann", 3.0)
        assert await tier_of(http, backend, "secret-of-ann", service_tier="auto") == ("default", "ann", 3.0)
        assert await tier_of(http, backend, "secret-of-ann", service_tier="flex") == ("flex", "ann+flex", 1.5)
        assert await tier_of(http, backend, "secret-of-ann", service_tier="priority") == (
            "priority",
            "ann+priority",
            6.0,
        )


async def test_a_tier_that_is_not_the_keys_or_not_set_up_is_the_default(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    async with http_of(app_of(make_service(keys=[ANN, BEN], service_tiers={"flex": 0.5}))) as http:
        assert await tier_of(http, backend, "secret-of-ben", service_tier="flex") == ("default", "ben", 1.0)
        assert await tier_of(http, backend, "secret-of-ann", service_tier="priority") == ("default", "ann", 3.0)
        answer = await http.post(
            CHAT, json=GOOD | {"service_tier": "gold"}, headers={"authorization": "Bearer secret-of-ann"}
        )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "service_tier")


async def test_a_stream_says_its_tier_in_every_chunk(make_service: ServiceMaker) -> None:
    async with http_of(
        app_of(make_service(keys=[ANN], service_tiers=TIERS)), authorization="Bearer secret-of-ann"
    ) as http:
        answer = await http.post(CHAT, json=GOOD | {"service_tier": "flex", "stream": True})
    chunks = [ChatCompletionChunk.model_validate(one, strict=True) for one in events_of(answer.content)[:-1]]
    assert {chunk.service_tier for chunk in chunks} == {"flex"}


@pytest.mark.parametrize("client", ["ann+flex", "ann+batch"])
def test_no_key_has_the_name_of_a_tier(client: str) -> None:
    with pytest.raises(ValueError, match="client"):
        ApiKey(client=client, key="secret-of-ann")


# -------------------------------------------------------------------------------------------------------- users

TEAM = {"client": "acme/research", "key": "secret-of-team", "weight": 2.0, "max_waiting": 5, "sub_clients": True}


async def request_of(http: httpx.AsyncClient, backend: ScriptedBackend, **more: Any) -> GenerateRequest:
    assert (await http.post(CHAT, json=GOOD | more)).status_code == 200
    return backend.requests[-1]


async def test_a_user_is_a_client_within_the_keys(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    async with http_of(app_of(make_service(keys=[TEAM])), authorization="Bearer secret-of-team") as http:
        request = await request_of(http, backend, user="ann")
        assert (request.client, request.weight, request.max_waiting) == ("acme/research/ann", 2.0, 5)
        assert (await request_of(http, backend)).client == "acme/research/no-user"
        assert (await request_of(http, backend, user="")).client == "acme/research/no-user"
        text = await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "user": "ben"})
    assert text.status_code == 200
    assert backend.requests[-1].client == "acme/research/ben"


@pytest.mark.parametrize("user", ["Ann Müller", "a/b", "a:priority", "x" * 49, "\u2028", "../.."])
def test_a_user_that_fits_no_name_is_shown_by_a_digest(user: str) -> None:
    client = Client("acme", has_users=True)
    name = client.of_user(user).name
    assert name.startswith("acme/user-")
    assert len(name) == len("acme/user-") + 16
    assert name == client.of_user(user).name != client.of_user(user + "x").name


def test_a_user_without_the_keys_leave_is_a_label() -> None:
    assert Client("acme").of_user("ann") == Client("acme")


def test_users_and_tiers_go_together() -> None:
    client = Client("acme", has_users=True, service_tiers=("flex",)).of_user("ann")
    assert client.at_tier("flex", TIERS)[0].name == "acme/ann+flex"


def test_a_client_of_three_segments_has_no_room_for_users() -> None:
    with pytest.raises(ValidationError, match="three segments"):
        ApiKey.model_validate(TEAM | {"client": "acme/research/ann"})


def test_keys_of_one_client_agree_about_its_users_and_a_live_one_follows() -> None:
    first = ApiKey.model_validate(TEAM)
    with pytest.raises(ConfigError, match="sub_clients"):
        Identities([first, ApiKey.model_validate(TEAM | {"key": "another-secret", "sub_clients": False})])
    live = ApiKey(client="acme/research", key="another-secret", weight=2.0)
    assert Identities.from_config(ApiConfig(keys=(first,)), {}).with_live([live])._clients["acme/research"].has_users
