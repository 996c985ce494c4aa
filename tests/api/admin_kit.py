"""The admin API over a counter actor that plays, in process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import FastAPI

from fairserve.api.admin_service import AdminService
from fairserve.api.app import create_app
from fairserve.api.identity import Identities
from fairserve.clock import VirtualClock
from fairserve.cluster.counter_query import CounterQuery
from fairserve.config import ApiConfig
from tests.api.fake_counter import FakeCounter, FakeTransport

START_S = 1_763_700_000.0
ADMIN = "admin-secret-of-ops"
ADMIN_KEYS = ({"name": "ops", "key": ADMIN},)


class House:
    """A counter, the clock that it and the shared reads go by, and the application in front."""

    def __init__(self, num_clients: int = 8, *, environ: Mapping[str, str] | None = None, **api: Any) -> None:
        self.clock = VirtualClock()
        self.counter = FakeCounter(num_clients, unix_s=lambda: START_S + self.clock.now_s())
        config, environ = ApiConfig.model_validate(api), environ or {}
        identities = Identities.from_config(config, environ)
        query = CounterQuery(FakeTransport(self.counter), timeout_s=1.0)
        self.service = AdminService.from_config(
            config, query, self.clock, is_open=lambda: identities.is_open, environ=environ
        )
        self.app: FastAPI = create_app(_no_service, admin_provider=lambda: self.service)

    def http(self, key: str | None = ADMIN) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        base_url = "http://fairserve/admin/v1"
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=base_url, headers=headers)

    async def get(self, path: str, key: str | None = ADMIN, **query: Any) -> httpx.Response:
        async with self.http(key) as http:
            return await http.get(path, params=query or None)


def keyed() -> House:
    """With an admin key and an API key."""
    return House(admin_keys=ADMIN_KEYS, keys=({"client": "alice", "key": "alice-secret", "weight": 2.0},))


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of an answer that must have failed with ``status``."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and {"message", "type", "param", "code"} <= set(body["error"])
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def _no_service() -> Any:
    raise AssertionError("no test of the admin API generates text")
