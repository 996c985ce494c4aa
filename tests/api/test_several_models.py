"""Two models behind one door: the unmodified ``openai`` package and the admin API, over the real counter service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from fairserve.api.admin_service import AdminService
from fairserve.api.app import create_app
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.clock import SystemClock
from fairserve.cluster.counter_query import CounterQuery
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import StepReport, Totals
from tests.api.conftest import http_of
from tests.api.fake_counter import FakeTransport
from tests.api.scripted import ScriptedBackend, byte_tokenizer, words

ARGS = FairServeArgs.model_validate(
    {
        "served_model_name": "small",
        "more_models": [
            {"served_model_name": "org/big", "engine": {"pooling": "mean", "adapters": {"poet": "/a"}}, "price": 4.0}
        ],
        "counter": {"store": None},
    }
)


class House:
    def __init__(self) -> None:
        self.backends = {
            "": ScriptedBackend(words("small", " talk")),
            "org-big": ScriptedBackend(words("big", " words")),
        }
        self.metrics = {slot: RecordedMetrics() for slot in self.backends}
        models = [
            ServedModel(ARGS.of_model(slot), backend, byte_tokenizer(), 200 if slot else 100, self.metrics[slot])
            for slot, backend in self.backends.items()
        ]
        self.actor = CounterService(ARGS.model_dump_json())
        query = CounterQuery(FakeTransport(self.actor), 60.0)  # type: ignore[arg-type]
        self.service = OpenAIService(ARGS, models, environ={})
        admin = AdminService.from_config(ARGS.api, query, SystemClock(), is_open=lambda: True, environ={})
        self.http = http_of(create_app(lambda: self.service, admin_provider=lambda: admin))
        self.client = openai.AsyncOpenAI(api_key="ann", base_url="http://fairserve/v1", http_client=self.http)

    async def admin(self, path: str, **query: str) -> httpx.Response:
        return await self.http.get(f"/admin/v1{path}", params=query)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    house.actor.end()
    await house.http.aclose()


async def test_a_request_goes_to_the_model_that_it_names(house: House) -> None:
    for name, slot, text in (("small", "", "small talk"), ("org/big", "org-big", "big words")):
        chat = await house.client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
        assert (chat.model, chat.choices[0].message.content) == (name, text)
        assert len(house.backends[slot].requests) == 1
        assert house.metrics[slot].counters["fairserve_requests", "ann", "ok"] == 1, "each model's callers apart"
        answer = await house.client.responses.create(model=name, input="hi")
        assert (answer.model, answer.output_text) == (name, text)


async def test_what_differs_between_models_is_the_models_own(house: House) -> None:
    listed = [model async for model in house.client.models.list()]
    assert [(one.id, one.max_model_len) for one in listed] == [("small", 100), ("org/big", 200), ("poet", 200)]  # type: ignore[attr-defined]
    assert (await house.client.models.retrieve("org/big")).id == "org/big"
    with pytest.raises(openai.NotFoundError, match="available: small, org/big, poet") as error:
        await house.client.models.retrieve("huge")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        await house.client.embeddings.create(model="small", input="hi")
    with pytest.raises(openai.BadRequestError, match="100"):
        await house.client.completions.create(model="small", prompt="x" * 150)
    await house.client.completions.create(model="org/big", prompt="x" * 150)
    counted = await house.http.post("/tokenize", json={"prompt": "hi", "model": "org/big"})
    assert counted.json()["max_model_len"] == 200


async def test_an_adapter_is_a_model_of_its_bases_replicas(house: House) -> None:
    entry = await house.client.models.retrieve("poet")
    assert (entry.id, entry.parent) == ("poet", "org/big")  # type: ignore[attr-defined]
    bare = await house.client.completions.create(model="org/big", prompt="hi")
    made = await house.client.completions.create(model="poet", prompt="hi")
    assert [request.adapter for request in house.backends["org-big"].requests] == ["", "poet"]
    assert made.model == "poet" and made.system_fingerprint != bare.system_fingerprint
    assert house.metrics["org-big"].counters["fairserve_requests", "ann", "ok"] == 2


async def test_health_is_of_every_model_and_one_that_is_ill_takes_none_with_it(house: House) -> None:
    house.backends["org-big"].health_body = RuntimeError("gone")
    answer = await house.http.get("/health")
    assert answer.status_code == 200
    assert {name: one["ready"] for name, one in answer.json()["models"].items()} == {"small": True, "org/big": False}
    house.backends[""].health_body = {"ready": False}
    assert (await house.http.get("/health")).status_code == 503


async def test_the_admin_api_tells_of_each_model(house: House) -> None:
    totals = {"ann": Totals(3, 0, 2, 7.0)}
    await house.actor.report(StepReport("r0", 1, 1, 0, 9, 4, 9, 4, totals=totals), "org-big")
    models = (await house.admin("/models")).json()
    assert [(one["name"], one["slot"], one["price"]) for one in models] == [("small", "", 1), ("org/big", "org-big", 4)]
    for path in ("/overview", "/clients", "/counters", "/replicas", "/events", "/history"):
        query: dict[str, Any] = {"client": "ann"} if path == "/history" else {}
        for name in ("", "small", "org/big"):
            answer = await house.admin(path, model=name, **query)
            assert answer.status_code == 200, answer.text
        unknown = await house.admin(path, model="huge", **query)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (await house.admin("/clients/ann", model="org/big")).json()["service"] == 7.0
    assert (await house.admin("/clients/ann")).status_code == 404, "the first model has not seen ann"
    for name, models in (("org/big", ["org/big"]), ("small", []), ("", ["org/big"])):
        assert [row["model"] for row in (await house.admin("/usage", model=name)).json()] == models
