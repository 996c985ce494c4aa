"""``fairserve.connect``: the same answers and the same errors over Ray (played) and over HTTP (in process)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from typing import Any

import httpx
import pytest

import fairserve
from fairserve import views
from fairserve.api.http_errors import describe
from fairserve.client import Connection
from fairserve.client_doors import HttpDoor
from fairserve.errors import (
    AdminKeyRequired,
    CounterUnreachable,
    InvalidRequest,
    Unauthenticated,
    UnknownClient,
    UnknownKey,
    UnknownModel,
)
from tests.api.admin_kit import ADMIN_KEYS, START_S, House
from tests.client_kit import FakeDoor, over_http


@pytest.fixture
def house() -> House:
    return House(admin_keys=ADMIN_KEYS)


@pytest.fixture(params=["ray", "http"])
def service(request: pytest.FixtureRequest, house: House) -> Connection:
    return over_http(house) if request.param == "http" else Connection(FakeDoor(house.counter))


READS: list[Callable[[Connection], Any]] = [
    lambda service: service.overview(top=3, search="acme"),
    lambda service: service.verdict(),
    lambda service: service.replicas(),
    lambda service: service.clients(order="name"),
    lambda service: service.client("acme/research/ann"),
    lambda service: service.counters(),
    lambda service: service.history("greedy", "zoe", since_s=START_S - 20),
    lambda service: service.history("greedy", resolution_s=60),
    lambda service: service.events(after_seq=4, limit=3),
    lambda service: service.settings(),
]


@pytest.mark.parametrize("read", READS)
def test_both_doors_give_the_same_typed_answer(house: House, read: Callable[[Connection], Any]) -> None:
    over_ray = read(Connection(FakeDoor(house.counter)))
    first = over_ray[0] if isinstance(over_ray, tuple) else over_ray
    assert isinstance(first, views.View)
    assert read(over_http(house)) == over_ray


def test_the_short_questions_answer_with_plain_values(service: Connection) -> None:
    gap, bound = service.gap_and_bound()
    assert 0 < gap < bound
    assert service.epoch() == 1_763_700_000_000_000_000
    assert service.leases()["fairserve#Model#replica0"] == 1
    assert service.weights()["modest"] == 2
    backlog = service.backlog()
    assert next(iter(backlog)) == "greedy" and "idle" not in backlog
    assert list(backlog.values()) == sorted(backlog.values(), reverse=True)


def test_all_clients_are_there_however_many_there_are() -> None:
    service = Connection(FakeDoor(House(2_345).counter))
    assert len({client.name for client in service.clients()}) == 2_345
    assert len(service.clients(limit=1_200)) == 1_200
    assert len(service.clients(search="acme")) == 3


def test_weight_pause_and_limits_change_and_go_back(service: Connection) -> None:
    assert service.set_weight("greedy", 4).weight == 4
    assert service.pause("greedy").is_paused
    assert not service.resume("greedy").is_paused
    limited = service.set_limits("greedy", max_waiting=9, requests_per_min=30)
    assert (limited.max_waiting, limited.requests_per_min) == (9, 30)
    eased = service.set_limits("greedy", max_waiting=None)
    assert (eased.max_waiting, eased.requests_per_min) == (None, 30)
    assert service.set_weight("greedy", None).weight == 1
    assert [entry.action for entry in service.audit()] == ["client"] * 6


def test_the_audit_log_says_who(house: House) -> None:
    over_http(house).set_weight("zoe", 2)
    Connection(FakeDoor(house.counter, who="python:ann")).set_weight("zoe", 3)
    assert [entry.who for entry in Connection(FakeDoor(house.counter)).audit()] == ["python:ann", "ops"]


def test_settings_and_keys_change(service: Connection) -> None:
    (setting,) = service.set_settings({"fairness.policy": "fcfs"})
    assert (setting.value, setting.deployed, setting.is_live) == ("fcfs", "vtc", True)
    made = service.create_key("bob", weight=2, applications=["chat"])
    assert made.secret.startswith("fs-") and made.key.client == "bob" and made.key.applications == ("chat",)
    assert service.keys() == (made.key,)
    assert service.revoke_key(made.key.id[:8]) == made.key
    assert service.keys() == ()


MISTAKES: list[tuple[Callable[[Connection], Any], type[Exception], str]] = [
    (lambda service: service.client("nobody"), UnknownClient, "no client 'nobody' is known"),
    (lambda service: service.revoke_key("abcdef"), UnknownKey, "no live API key has the id 'abcdef'"),
    (lambda service: service.set_weight("zoe", -1), InvalidRequest, "weight: .*greater than 0"),
    (lambda service: service.set_weight("zoe", float("nan")), InvalidRequest, "weight: "),
    (lambda service: service.set_limits("zoe"), InvalidRequest, "name at least one of"),
    (lambda service: service.set_limits("zoe", speed=3), InvalidRequest, "no limit 'speed'; these are: max_waiting"),
    (lambda service: service.set_settings({"engine.seed": 1}), InvalidRequest, "these can: fairness.policy"),
    (lambda service: service.create_key("two words"), InvalidRequest, "client: .*A-Z a-z 0-9"),
    (lambda service: service.create_key("bob", applications=["a", "a"]), InvalidRequest, "one application twice"),
]


@pytest.mark.parametrize(("mistake", "kind", "words"), MISTAKES)
def test_a_mistake_is_the_same_error_by_both_doors(
    service: Connection, mistake: Callable[[Connection], Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        mistake(service)


def test_a_wrong_or_missing_admin_key_is_said(house: House) -> None:
    for key in ("a guess", None):
        with pytest.raises(Unauthenticated, match="admin key"):
            over_http(house, key).overview()
    with pytest.raises(AdminKeyRequired, match=r"api\.admin_keys or FAIRSERVE_ADMIN_KEYS"):
        over_http(House(), None).pause("greedy")


def test_a_silent_actor_is_said_over_http(house: House) -> None:
    house.counter.failure = CounterUnreachable("the counter actor did not answer")
    with pytest.raises(CounterUnreachable, match="did not answer"):
        over_http(house).overview()


def test_no_server_and_another_server_are_said() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, html="<h1>nothing</h1>")

    for answer, words in ((refuse, "connection refused"), (other, "answered 404, and not as fairserve does")):
        service = Connection(HttpDoor("http://there:1", "k", 1.0, httpx.MockTransport(answer)))
        with pytest.raises(CounterUnreachable, match=words):
            service.overview()


def test_the_admin_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRSERVE_ADMIN_KEY", "from-the-environment")
    with fairserve.connect("http://there:1") as service:
        assert service._door._http.headers["authorization"] == "Bearer from-the-environment"  # type: ignore[attr-defined]
    with fairserve.connect("http://there:1", admin_key="given") as service:
        assert service._door._http.headers["authorization"] == "Bearer given"  # type: ignore[attr-defined]


def test_leaving_the_block_closes_the_door(house: House) -> None:
    door = FakeDoor(house.counter)
    with pytest.raises(ZeroDivisionError), Connection(door):
        raise ZeroDivisionError
    assert door.is_closed


def test_importing_fairserve_stays_light() -> None:
    code = "import sys, fairserve; sys.exit(bool({'ray', 'httpx', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert callable(fairserve.connect)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        fairserve.conect  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("address", "running", "is_changed"),
    [
        ("auto", {"127.0.0.1:6001"}, True),
        ("127.0.0.1:6001", {"127.0.0.1:6001", "192.0.2.7:6379"}, True),
        ("127.0.0.1:6379", {"192.0.2.7:6379"}, False),
        ("auto", {"192.0.2.7:6379"}, False),
        ("192.0.2.7:6379", set(), False),
        ("ray://127.0.0.1:10001", {"127.0.0.1:6001"}, False),
    ],
)
def test_a_ray_on_loopback_is_joined_as_such_and_no_other(
    address: str, running: set[str], is_changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import ray_constants, services

    from fairserve.client_doors import join_on_loopback

    def found(asked: str, _: None) -> str:
        return min(running) if asked == "auto" else asked

    monkeypatch.setattr(services, "find_gcs_addresses", lambda: running)
    monkeypatch.setattr(services, "get_ray_address_from_environment", found)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    join_on_loopback(address)
    assert ray_constants.ENABLE_RAY_CLUSTER is not is_changed


def test_usage_of_some_days_comes_whole_through_either_door(service: Connection) -> None:
    found = service.usage(date(2026, 11, 20), date(2026, 11, 22))
    assert [found[i].period_start for i in (0, -1)] == ["2026-11-20T00:00:00Z", "2026-11-22T00:00:00Z"]
    assert len({(one.client, one.period_start) for one in found}) == len(found) > 3


def test_usage_by_hour_comes_whole_through_either_door(service: Connection) -> None:
    starts = {one.period_start for one in service.usage(date(2026, 11, 20), date(2026, 11, 22), by="hour")}
    assert (len(starts), min(starts), max(starts)) == (72, "2026-11-20T00:00:00Z", "2026-11-22T23:00:00Z")


def test_budgets_are_set_and_taken_back(service: Connection) -> None:
    (budget,) = service.set_budgets("greedy", {"day": {"hard": 1_000}}).budgets
    assert (budget.window, budget.hard, budget.soft) == ("day", 1_000, None)
    assert service.set_budgets("greedy", None).budgets == ()


def test_an_unknown_model_is_named_with_those_that_are_served() -> None:
    problem = describe(UnknownModel("huge", "small, big"), "req")
    transport = httpx.MockTransport(lambda request: httpx.Response(problem.status, json=problem.body()))
    with Connection(HttpDoor("http://fairserve", None, 5.0, transport), model="huge") as service:
        for ask in (service.overview, service.counters, lambda: service.client("ann")):
            with pytest.raises(UnknownModel, match=r"'huge'.*available: small, big$"):
                ask()
