"""Counters that are exported from one place and imported into another: the same leads, no token twice."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from fairserve import cli, client
from fairserve.client import Connection
from fairserve.cluster import redis_store
from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import NOTHING, StepReport, Totals
from tests.api.admin_kit import House
from tests.client_kit import FakeDoor, over_http

Capture = pytest.CaptureFixture[str]
URL = "redis://shared/0"


def service_of(store: str | None = None) -> CounterService:
    return CounterService(FairServeArgs.model_validate({"counter": {"store": store}}).model_dump_json())


def serve(service: CounterService, seq: int = 1, **served: int) -> None:
    totals = {client: Totals(num_input, 0, 0, float(num_input)) for client, num_input in served.items()}
    report = StepReport("r", 1, seq, 0, 0, 0, 1_000, 4, totals=totals)
    service.dispatcher.report(report, 1.0)


def lead(service: CounterService) -> float:
    return service.dispatcher.queue.lead("ann", "bob")


def num_input(service: CounterService, client: str = "ann") -> int:
    return service.dispatcher.ledger.totals(client).num_input


def save(service: CounterService) -> None:
    store = service.main.upkeep.store
    assert store is not None
    asyncio.run(service.main.upkeep.keep(store))


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[CounterService]:
    """The last one is what the commands find."""
    services: list[CounterService] = []
    monkeypatch.setattr(client, "connect", lambda *_, **__: Connection(FakeDoor(services[-1])))  # type: ignore[arg-type]
    monkeypatch.delenv("FAIRSERVE_URL", raising=False)
    server = fakeredis.FakeServer()
    monkeypatch.setattr(redis_store, "connected", lambda url: fakeredis.FakeRedis(server=server, decode_responses=True))
    return services


def run(*words: object) -> int:
    return cli.main(["counters", *map(str, words)])


def test_counters_of_one_service_go_into_another_and_twice_is_as_once(
    running: list[CounterService], tmp_path: Path, capsys: Capture
) -> None:
    old, new, file = service_of(), service_of(), tmp_path / "counters.json"
    serve(old, ann=100, bob=10)
    serve(new, bob=5, cyd=7)
    running.append(old)
    assert run("export", file) == 0
    assert "the counters of 2 clients" in capsys.readouterr().err
    running.append(new)
    for _ in range(2):
        assert run("import", file) == 0
        assert lead(new) == 90 and (num_input(new), num_input(new, "bob")) == (100, 15)
        assert new.dispatcher.queue.counter("cyd") == 2, "as far above the least served as before"
        new.dispatcher.check()
    assert "2 clients are in force" in capsys.readouterr().err
    assert "imported those of 2 clients" in new.dispatcher.events.newest(1)[0].text
    entries = asyncio.run(new.audit())
    assert [(e["action"], e["after"]) for e in entries] == [("counters.import", {"clients": 2})] * 2
    serve(new, seq=2, bob=6)
    assert lead(new) == 89, "what the replica reported before is not charged again"


def test_stdout_and_stdin_will_do(
    running: list[CounterService], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.append(service_of())
    serve(running[0], ann=100, bob=10)
    assert run("export", "-") == 0
    text = capsys.readouterr().out
    assert json.loads(text)["format"] == "fairserve counters"
    running.append(service_of())
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert run("import", "-") == 0
    assert lead(running[1]) == 90


@pytest.mark.parametrize("target", ["file", URL])
def test_counters_of_a_file_go_into_a_store_and_the_next_service_there_goes_on(
    running: list[CounterService], tmp_path: Path, target: str, capsys: Capture
) -> None:
    source, file = tmp_path / "old.sqlite", tmp_path / "counters.json"
    old = service_of(str(source))
    serve(old, ann=100, bob=10)
    save(old)
    assert run("export", file, "--store", source) == 0
    place = tmp_path / "new.sqlite" if target == "file" else URL
    assert run("import", file, "--store", place) == 0
    assert "goes on from these counters" in capsys.readouterr().err
    new = service_of(str(place))
    assert (lead(new), num_input(new)) == (90, 100)
    serve(new, ann=1)
    save(new)
    assert (lead(new), num_input(new)) == (91, 101)
    assert run("export", tmp_path / "again.json", "--store", place) == 0
    assert lead(service_of(str(place))) == 91
    capsys.readouterr()
    assert run("import", file, "--store", place) == 2
    assert "is in use by a running service" in capsys.readouterr().err


def exported(**changes: Any) -> dict[str, Any]:
    service = service_of()
    serve(service, ann=1)
    document: dict[str, Any] = asyncio.run(service.export_counters())
    return document | changes


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "no object"),
        ({"counters": {}}, "no export of counters"),
        (exported(format_version=99), "format_version 99, this fairserve reads 1"),
        (exported(counters={"ann": [1.0]}), "not a counter and a weight"),
        (exported(counters=[1]), "of the wrong kind"),
        (exported(counters={"ann": [1.0, 0.0]}), "weights are above 0"),
        (exported(counters={"ann": [float("nan"), 1.0]}), "counter nan"),
        (exported(ledger={"totals": {"ann": [1, 0, -1, 1.0]}, "books": []}), "not negative"),
        (exported(ledger={"totals": {}}), "something is missing"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing(
    running: list[CounterService], tmp_path: Path, capsys: Capture, document: Any, expected: str
) -> None:
    file = tmp_path / "counters.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    running.append(service_of())
    serve(running[0], ann=5)
    before = running[0].dispatcher
    assert run("import", file) == 2
    assert expected in capsys.readouterr().err
    assert running[0].dispatcher is before
    place = tmp_path / "c.sqlite"
    assert run("import", file, "--store", place) == 2
    assert expected in capsys.readouterr().err and not place.exists()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("export", "x", "--store", "session"), 2, "a path or a redis:// URL"),
        (("export", "x", "--store", "nowhere/at/all.sqlite"), 2, "there is no folder"),
        (("export", "x", "--store", "no.sqlite"), 2, "no.sqlite holds no counters"),
        (("export", "x", "--store", "redis://:hunter2secret@h/0"), 2, "FAIRSERVE_REDIS_PASSWORD"),
        (("import", "nowhere.json"), 1, "nowhere.json"),
    ],
)
def test_a_wrong_place_is_told(
    running: list[CounterService],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    words: tuple[str, ...],
    code: int,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    running.append(service_of())
    assert run(*words) == code
    told = capsys.readouterr().err
    assert expected in told and "hunter2" not in told


def test_over_http_it_is_told_to_go_over_ray() -> None:
    service = over_http(House())
    for act in (service.export_counters, lambda: service.import_counters({})):
        with pytest.raises(Exception, match="over Ray"):
            act()


def test_a_totals_row_says_its_fields_in_order() -> None:
    assert (NOTHING + Totals(1, 2, 3, 4.0)).row() == [1, 2, 3, 4.0]
