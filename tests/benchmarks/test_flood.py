"""The load for looking at a dashboard: it keeps as many requests under way as it says, and it ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks import flood
from benchmarks.flood import Flood, main
from benchmarks.load import Target
from benchmarks.workload import CLIENTS, GREEDY, ON_OFF
from tests.benchmarks.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


def test_each_client_has_its_requests_under_way_and_the_lines_tell_who_got_what(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flood, "REPORT_S", 0.4)
    lines: list[str] = []
    made = Flood(Target(server.url, "tiny", dict(zip(CLIENTS, CLIENTS, strict=True))), greedy=3, modest=1)
    asyncio.run(made.run(0.4, lines.append))
    sent = Counter(record.client for record in made.records)
    done = Counter(record.client for record in made.records if record.finish_s is not None)
    assert {
        client: sent[client] - done[client] <= (3 if client == GREEDY else 1) for client in CLIENTS
    } == dict.fromkeys(CLIENTS, True)
    assert min(done.values()) > 0 and len(lines) == 1
    assert all(f"{client} " in lines[0] for client in CLIENTS)


def test_the_on_off_client_rests(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood, "ON_S", 0.0)
    made = Flood(Target(server.url, "tiny", dict(zip(CLIENTS, CLIENTS, strict=True))), greedy=1, modest=1)
    asyncio.run(made.run(0.2, lambda _: None))
    assert ON_OFF not in {record.client for record in made.records} and made.records


def test_a_service_that_is_not_there_is_named(free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", f"http://127.0.0.1:{free_port}"]) == 1
    assert "does not serve" in capsys.readouterr().err


def test_a_key_for_an_unknown_client_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--key", "bob=x"]) == 2
    assert "greedy, steady, on-off, not for bob" in capsys.readouterr().err
