"""Changes at the desk: what is refused, what follows, what the audit log says. And that they are not forgotten."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fairserve import views
from fairserve.cluster.desk import MAX_AUDIT, Change, Desk
from fairserve.cluster.keeper import Keeper, store_of
from fairserve.cluster.live_settings import LIVE_PATHS
from fairserve.cluster.live_state import State, newest
from fairserve.config import ApiKey, CounterConfig, FairServeArgs, key_digest
from fairserve.dispatch.controls import Control
from fairserve.dispatch.store import SqliteStore
from fairserve.errors import ChangeNotKept, InvalidRequest, UnknownKey


class Wall:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def desk(wall: Wall) -> Desk:
    return Desk(FairServeArgs(), wall)


def made(desk: Desk, change: Change) -> Any:
    desk.adopt(change)
    return change.answer


def entry(client: str = "ann", secret: str = "", **more: Any) -> dict[str, Any]:
    return {"client": client, "key_sha256": key_digest(secret or f"fs-{client}"), **more}


# -- clients -----------------------------------------------------------------------------------------------------------


def test_a_planned_change_is_not_in_force_until_it_is_adopted(desk: Desk) -> None:
    change = desk.plan_client("ann", {"weight": 4}, "root")
    assert desk.control("ann") == Control() and desk.audit() == []
    assert made(desk, change) == desk.control("ann") == Control(weight=4.0)


def test_null_takes_a_live_value_back_and_the_audit_log_says_from_what_to_what(desk: Desk, wall: Wall) -> None:
    made(desk, desk.plan_client("ann", {"weight": 4, "is_paused": True}, "root"))
    wall.now_s = 1_001.0
    made(desk, desk.plan_client("ann", {"weight": None, "is_paused": None}, "cli:eve"))
    assert desk.state.controls == {}
    last, first = desk.audit()
    assert views.AuditView.model_validate(last) == views.AuditView(
        seq=2,
        time_s=1_001.0,
        who="cli:eve",
        action="client",
        target="ann",
        before={"weight": 4.0, "is_paused": True},
        after={"weight": None, "is_paused": False},
    )
    assert first["before"] == {"weight": None, "is_paused": False}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "nothing to change"),
        ({"weight": 0}, "weight: Input should be greater than 0"),
        ({"weight": float("nan")}, "weight"),
        ({"max_waiting": 1.5}, "max_waiting"),
        ({"requests_per_min": -1}, "requests_per_min"),
        ({"is_paused": "perhaps"}, "is_paused"),
        ({"wieght": 3}, "no field 'wieght'; known: weight, is_paused"),
    ],
)
def test_a_wrong_change_says_what_is_wrong(desk: Desk, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        desk.plan_client("ann", change, "root")


@pytest.mark.parametrize("name", ["", "a b", "a/b/c/d", "/ann", "ann/", "ann\n"])
def test_there_is_no_client_of_such_a_name(desk: Desk, name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be a client"):
        desk.plan_client(name, {"weight": 1}, "root")


def test_a_client_that_is_not_known_must_fit_into_the_tree(desk: Desk) -> None:
    nodes = {"acme/", "acme/ann", "solo"}.__contains__
    desk.plan_client("acme/bob", {"weight": 2}, "root", nodes)
    for name in ("acme", "solo/x", "acme/ann/x"):
        with pytest.raises(InvalidRequest, match=r"above|below"):
            desk.plan_client(name, {"weight": 2}, "root", nodes)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_live_setting_lies_over_the_deployments_and_survives_a_new_deployment(desk: Desk) -> None:
    paths = made(desk, desk.plan_settings({"fairness.quantum": 50, "fairness.policy": "drr"}, "root"))
    assert desk.in_force.fairness.quantum == 50.0
    rows = [views.SettingView.model_validate(row) for row in desk.settings(paths)]
    assert [(row.path, row.value, row.deployed, row.is_live) for row in rows] == [
        ("fairness.quantum", 50.0, 500.0, True),
        ("fairness.policy", "drr", "vtc", True),
    ]
    desk.deploy(FairServeArgs.model_validate({"fairness": {"policy": "lcf", "locality_window": 4}}))
    assert (desk.in_force.fairness.policy, desk.in_force.fairness.locality_window) == ("drr", 4)
    made(desk, desk.plan_settings({"fairness.policy": None}, "root"))
    assert desk.in_force.fairness.policy == "lcf"
    assert desk.audit()[0]["before"] == {"fairness.policy": "drr"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "nothing to change"),
        ({"fairness.quantm": 3}, "did you mean 'fairness.quantum'"),
        ({"fairness.cost.input_weight": 3}, "cannot be changed live"),
        ({"counter.name": "x"}, "cannot be changed live"),
        ({"fairness.quantum": "many"}, "fairness.quantum: "),
        ({"dispatch.lookahead": -1}, "dispatch.lookahead: "),
        ({"fairness.policy": "best"}, "fairness.policy: .*'vtc'"),
        ({"fairness.throttle.leave_wait_s": 9}, "must be below enter_wait_s"),
        ({"fairness.group_weights": {"acme": {1, 2}}}, "plain JSON"),
    ],
)
def test_a_setting_is_checked_with_all_the_others(desk: Desk, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        desk.plan_settings(change, "root")


def test_every_setting_that_is_listed_can_be_set_to_what_it_is(desk: Desk) -> None:
    rows = {row["path"]: row["value"] for row in desk.settings() if row["value"] is not None}
    made(desk, desk.plan_settings(rows, "root"))
    assert desk.in_force == FairServeArgs()
    assert {"fairness.policy", "fairness.throttle.hold_s", "dispatch.max_waiting"} <= set(LIVE_PATHS)
    assert not any(path.startswith("fairness.cost") for path in LIVE_PATHS)


def test_a_live_value_that_a_new_deployment_makes_wrong_has_no_effect_and_is_told(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    made(desk, desk.plan_settings({"fairness.throttle.leave_wait_s": 1.5, "fairness.quantum": 9}, "root"))
    with caplog.at_level(logging.ERROR):
        desk.deploy(FairServeArgs.model_validate({"fairness": {"throttle": {"enter_wait_s": 1.0}}}))
    assert (desk.in_force.fairness.throttle.leave_wait_s, desk.in_force.fairness.quantum) == (0.5, 9.0)
    assert "fairness.throttle.leave_wait_s" in caplog.text


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_without_its_secret_and_its_digest(desk: Desk) -> None:
    view = views.KeyView.model_validate(made(desk, desk.plan_key(entry(weight=2.0, applications=["chat"]), "root")))
    digest = key_digest("fs-ann")
    assert view == views.KeyView(
        id=digest[:12], client="ann", weight=2.0, applications=("chat",), source="live", created_s=1_000.0
    )
    assert desk.keys() == [view.model_dump(mode="json")]
    assert digest not in json.dumps(desk.audit()) and digest not in json.dumps(desk.keys())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (entry(), "exists already, for client 'ann'"),
        (entry(secret="fs-other", weight=2.0), "its keys must agree"),
        (entry(secret="fs-other", max_waiting=2), "its keys must agree"),
        (entry("ann/x"), "'ann' would stand above"),
        (entry("org"), "clients below 'org'"),
        ({"client": "bob", "key": "fs-in-clear"}, "send key_sha256"),
        ({"client": "bob"}, "exactly one"),
        (entry("a b"), "client: "),
        (entry("bob", weight=-1), "weight: "),
        (entry("bob", wieght=1), "no field of the given name: did you mean 'weight'"),
    ],
)
def test_a_key_that_contradicts_what_is_there_is_refused(desk: Desk, wrong: dict[str, Any], says: str) -> None:
    made(desk, desk.plan_key(entry(), "root"))
    made(desk, desk.plan_key(entry("org/eve"), "root"))
    with pytest.raises(InvalidRequest, match=says) as refused:
        desk.plan_key(wrong, "root")
    assert "fs-in-clear" not in str(refused.value)


def test_a_key_is_revoked_by_the_beginning_of_its_digest_if_that_is_one_key(desk: Desk) -> None:
    for number in range(40):
        made(desk, desk.plan_key(entry(f"c{number}"), "root"))
    with pytest.raises(UnknownKey):
        desk.plan_revoke("zz", "root")
    with pytest.raises(UnknownKey):
        desk.plan_revoke("", "root")
    digits = [key["id"][0] for key in desk.keys()]  # noqa: SIM118 (no mapping)
    first = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(InvalidRequest, match="give more digits"):
        desk.plan_revoke(first, "root")
    view = made(desk, desk.plan_revoke(key_digest("fs-c7")[:12].upper(), "root"))
    assert view["client"] == "c7" and len(desk.keys()) == 39


def test_an_ingress_is_told_the_keys_once_per_version(desk: Desk, wall: Wall) -> None:
    assert desk.key_directory(0) is None
    assert desk.key_directory(-1) == {"version": 0, "keys": []}
    made(desk, desk.plan_key(entry(), "root"))
    directory = desk.key_directory(0)
    assert directory is not None and desk.key_directory(directory["version"]) is None
    assert [ApiKey(**one).client for one in directory["keys"]] == ["ann"]
    made(desk, desk.plan_client("ann", {"weight": 2}, "root"))
    assert desk.key_directory(directory["version"]) is None, "no key changed"
    made(desk, desk.plan_revoke(key_digest("fs-ann"), "root"))
    revoked = desk.key_directory(directory["version"])
    assert revoked is not None and revoked["keys"] == [] and revoked["version"] > directory["version"] > 0


# -- the audit log -----------------------------------------------------------------------------------------------------


def test_the_audit_log_is_paged_newest_first_and_bounded(desk: Desk) -> None:
    for number in range(12):
        made(desk, desk.plan_client("ann", {"max_waiting": number + 1}, "x" * 999))
    assert [one["seq"] for one in desk.audit(limit=3)] == [12, 11, 10]
    assert [one["seq"] for one in desk.audit(before_seq=4)] == [3, 2, 1]
    assert len(desk.audit()[0]["who"]) == 128
    assert desk._audit.maxlen == MAX_AUDIT


# -- keeping -----------------------------------------------------------------------------------------------------------


class Memory:
    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.is_broken = False

    def recall(self) -> str | None:
        return self.text

    def remember(self, text: str) -> None:
        if self.is_broken:
            raise RuntimeError("no GCS")
        self.text = text


def busy(desk: Desk) -> State:
    made(desk, desk.plan_client("ann", {"weight": 4, "is_paused": True, "requests_per_min": 9}, "root"))
    made(desk, desk.plan_settings({"fairness.quantum": 50}, "root"))
    made(desk, desk.plan_key(entry(max_waiting=7, applications=["chat"]), "root"))
    return desk.state


def test_a_state_comes_back_from_its_document_unchanged(desk: Desk) -> None:
    state = busy(desk)
    assert State.load(state.dump()) == state
    assert "fs-ann" not in state.dump()


def test_the_newest_copy_wins_and_one_that_cannot_be_read_is_left_out(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = busy(desk), made(desk, desk.plan_client("bob", {"weight": 2}, "root")) and desk.state
    with caplog.at_level(logging.ERROR):
        assert newest([old.dump(), new.dump(), "{", "[]", json.dumps({"format": 99})]) == new
    assert caplog.text.count("cannot be read") == 3
    assert newest([]) == State()


def test_a_change_is_in_the_file_and_in_memory_when_it_is_kept_and_either_is_enough(desk: Desk, tmp_path: Path) -> None:
    memory, path = Memory(), tmp_path / "c.sqlite"
    change = desk.plan_client("ann", {"weight": 4}, "root")
    Keeper(SqliteStore(path), memory).keep(change)
    for keeper in (Keeper(SqliteStore(path), None), Keeper(None, memory)):
        assert keeper.begin()[0] == change.state
    assert Keeper(SqliteStore(path), None).begin()[1] == [change.entry]


def test_the_copy_that_is_behind_is_brought_up_to_date(desk: Desk, tmp_path: Path) -> None:
    """The actor landed on another node, where an old file lies."""
    store, memory = SqliteStore(tmp_path / "c.sqlite"), Memory()
    Keeper(store, None).keep(desk.plan_client("ann", {"weight": 4}, "root"))
    memory.text = busy(desk).dump()
    state, audit = Keeper(store, memory).begin()
    assert state == desk.state and [one["seq"] for one in audit] == [1]
    assert store.load_document("live") == state.dump()


def test_a_file_that_cannot_be_read_is_set_aside_and_memory_fills_the_new_one(
    desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"not a database at all, but long enough to look at")
    state = busy(desk)
    with caplog.at_level(logging.ERROR):
        assert Keeper(SqliteStore(path), Memory(state.dump())).begin()[0] == state
    assert "set aside as" in caplog.text and (tmp_path / "c.sqlite.unreadable").exists()
    assert Keeper(SqliteStore(path), None).begin()[0] == state


def test_a_change_that_is_kept_nowhere_is_an_error_and_one_that_is_kept_somewhere_is_not(
    desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    memory, blocked = Memory(), SqliteStore(tmp_path / "file" / "c.sqlite")
    change = desk.plan_client("ann", {"weight": 4}, "root")
    Keeper(blocked, memory).keep(change)
    memory.is_broken = True
    Keeper(SqliteStore(tmp_path / "c.sqlite"), memory).keep(change)
    with pytest.raises(ChangeNotKept, match=r"c\.sqlite.*no GCS"):
        Keeper(blocked, memory).keep(change)
    Keeper(None, None).keep(change)  # nothing is there to keep it: so it was wanted


def test_the_session_store_lies_in_the_session_folder_under_the_actors_name(tmp_path: Path) -> None:
    config = CounterConfig(name="a/b", namespace="n")
    store = store_of(config, lambda: str(tmp_path))
    assert store is not None and store.path == tmp_path / "fairserve" / "n.a%2Fb.sqlite"
    assert store_of(config) is None, "there is no session outside of Ray"
    assert store_of(CounterConfig(store=None), lambda: "x") is None
    path = store_of(CounterConfig(store="~/c.sqlite"))
    assert path is not None and path.path == Path("~/c.sqlite").expanduser()
