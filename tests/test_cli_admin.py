"""The commands for a running service: what they ask, print and refuse. The counter actor plays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fairserve import cli, cli_admin, cli_tables, client, views
from fairserve.client import Connection
from fairserve.errors import CounterUnreachable
from tests.api.fake_counter import FakeCounter
from tests.client_kit import FakeDoor

Capture = pytest.CaptureFixture[str]


class Desk:
    """Stands in for ``fairserve.connect``: notes with what it was called, and gives a door to a FakeCounter."""

    def __init__(self) -> None:
        self.counter = FakeCounter(12)
        self.asked: dict[str, Any] = {}
        self.doors: list[FakeDoor] = []

    def connect(self, address: str | None, **options: Any) -> Connection:
        self.asked = {"address": address} | options
        self.doors.append(FakeDoor(self.counter, who=options["who"]))
        return Connection(self.doors[-1])


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    desk = Desk()
    monkeypatch.setattr(client, "connect", desk.connect)
    monkeypatch.delenv("FAIRSERVE_URL", raising=False)
    yield desk
    assert all(door.is_closed for door in desk.doors)


def run(*words: str) -> int:
    return cli.main(list(words))


LISTS: list[tuple[tuple[str, ...], Any, str]] = [
    (("clients", "list"), tuple[views.ClientView, ...], "acme/research/ann"),
    (("clients", "list", "--order", "name", "--search", "acme", "--limit", "2"), tuple[views.ClientView, ...], "bob"),
    (("clients", "show", "acme/sales/eve"), views.ClientView, "acme/sales/eve"),
    (("replicas",), tuple[views.ReplicaView, ...], "stale"),
    (("counters",), tuple[views.CounterView, ...], "greedy"),
    (("settings", "list"), tuple[views.SettingView, ...], "fairness.quantum"),
    (("events", "--after", "3"), tuple[views.EventView, ...], "was raised to the level"),
    (("top", "--once", "--top", "4"), views.Overview, "other"),
]


@pytest.mark.parametrize(("words", "kind", "shown"), LISTS, ids=[" ".join(words) for words, _, _ in LISTS])
def test_every_question_prints_a_table_or_json(
    desk: Desk, capsys: Capture, words: tuple[str, ...], kind: Any, shown: str
) -> None:
    assert run(*words) == 0
    table = capsys.readouterr().out
    assert shown in table
    assert "\x1b" not in table, "no colours in a pipe"
    assert run(*words, "--json") == 0
    assert TypeAdapter(kind).validate_python(json.loads(capsys.readouterr().out))


def test_the_first_screen_of_top_says_whether_it_is_fair(desk: Desk, capsys: Capture) -> None:
    assert run("top", "--once", "--search", "acme") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fair: the widest gap is")
    assert "Jain" in lines[1] and "tokens/s" in lines[1]
    assert any(line.startswith("acme/research/ann") for line in lines)
    assert not any(line.startswith("greedy") for line in lines)


@pytest.mark.parametrize("words", [("top",), ("top", "--json")])
def test_top_in_a_pipe_goes_on_until_it_is_stopped(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    waits = iter([None, None])

    def wait() -> None:
        if next(waits, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_admin, "_wait", wait)
    assert run(*words) == 1
    out = capsys.readouterr().out
    if "--json" in words:
        assert len([views.Overview.model_validate_json(line) for line in out.splitlines()]) == 3
    else:
        assert out.count("fair: the widest gap is") == 3


def test_top_in_a_terminal_outlives_an_actor_that_restarts(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter([CounterUnreachable("the actor is away"), None])

    def wait() -> None:
        turn = next(turns, KeyboardInterrupt())
        if isinstance(turn, KeyboardInterrupt):
            raise turn
        desk.counter.failure = turn

    monkeypatch.setattr(cli_admin, "_wait", wait)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    run("top")
    out = capsys.readouterr().out
    assert "the actor is away" in out
    assert out.index("the actor is away") < out.rindex("fair: the widest gap is")


def test_a_weight_is_set_and_taken_back(desk: Desk, capsys: Capture) -> None:
    assert run("clients", "set-weight", "greedy", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weight"] == 4
    assert run("clients", "set-weight", "greedy", "default", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weight"] == 1


def test_pause_and_resume_show_in_the_table(desk: Desk, capsys: Capture) -> None:
    assert run("clients", "pause", "greedy") == 0
    assert "paused" in capsys.readouterr().out
    assert run("clients", "resume", "greedy") == 0
    assert "paused" not in capsys.readouterr().out


def test_a_limit_that_is_not_named_stays(desk: Desk, capsys: Capture) -> None:
    assert run("clients", "limits", "zoe", "--max-waiting", "9", "--requests-per-min", "60") == 0
    assert "waiting <= 9, 60 a minute" in capsys.readouterr().out
    assert run("clients", "limits", "zoe", "--max-waiting", "default") == 0
    out = capsys.readouterr().out
    assert "60 a minute" in out and "waiting <=" not in out


def test_settings_are_set_and_reset(desk: Desk, capsys: Capture) -> None:
    assert run("settings", "set", "fairness.quantum=750", "fairness.policy=drr") == 0
    out = capsys.readouterr().out
    assert "750" in out and "drr" in out and "set live" in out
    assert run("settings", "reset", "fairness.quantum", "fairness.policy") == 0
    assert "set live" not in capsys.readouterr().out


def test_a_key_is_made_shown_once_and_revoked(desk: Desk, capsys: Capture) -> None:
    assert run("keys", "create", "bob", "--weight", "2", "--application", "chat", "--application", "agent") == 0
    out = capsys.readouterr().out
    secret, key_id = out.split()[7], out.split()[10]
    assert secret.startswith("fs-") and out.count(secret) == 1
    assert run("keys", "list") == 0
    listed = capsys.readouterr().out
    assert key_id in listed and "chat agent" in listed and secret not in listed
    assert run("keys", "revoke", key_id) == 0
    capsys.readouterr()
    assert run("keys", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_what_was_done_stands_in_the_audit_log_under_the_users_name(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    run("clients", "set-weight", "zoe", "4")
    capsys.readouterr()
    assert run("audit", "--limit", "1") == 0
    out = capsys.readouterr().out
    assert "cli:ann" in out and "zoe" in out and "weight=4.0" in out


def test_the_service_is_named_by_url_or_by_ray(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("replicas") == 0
    assert (desk.asked["address"], desk.asked["name"]) == (None, "fairserve-counters")
    run("replicas", "--address", "10.0.0.1:6379", "--name", "counters-b", "--namespace", "prod")
    assert (desk.asked["address"], desk.asked["name"], desk.asked["namespace"]) == (
        "10.0.0.1:6379",
        "counters-b",
        "prod",
    )
    run("replicas", "--url", "http://h:8000", "--admin-key", "k", "--timeout", "2")
    assert (desk.asked["address"], desk.asked["admin_key"], desk.asked["timeout_s"]) == ("http://h:8000", "k", 2)
    monkeypatch.setenv("FAIRSERVE_URL", "http://env:8000")
    run("replicas")
    assert desk.asked["address"] == "http://env:8000"
    run("replicas", "--address", "auto")
    assert desk.asked["address"] == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("clients", "set-weight", "zoe", "0"), "weight: Input should be greater than 0"),
        (("clients", "limits", "zoe"), "name a limit: --max-waiting N or --requests-per-min N"),
        (("settings", "set", "fairness.quantum"), "is not key=value"),
        (("settings", "set", "engine.seed=3"), "these can: fairness.policy"),
        (("keys", "create", "a/b/c/d"), "client: "),
        (("replicas", "--url", "h:8000"), "must begin with http://"),
        (("replicas", "--url", "http://h:8000", "--address", "auto"), "not both"),
    ],
)
def test_a_wrong_value_exits_2_with_one_line(desk: Desk, capsys: Capture, words: tuple[str, ...], message: str) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "words",
    [("clients",), ("clients", "set-weight", "zoe", "heavy"), ("clients", "list", "--order", "size"), ("keys",)],
)
def test_a_wrong_command_exits_2_with_one_line(desk: Desk, capsys: Capture, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [("clients", "show", "nobody"), ("keys", "revoke", "abcdef")])
def test_what_is_not_there_exits_1(desk: Desk, capsys: Capture, words: tuple[str, ...]) -> None:
    assert run(*words) == 1
    assert capsys.readouterr().err.startswith("fairserve: no ")


def test_a_service_that_does_not_answer_exits_1(desk: Desk, capsys: Capture) -> None:
    desk.counter.failure = CounterUnreachable("the counter actor did not answer")
    assert run("top", "--once") == 1
    assert capsys.readouterr().err == "fairserve: the counter actor did not answer\n"


def test_the_help_tells_the_two_kinds_of_keys_apart(capsys: Capture) -> None:
    for words, said in (
        (("keys", "new", "-h"), "keys create"),
        (("keys", "create", "-h"), "keys new"),
    ):
        with pytest.raises(SystemExit):
            run(*words)
        assert said in capsys.readouterr().out


def test_usage_is_exported_as_csv_or_json(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = ("--from", "2026-11-20", "--to", "2026-11-21")
    assert run("usage", "export", *days) == 0
    heading, first, *_ = capsys.readouterr().out.splitlines()
    assert heading.startswith("client,period_start,requests,input_tokens")
    assert first == "acme/research/ann,2026-11-20T00:00:00Z,3,100,40,50,200.0,fake"
    file = tmp_path / "usage.json"
    assert run("usage", "export", str(file), "--format", "json", *days) == 0
    assert json.loads(file.read_text())[0]["client"] == "acme/research/ann"
    assert run("usage", "export", "--by", "hour", *days) == 0
    assert "\nacme/research/ann,2026-11-21T23:00:00Z,3,100,40" in capsys.readouterr().out
    assert run("usage", "export", "--from", "2026-11-22", "--to", "2026-11-20") == 2
    assert "--to 2026-11-20 lies before --from 2026-11-22" in capsys.readouterr().err


def test_of_several_clients_the_budget_is_shown_that_is_passed_or_nearest_to_it() -> None:
    def view(name: str, *budgets: tuple[str, int, int | None, int | None]) -> views.ClientView:
        rows = [
            {"of": name, "window": window, "used": used, "soft": soft, "hard": hard, "promised": 0, "resets_s": 0}
            for window, used, soft, hard in budgets
        ]
        zeros = {field: 0 for field, about in views.ClientView.model_fields.items() if about.is_required()}
        return views.ClientView.model_validate(zeros | {"name": name, "budgets": rows})

    told_of = [
        view("ann", ("day", 30, None, 100), ("month", 900, None, 1_000)),
        view("bob", ("minute", 99, None, 100), ("day", 80, 80, 1_000)),
        view("eve", ("day", 81, 80, 1_000), ("month", 1_000, None, 1_000)),
        view("zoe"),
    ]
    told = [cli_tables.limits(one, is_alone=False) for one in told_of]
    assert told == ["90% of month (ann)", "past the soft day (bob)", "spent the month (eve)", ""]
    assert cli_tables.limits(told_of[0], is_alone=True).startswith("30 of 100 tokens a day (ann), 900 of 1,000")


def test_budgets_are_set_word_by_word(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clients", "budgets", "zoe", "day.soft=800", "day.hard=1000", "month.hard=20000") == 0
    assert desk.counter.rows["zoe"].live["budgets"] == {"day": {"soft": 800, "hard": 1000}, "month": {"hard": 20000}}
    assert "5 of 800 (soft) and 1,000 tokens a day" in " ".join(capsys.readouterr().out.split())
    assert run("clients", "budgets", "zoe", "default") == 0
    assert "budgets" not in desk.counter.rows["zoe"].live
    assert run("clients", "budgets", "zoe", "day.hard=few") == 2
    assert "day.hard" in capsys.readouterr().err
