"""The admin API: what it answers, what it refuses and with which words, how often it asks."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from openapi_spec_validator import validate
from pydantic import TypeAdapter

from fairserve import views
from fairserve.errors import CounterUnreachable, FairServeError
from tests.api.admin_kit import ADMIN, START_S, House, error_of, keyed
from tests.api.scripted import settled

READS: list[tuple[str, Any]] = [
    ("/overview", views.Overview),
    ("/overview?top=2&search=acme", views.Overview),
    ("/models", tuple[views.ModelView, ...]),
    ("/clients", views.ClientPage),
    ("/clients?offset=1&limit=2&order=name&search=a", views.ClientPage),
    ("/clients/greedy", views.ClientView),
    ("/clients/acme/research/ann", views.ClientView),
    ("/clients/acme%2Fresearch%2Fann", views.ClientView),
    ("/counters", tuple[views.CounterView, ...]),
    ("/replicas", tuple[views.ReplicaView, ...]),
    ("/history?client=greedy&client=modest&resolution=60", views.History),
    ("/events?after=3&limit=5", tuple[views.EventView, ...]),
    ("/usage?from=2026-11-20&to=2026-11-21", list[views.UsageView]),
    ("/audit", tuple[views.AuditView, ...]),
    ("/keys", tuple[views.KeyView, ...]),
    ("/settings", tuple[views.SettingView, ...]),
]


@pytest.fixture
def house() -> House:
    return keyed()


@pytest.mark.parametrize(("path", "kind"), READS, ids=[path for path, _ in READS])
async def test_every_read_answers_with_its_view(house: House, path: str, kind: Any) -> None:
    answer = await house.get(path)
    assert answer.status_code == 200, answer.text
    TypeAdapter(kind).validate_python(answer.json())
    assert sum(house.counter.calls.values()) == 1


async def test_what_the_actor_says_arrives_unchanged(house: House) -> None:
    answer = (await house.get("/overview", top=3)).json()
    assert views.Overview.model_validate(answer) == views.Overview.model_validate(await house.counter.overview(3))
    assert answer["others"]["name"] == "other"
    page = (await house.get("/clients", order="name", search="acme", offset=1, limit=1)).json()
    assert (page["total"], [client["name"] for client in page["clients"]]) == (3, ["acme/research/bob"])
    history = (await house.get("/history", client=["greedy", "zoe"], since=START_S - 9.5)).json()
    assert (history["resolution_s"], set(history["clients"])) == (1, {"greedy", "zoe"})
    assert history["times_s"][0] == START_S - 10


async def test_the_counters_of_a_thousand_clients_and_more_come_in_one_answer() -> None:
    house = House(2_300)
    counters = (await house.get("/counters")).json()
    assert len({row["name"] for row in counters}) == 2_300
    assert set(counters[0]) == {"name", "weight", "counter", "lead"}


async def test_ten_dashboards_ask_the_actor_once_a_second(house: House) -> None:
    house.counter.gate = asyncio.Event()
    readers = [asyncio.create_task(house.get("/overview")) for _ in range(10)]
    await settled()
    house.counter.gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*readers)} == {200}
    house.clock.advance(0.9)
    await house.get("/overview")
    await house.get("/replicas")  # of the same overview
    assert house.counter.calls["overview"] == 1
    house.clock.advance(0.2)
    await house.get("/overview")
    assert house.counter.calls["overview"] == 2


async def test_different_questions_are_asked_apart(house: House) -> None:
    for path in ("/overview?top=1", "/overview?top=2", "/overview?top=1&search=a"):
        await house.get(path)
    assert house.counter.calls["overview"] == 3


async def test_a_reader_that_leaves_does_not_end_the_call_of_the_others(house: House) -> None:
    house.counter.gate = asyncio.Event()
    readers = [asyncio.create_task(house.service.overview()) for _ in range(2)]
    await settled()
    readers[0].cancel()
    await settled()
    house.counter.gate.set()
    assert (await readers[1]).num_clients == 8
    assert readers[0].cancelled()


async def test_dashboards_that_began_at_different_moments_share_one_history(house: House) -> None:
    await house.get("/history", client="greedy", since=START_S - 60.2)
    await house.get("/history", client="greedy", since=START_S - 60.9)
    assert house.counter.calls["history"] == 1


async def test_a_change_shows_in_the_next_read(house: House) -> None:
    async with house.http() as http:
        assert (await http.get("/clients/greedy")).json()["weight"] == 1
        changed = (await http.patch("/clients/greedy", json={"weight": 4, "is_paused": True})).json()
        assert (changed["weight"], changed["is_paused"]) == (4, True)
        assert (await http.get("/clients/greedy")).json()["weight"] == 4
        await http.patch("/clients/greedy", json={"weight": None})
        assert (await http.get("/clients/greedy")).json()["weight"] == 1
        newest, first = (await http.get("/audit")).json()
        assert (first["who"], first["action"], first["target"]) == ("ops", "client", "greedy")
        assert first["after"] == {"weight": 4.0, "is_paused": True}, "only the fields that were named"
        assert newest["after"] == {"weight": None}
        assert (await http.get("/audit", params={"before": newest["seq"]})).json() == [first]


async def test_the_client_of_a_team_is_changed_by_its_path(house: House) -> None:
    async with house.http() as http:
        answer = await http.patch("/clients/acme/sales/eve", json={"requests_per_min": 30, "max_waiting": 5})
    assert (answer.json()["requests_per_min"], answer.json()["max_waiting"]) == (30, 5)


async def test_settings_change_and_go_back(house: House) -> None:
    async with house.http() as http:
        (changed,) = (await http.patch("/settings", json={"fairness.quantum": 750})).json()
        assert changed == {"path": "fairness.quantum", "value": 750, "deployed": 500.0, "is_live": True}
        (back,) = (await http.patch("/settings", json={"fairness.quantum": None})).json()
        assert (back["value"], back["is_live"]) == (500.0, False)


async def test_a_key_is_made_listed_and_revoked_and_its_secret_told_once(house: House) -> None:
    async with house.http() as http:
        answer = await http.post("/keys", json={"client": "bob", "weight": 3, "applications": ["chat"]})
        assert answer.status_code == 201
        secret, key = answer.json()["secret"], answer.json()["key"]
        assert hashlib.sha256(secret.encode()).hexdigest().startswith(key["id"])
        assert (key["client"], key["weight"], key["applications"], key["source"]) == ("bob", 3, ["chat"], "live")
        (live, deployed) = (await http.get("/keys")).json()
        assert live == key
        assert (deployed["client"], deployed["source"], deployed["weight"]) == ("alice", "deployed", 2)
        seen = "".join([(await http.get(path)).text for path in ("/keys", "/audit", "/events")])
        assert secret not in seen and secret not in str(house.counter._keys) and "alice-secret" not in seen
        assert (await http.delete(f"/keys/{key['id'][:6]}")).json()["id"] == key["id"]
        assert [one["client"] for one in (await http.get("/keys")).json()] == ["alice"]


@pytest.mark.parametrize(
    ("method", "path", "body", "param", "words"),
    [
        ("PATCH", "/clients/greedy", {"weight": 0}, "weight", "greater than 0"),
        ("PATCH", "/clients/greedy", {"weight": -1}, "weight", "greater than 0"),
        ("PATCH", "/clients/greedy", {"weight": 1e7}, "weight", "less than or equal to 1000000"),
        ("PATCH", "/clients/greedy", {"wieght": 1}, "wieght", "not permitted"),
        ("PATCH", "/clients/greedy", {"is_paused": None}, "is_paused", "valid boolean"),
        ("PATCH", "/clients/greedy", {"max_waiting": 1.5}, "max_waiting", "valid integer"),
        ("PATCH", "/clients/greedy", {}, None, "name at least one of weight, is_paused, max_waiting, requests_per_min"),
        ("PATCH", "/clients/two%20words", {"weight": 1}, "name", "A-Z a-z 0-9"),
        ("PATCH", "/settings", {}, None, "name a setting"),
        ("PATCH", "/settings", {"engine.seed": 3}, "engine.seed", "these can: fairness.policy"),
        ("POST", "/keys", {"client": "a/b/c/d"}, "client", "up to three segments"),
        ("POST", "/keys", {"weight": 1}, "client", "required"),
        ("POST", "/keys", {"client": "bob", "weight": "heavy"}, "weight", "valid number"),
        ("POST", "/keys", {"client": "bob", "key": "my-own-secret"}, "key", "not permitted"),
        ("POST", "/keys", {"client": "bob", "applications": ["a", "a"]}, None, "names one application twice"),
        ("DELETE", "/keys/xyz", None, "id", "pattern"),
        ("GET", "/overview?top=2000", None, "top", "less than or equal to 1000"),
        ("GET", "/clients?order=size", None, "order", "'name', 'service'"),
        ("GET", "/clients?limit=0", None, "limit", "greater than or equal to 1"),
        ("GET", "/history", None, "client", "required"),
        ("GET", "/history?client=a&resolution=5", None, "resolution", "1 or 60"),
        ("GET", "/history?client=a&since=nan", None, "since", "finite"),
        ("GET", "/events?after=soon", None, "after", "valid integer"),
    ],
)
async def test_a_wrong_value_is_said_with_what_is_allowed(
    house: House, method: str, path: str, body: Any, param: str | None, words: str
) -> None:
    async with house.http() as http:
        answer = await http.request(method, path, json=body)
    error = error_of(answer, 400)
    assert words in error["message"]
    assert error["param"] == param
    assert "my-own-secret" not in answer.text
    assert not house.counter.calls or path == "/settings"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/clients/nobody", "client_not_found"),
        ("DELETE", "/keys/abcdef", "key_not_found"),
        ("GET", "/nothing", "unknown_url"),
    ],
)
async def test_what_is_not_there_is_404(house: House, method: str, path: str, code: str) -> None:
    async with house.http() as http:
        assert error_of(await http.request(method, path), 404)["code"] == code


async def test_a_body_must_be_json_and_say_so(house: House) -> None:
    async with house.http() as http:
        assert error_of(await http.patch("/settings", content=b"{", headers={"content-type": "application/json"}), 400)
        plain = await http.patch(
            "/settings", content=b'{"fairness.quantum": 1}', headers={"content-type": "text/plain"}
        )
        error_of(plain, 400)
    assert not house.counter.calls


async def test_a_huge_body_is_refused(house: House) -> None:
    async with house.http() as http:
        assert error_of(await http.patch("/settings", json={"x": "y" * 200_000}), 413)["code"] == "body_too_large"


async def test_a_wrong_method_is_405_in_the_same_shape(house: House) -> None:
    async with house.http() as http:
        assert error_of(await http.put("/settings"), 405)["code"] == "method_not_allowed"


async def test_a_silent_actor_is_503_with_a_retry_after(house: House) -> None:
    house.counter.failure = CounterUnreachable("the counter actor did not answer")
    answer = await house.get("/overview")
    assert error_of(answer, 503)["code"] == "counter_unreachable"
    assert answer.headers["retry-after"] == "1"
    house.counter.failure = None
    house.clock.advance(1)
    assert (await house.get("/overview")).status_code == 200


async def test_a_bug_tells_strangers_nothing(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.counter.failure = KeyError(f"a secret thing {ADMIN}")
    answer = await house.get("/overview")
    error = error_of(answer, 500)
    assert error["code"] == "internal_error" and "secret" not in answer.text
    assert error["message"].split()[-1].rstrip(")") in caplog.text


async def test_a_change_that_timed_out_is_looked_up_anew(house: House) -> None:
    await house.get("/clients/greedy")
    house.counter.failure = CounterUnreachable("slow")
    with pytest.raises(FairServeError):
        await house.service.set_client("greedy", views.ClientChange(weight=9), "ops")
    house.counter.failure = None
    await house.get("/clients/greedy")
    assert house.counter.calls["client"] == 2


async def test_the_openapi_description_is_valid_and_complete(house: House) -> None:
    answer = await house.get("/openapi.json")
    description = answer.json()
    validate(description)
    assert description["servers"] == [{"url": "/admin/v1"}]
    operations = [op for path in description["paths"].values() for op in path.values()]
    assert len(operations) == 16
    for operation in operations:
        assert operation["description"] and operation["security"] == [{"adminKey": []}]
        assert {"401", "403", "503", "default"} <= set(operation["responses"])
        assert "422" not in operation["responses"], "this API answers 400"
    assert len({operation["operationId"] for operation in operations}) == 16
    assert "ClientView" in description["components"]["schemas"]


async def test_the_openai_routes_are_described_apart_and_for_everybody(house: House) -> None:
    async with house.http(None) as http:
        description = (await http.get("http://fairserve/openapi.json")).json()
    validate(description)
    assert set(description["paths"]) == {
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
        "/v1/models/{name}",
        "/health",
    }
    fields = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["anyOf"][1] == {"type": "null"}, "null means left out"
    assert fields["functions"] == {"enum": [[], None]}, "not supported: it may ask for nothing"


async def test_a_query_parameter_that_nobody_knows_is_refused_with_the_nearest(house: House) -> None:
    async with house.http() as http:
        error = error_of(await http.get("/clients?limt=5"), 400)
        assert error["param"] == "limt" and "did you mean 'limit'?" in error["message"]
        assert "known: none" in error_of(await http.get("/keys?limit=5"), 400)["message"]


async def test_usage_as_csv_is_the_same_rows_with_a_heading(house: House) -> None:
    query = {"from": "2026-11-20", "to": "2026-11-22"}
    answer = await house.get("/usage", format="csv", **query)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    lines = answer.text.split("\r\n")
    assert lines[0] == "client,period_start,requests,input_tokens,cached_tokens,output_tokens,service,model"
    assert lines[1] == "acme/research/ann,2026-11-20T00:00:00Z,3,100,40,50,200.0,fake"
    assert len(lines) == 2 + len((await house.get("/usage", **query)).json()) == 2 + 3 * len(house.counter.rows)


async def test_usage_by_hour_begins_with_the_first_day_and_ends_with_the_last(house: House) -> None:
    query = {"from": "2026-11-20", "to": "2026-11-21", "by": "hour"}
    starts = sorted({row["period_start"] for row in (await house.get("/usage", **query)).json()})
    assert (len(starts), starts[0], starts[-1]) == (48, "2026-11-20T00:00:00Z", "2026-11-21T23:00:00Z")
    assert "2026-11-20T07:00:00Z,3,100" in (await house.get("/usage", format="csv", **query)).text
    assert error_of(await house.get("/usage", by="week"), 400)["param"] == "by"


async def test_usage_is_of_this_month_unless_other_days_are_named_in_order(house: House) -> None:
    first = (await house.get("/usage")).json()[0]["period_start"]
    assert first.endswith("-01T00:00:00Z")
    error = error_of(await house.get("/usage", **{"from": "2026-11-22", "to": "2026-11-20"}), 400)
    assert error["message"] == "to (2026-11-20) lies before from (2026-11-22)"
    assert error_of(await house.get("/usage", **{"from": "yesterday"}), 400)["param"] == "from"


async def test_a_clients_budgets_are_set_and_shown_and_wrong_ones_refused(house: House) -> None:
    async with house.http() as http:
        set_to = {"budgets": {"day": {"soft": 800, "hard": 1000}}}
        answer = await http.patch("/clients/greedy", json=set_to)
        assert [(one["window"], one["hard"]) for one in answer.json()["budgets"]] == [("day", 1000)]
        for wrong, said in (
            ({"week": {"hard": 5}}, "has no field 'week'"),
            ({"day": {"soft": 9, "hard": 5}}, "soft (9) must be below hard (5)"),
            ({"day": {}}, "give 'soft', 'hard' or both"),
            ({"day": {"hard": 0}}, "greater than 0"),
        ):
            error = error_of(await http.patch("/clients/greedy", json={"budgets": wrong}), 400)
            assert said in error["message"], error
