"""Pushing into a Grafana that records what it gets, through both client packages."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from fairserve import cli_grafana
from fairserve.cli import main
from fairserve.errors import ConfigError, GrafanaFailed
from fairserve.observe import grafana_push
from fairserve.observe.grafana import documents
from fairserve.observe.grafana_push import CLIENTS, Address, Grafana, open_grafana
from tests.observe.grafana_server import TOKEN, FakeGrafana, serving

PACKAGES = [name for name, _ in CLIENTS if importlib.util.find_spec(name)]
DOCUMENTS = documents()
Start = Callable[..., FakeGrafana]

pytestmark = pytest.mark.filterwarnings("ignore:This method is deprecated:DeprecationWarning")


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Only this package is installed."""
    monkeypatch.setattr(grafana_push, "CLIENTS", tuple(pair for pair in CLIENTS if pair[0] == request.param))
    monkeypatch.setenv(cli_grafana.ENV_TOKEN, TOKEN)
    monkeypatch.setattr("fairserve.cli_grafana.time.time", lambda: 1_800_000_000.0)
    return str(request.param)


@pytest.fixture
def fake(package: str) -> Iterator[FakeGrafana]:
    with serving(FakeGrafana()) as grafana:
        yield grafana


def opened(fake: FakeGrafana, token: str = TOKEN) -> Grafana:
    return open_grafana(Address.parsed(fake.url), token, timeout_s=5)


def test_both_packages_are_tried() -> None:
    if os.environ.get("FAIRSERVE_GRAFANA_CLIENTS") != "any":
        assert PACKAGES == ["grafana_client", "grafana_api"]


def test_a_push_leaves_folder_source_dashboards_and_annotation(
    fake: FakeGrafana, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["grafana", "push", "--url", fake.url, "--folder", "Fair share"]
    assert main([*words, "--prometheus-url", "http://prometheus:9090", "--annotate", "upgraded to 2"]) == 0
    assert [folder["title"] for folder in fake.folders] == ["Fair share"]
    assert [(source["type"], source["url"]) for source in fake.sources] == [("prometheus", "http://prometheus:9090")]
    assert set(fake.dashboards) == {"fairserve-fairness", "fairserve-engine"}
    for kept in fake.dashboards.values():
        assert kept["meta"]["folderUid"] == fake.folders[0]["uid"]
        assert kept["dashboard"]["templating"]["list"][0]["current"]["value"] == fake.sources[0]["uid"]
    assert [(a["text"], a["tags"], a["time"]) for a in fake.annotations] == [
        ("upgraded to 2", ["fairserve"], 1_800_000_000_000)
    ]
    saved = [body for _, path, body in fake.requests if path.endswith("/dashboards/db")]
    assert all(body["overwrite"] and body["message"].startswith("fairserve ") for body in saved)
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        "Grafana 13.1.0",
        "data source fairserve Prometheus: created",
        "fairserve: fairness: created",
        "fairserve: engine and mechanism: created",
        "annotation: created",
    ]


