"""Who may look and who may change: every row of the table in ``fairserve.api.admin_auth``, and what leaks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fairserve.config import key_digest
from fairserve.errors import ConfigError
from tests.api.admin_kit import ADMIN, ADMIN_KEYS, House, error_of, keyed
from tests.api.scripted import Call

API_KEYS = ({"client": "alice", "key": "alice-secret"},)
READS = ("/overview", "/clients", "/clients/greedy", "/counters", "/replicas", "/history?client=greedy", "/events")
READS += ("/audit", "/keys", "/settings", "/openapi.json", "/nothing-here")


@pytest.mark.parametrize("path", READS)
async def test_with_api_keys_and_no_admin_key_everything_is_closed(path: str) -> None:
    house = House(keys=API_KEYS)
    for key in (None, "alice-secret", "a guess"):
        error = error_of(await house.get(path, key), 403)
        assert error["code"] == "admin_key_required"
        assert "FAIRSERVE_ADMIN_KEYS" in error["message"]
    assert not house.counter.calls


async def test_an_open_service_may_be_read_by_everybody_and_changed_by_nobody() -> None:
    house = House()
    assert (await house.get("/overview", None)).status_code == 200
    async with house.http(None) as http:
        for answer in (
            await http.patch("/clients/greedy", json={"weight": 4}),
            await http.patch("/settings", json={"fairness.quantum": 1}),
            await http.post("/keys", json={"client": "bob"}),
            await http.delete("/keys/abcdef"),
        ):
            assert error_of(answer, 403)["code"] == "admin_key_required"
    assert set(house.counter.calls) == {"overview"}


async def test_the_first_live_key_closes_an_open_service_to_readers() -> None:
    house = House()
    is_open = True
    house.service.admins._is_open = lambda: is_open
    assert (await house.get("/replicas", None)).status_code == 200
    is_open = False
    error_of(await house.get("/replicas", None), 403)


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("key", [None, "alice-secret", "a guess", "admin-secret-of-op", f"{ADMIN}x"])
async def test_with_an_admin_key_nothing_else_opens(path: str, key: str | None) -> None:
    house = keyed()
    answer = await house.get(path, key)
    assert error_of(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    if key is not None:
        assert key not in answer.text
    assert not house.counter.calls


async def test_an_open_service_with_an_admin_key_asks_readers_for_it_too() -> None:
    house = House(admin_keys=ADMIN_KEYS)
    error_of(await house.get("/overview", None), 401)
    assert (await house.get("/overview")).status_code == 200


async def test_admin_keys_may_come_from_the_environment_as_digests() -> None:
    entry = {"name": "night", "key_sha256": key_digest("night-secret")}
    house = House(environ={"FAIRSERVE_ADMIN_KEYS": json.dumps([entry])}, admin_keys=ADMIN_KEYS)
    for secret, name in ((ADMIN, "ops"), ("night-secret", "night")):
        async with house.http(secret) as http:
            assert (await http.patch("/clients/greedy", json={"weight": 3})).status_code == 200
        (newest, *_) = await house.counter.audit()
        assert newest["who"] == name


def test_an_admin_may_have_two_keys() -> None:
    House(admin_keys=({"name": "ops", "key": "first-secret"}, {"name": "ops", "key": "second-secret"}))


@pytest.mark.parametrize(
    ("api", "environ", "message"),
    [
        ({"admin_keys": ADMIN_KEYS, "keys": ({"client": "alice", "key": ADMIN},)}, {}, "also an API key"),
        ({"admin_keys": (*ADMIN_KEYS, {"name": "eve", "key": ADMIN})}, {}, "given twice"),
        ({}, {"FAIRSERVE_ADMIN_KEYS": "{"}, "FAIRSERVE_ADMIN_KEYS is not valid JSON"),
        ({}, {"FAIRSERVE_ADMIN_KEYS": '[{"hush-hush": "ops"}]'}, "entry 0 has an unknown field; known: name, key"),
    ],
)
def test_wrong_admin_keys_stop_the_service_without_showing_a_secret(
    api: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        House(environ=environ, **api)
    assert ADMIN not in str(raised.value) and "hush" not in str(raised.value)


async def test_strangers_are_refused_before_their_body_is_read() -> None:
    call = Call(keyed().app, {"client": "bob"}, path="/admin/v1/keys")
    assert await call.status() == 401
    assert call._incoming.qsize() == 1, "the body was read"
