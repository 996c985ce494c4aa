"""The admin API in front of the real counter service, in process: the shapes of the one fit the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fairserve.api.admin_service import AdminService
from fairserve.api.app import create_app
from fairserve.clock import SystemClock
from fairserve.cluster.counter_query import CounterQuery
from fairserve.cluster.counter_service import CounterService
from fairserve.config import ApiConfig, FairServeArgs
from tests.api.admin_kit import ADMIN_KEYS, House, error_of
from tests.api.fake_counter import FakeCounter, FakeTransport
from tests.api.test_admin import READS


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A house whose counter actor is the real one; greedy, modest and ann are known."""
    args = FairServeArgs.model_validate({"counter": {"store": str(tmp_path / "store.sqlite")}})
    actor = CounterService(args.model_dump_json())
    query = CounterQuery(FakeTransport(actor), timeout_s=5.0)  # type: ignore[arg-type]
    config = ApiConfig.model_validate({"admin_keys": ADMIN_KEYS})
    house = House.__new__(House)
    house.service = AdminService.from_config(config, query, SystemClock(), is_open=lambda: True, environ={})
    house.app = create_app(lambda: None, admin_provider=lambda: house.service)  # type: ignore[arg-type,return-value]
    house.counter = actor  # type: ignore[assignment]
    async with house.http() as http:
        for name in ("greedy", "modest", "acme/research/ann"):
            assert (await http.patch(f"/clients/{name}", json={"weight": 2})).status_code == 200
    yield house
    actor.end()


@pytest.mark.parametrize(("path", "kind"), READS, ids=[path for path, _ in READS])
async def test_every_read_of_the_real_service_is_its_view(house: House, path: str, kind: Any) -> None:
    answer = await house.get(path)
    assert answer.status_code == 200, answer.text
    TypeAdapter(kind).validate_python(answer.json())


async def test_a_change_of_the_real_service_shows_at_once_and_is_written_down(house: House) -> None:
    async with house.http() as http:
        for weight in (3, 4):
            changed = (await http.patch("/clients/greedy", json={"weight": weight, "is_paused": True})).json()
            assert (changed["weight"], changed["is_paused"]) == (weight, True)
            assert (await http.get("/clients/greedy")).json() == changed
        newest = (await http.get("/audit")).json()[0]
        assert (newest["who"], newest["before"]["weight"], newest["after"]["weight"]) == ("ops", 3, 4)


async def test_a_key_of_the_real_service_comes_and_goes(house: House) -> None:
    async with house.http() as http:
        made = (await http.post("/keys", json={"client": "bob", "weight": 2})).json()
        assert (await http.get("/keys")).json() == [made["key"]]
        assert (await http.delete(f"/keys/{made['key']['id']}")).json() == made["key"]
        assert (await http.get("/keys")).json() == []


async def test_the_real_service_says_what_is_wrong_in_the_same_words(house: House) -> None:
    async with house.http() as http:
        error = error_of(await http.patch("/settings", json={"fairness.quantum": -1}), 400)
        assert "fairness.quantum" in error["message"] and "greater than 0" in error["message"]
        assert (
            "these can: fairness.policy"
            in error_of(await http.patch("/settings", json={"engine.seed": 1}), 400)["message"]
        )
        error_of(await http.get("/clients/nobody"), 404)
        error_of(await http.delete("/keys/abcdef"), 404)


async def test_the_played_counter_has_the_settings_and_methods_of_the_real_one(house: House) -> None:
    played = FakeCounter()
    real = {view.path for view in await house.service.settings()}
    assert {view["path"] for view in await played.settings()} <= real
    for name in ("overview", "clients", "client", "history", "events", "audit", "keys", "settings", "key_directory"):
        assert callable(getattr(house.counter, name)) and callable(getattr(played, name))