def test_pushing_twice_leaves_what_once_leaves(fake: FakeGrafana, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grafana", "push", "--url", fake.url, "--prometheus-url", "http://p:9090", "--annotate", "moved"]
    assert main(words) == 0
    num_writes = len(fake.writes)
    assert main(words) == 0
    assert len(fake.writes) == num_writes
    assert capsys.readouterr().out.count("unchanged") == 4


def test_what_somebody_changed_by_hand_is_overwritten(fake: FakeGrafana) -> None:
    grafana, document = opened(fake), DOCUMENTS["fairserve-engine.json"]
    assert grafana.dashboard(document, "f0", "one") == "created"
    fake.dashboards["fairserve-engine"]["dashboard"]["title"] = "mine"
    assert grafana.dashboard(document, "f0", "two") == "updated"
    assert fake.dashboards["fairserve-engine"]["dashboard"]["title"] == document["title"]


def test_a_dashboard_in_another_folder_is_moved(fake: FakeGrafana) -> None:
    grafana, document = opened(fake), DOCUMENTS["fairserve-engine.json"]
    grafana.dashboard(document, "f0", "one")
    assert grafana.dashboard(document, "f1", "two") == "updated"
    assert fake.dashboards["fairserve-engine"]["meta"]["folderUid"] == "f1"


def test_a_data_source_that_points_elsewhere_is_turned(fake: FakeGrafana) -> None:
    grafana = opened(fake)
    uid, state = grafana.data_source("http://old:9090")
    assert (grafana.data_source("http://new:9090"), state) == ((uid, "updated"), "created")
    assert [source["url"] for source in fake.sources] == ["http://new:9090"]


def test_the_same_text_later_is_another_event(fake: FakeGrafana) -> None:
    grafana = opened(fake)
    said = [grafana.annotate("moved", now_ms) for now_ms in (1_000_000, 1_600_000, 1_600_001)]
    assert said == ["created", "unchanged", "created"]


def test_a_grafana_under_a_path_is_found(package: str) -> None:
    with serving(FakeGrafana(prefix="/tools/grafana")) as fake:
        assert main(["grafana", "push", "--url", fake.url + "/"]) == 0
        assert len(fake.dashboards) == 2


@pytest.mark.parametrize("version", ["10.3.9", "9.5.0", "7.0.0-beta1"])
def test_a_grafana_that_is_too_old_gets_nothing(package: str, version: str) -> None:
    with serving(FakeGrafana(version=version)) as fake:
        with pytest.raises(GrafanaFailed, match=rf"is Grafana {version}: the dashboards need 10\.4 or later"):
            opened(fake).version()
        assert main(["grafana", "push", "--url", fake.url]) == 1
        assert fake.writes == []


@pytest.mark.parametrize("version", ["10.4.0", "12.0.0+security-01", "13.1.0-pre"])
def test_a_grafana_that_is_new_enough_is_taken(package: str, version: str) -> None:
    with serving(FakeGrafana(version=version)) as fake:
        assert opened(fake).version() == version


@pytest.mark.parametrize(
    ("refuses", "wanted"),
    [
        ({"/folders": 401}, "it does not know the token: GRAFANA_TOKEN must be that of a service account"),
        ({"/folders": 403}, "the token may not do this: its service account needs the role Editor"),
        ({"/folders": 404}, "it answered 404: the path is not Grafana's, or this Grafana no longer has"),
        ({"/dashboards/db": 412}, "it answered 412: refused with 412"),
        ({"/dashboards/db": 500}, "it answered 500: refused with 500"),
        ({"/health": 404}, "it answered 404: the path is not Grafana's"),
    ],
)
def test_a_refusal_says_what_to_do(
    fake: FakeGrafana, capsys: pytest.CaptureFixture[str], refuses: dict[str, int], wanted: str
) -> None:
    fake.refuses = refuses
    assert main(["grafana", "push", "--url", fake.url]) == 1
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


def test_a_wrong_token_is_told_and_never_repeated(
    fake: FakeGrafana, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cli_grafana.ENV_TOKEN, "glsa_wrong-and-secret")
    assert main(["grafana", "push", "--url", fake.url]) == 1
    out = capsys.readouterr()
    assert "it does not know the token" in out.err
    assert "wrong-and-secret" not in out.out + out.err


def test_a_page_of_something_else_is_not_a_grafana(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(FakeGrafana(version=None)) as fake:
        assert main(["grafana", "push", "--url", fake.url]) == 1
        assert "not" in capsys.readouterr().err
        assert fake.writes == []


def test_nobody_there_is_told_in_one_line(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main(["grafana", "push", "--url", url]) == 1
    said = capsys.readouterr().err
    assert f"{url}/: it cannot be reached" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("localhost:3000", "is not an address such as"),
        ("ftp://host", "is not an address such as"),
        ("http://", "is not an address such as"),
        ("http://host:no", "is not an address"),
        ("http://host/?orgId=1", "is not an address such as"),
        ("http://admin:hunter2@host:3000", "holds a user name or password"),
    ],
)
def test_a_wrong_address_is_a_wrong_setting(url: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as caught:
        Address.parsed(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host/", "https://host:3000/", "http://host/a/b/", "http://[::1]:3000/"])
def test_an_address_says_itself_again(url: str) -> None:
    assert str(Address.parsed(url)) == url


def test_without_a_token_nothing_is_asked(fake: FakeGrafana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli_grafana.ENV_TOKEN)
    assert main(["grafana", "push", "--url", fake.url]) == 2
    assert fake.requests == []


def test_a_data_source_needs_an_address(fake: FakeGrafana) -> None:
    assert main(["grafana", "push", "--url", fake.url, "--prometheus-url", "prometheus:9090"]) == 2
    assert fake.requests == []


def test_without_a_client_package_the_command_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grafana_push, "CLIENTS", (("no_such_module", "GrafanaApi"),))
    assert main(["grafana", "push", "--url", "http://localhost", "--token", TOKEN]) == 2
    assert "pip install 'fairserve[grafana]'" in capsys.readouterr().err
