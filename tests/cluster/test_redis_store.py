"""Redis as the place of the counters: the same promises as the file's, shared by clusters, and never in the way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from fairserve.cluster.redis_store import ENV_PASSWORD, ENV_PASSWORD_FILE, FORGET_S, RedisStore, connected
from fairserve.config import CounterConfig
from fairserve.dispatch.cut import Cut
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.store import Head, OutOfStep, Overtaken, SqliteStore, Store, Superseded
from tests.dispatch.kit import Desk
from tests.memory_store import counter_of_ann, normal, run_to_end, whole

HEAD = Head("here", incarnation=5, life=9, seq=1, saved_s=100.0)
NOW_S = 1_000_000.0
PASSWORD = "correct-horse-battery"
URL = "redis://localhost:6379/3"


def redis_store(client: Any, cluster: str = "here") -> RedisStore:
    return RedisStore(URL, "fairserve.counters", lambda: cluster, lambda: NOW_S, client)


@pytest.fixture
def fake() -> Any:
    return fakeredis.FakeRedis(decode_responses=True)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, fake: Any) -> Store:
    return SqliteStore(tmp_path / "c.sqlite") if request.param == "sqlite" else redis_store(fake)


# -- both stores ------------------------------------------------------------------------------------------------------


def test_an_empty_store_knows_nothing(store: Store) -> None:
    assert store.load() is None and store.load_document("live") is None and store.heads() == []
    assert store.load_audit(5) == [] and store.load_history(60) == [] and store.others({}) == []


def test_cuts_come_back_as_what_the_dispatcher_would_have_dumped(store: Store, desk: Desk) -> None:
    replica = desk.replica()
    desk.dispatcher.ledger._max_books = 3
    for seq in range(1, 8):
        replica.report(served={"ann": (10, 5), f"acme/x/c{seq}": (1, 2)})
        desk.replica(f"r:{seq}").report(served={"ann": (1, 0)})
        desk.dispatcher.merge_cluster("far", 7, {"ann": Totals(seq, 0, 0, float(seq))}, {}, seq)
        cut = run_to_end(desk.dispatcher.cutter.steps(is_whole=seq == 4))
        store.save(cut, replace(HEAD, seq=seq))
        found = store.load()
        assert found is not None and found[0] == replace(HEAD, seq=seq)
        assert normal(found[1]) == normal(desk.dispatcher.dump())


def test_usage_is_kept_with_the_cut_and_old_days_go(store: Store) -> None:
    today, row = 20_000, (1, 10, 4, 5, 20.0)
    assert store.load_usage(range(today - 92, today + 1)) == {}
    first = replace(whole(), usage={(today, "ann"): row, (today - 1, "bob"): row}, first_day=today - 92)
    store.save(first, HEAD)
    later = (2, 20, 4, 5, 30.0)
    store.save(Cut(is_whole=False, usage={(today, "ann"): later}, first_day=today - 92), replace(HEAD, seq=2))
    assert store.load_usage(range(today - 92, today + 1)) == {(today, "ann"): later, (today - 1, "bob"): row}
    assert store.load_usage(range(today, today + 1)) == {(today, "ann"): later}


def test_hours_of_usage_are_kept_beside_the_days_and_go_with_theirs(store: Store) -> None:
    today, row, later = 20_000, (1, 10, 4, 5, 20.0), (2, 20, 4, 5, 30.0)
    now, everything = today * 24 + 12, range((today - 6) * 24, today * 24 + 24)
    assert store.load_usage_hours(everything) == {}
    hours = {(now, "acme/ann:1"): row, (now - 1, "bob"): row, (now - 24, "bob"): row}
    store.save(replace(whole(), usage_hours=hours, first_hour=everything.start), HEAD)
    part = Cut(is_whole=False, usage_hours={(now, "acme/ann:1"): later}, first_hour=everything.start)
    store.save(part, replace(HEAD, seq=2))
    assert store.load_usage_hours(everything) == hours | {(now, "acme/ann:1"): later}
    assert store.load_usage_hours(range(now, now + 1)) == {(now, "acme/ann:1"): later}
    store.save(replace(part, first_hour=today * 24), replace(HEAD, seq=3))
    assert store.load_usage_hours(everything) == {(now, "acme/ann:1"): later, (now - 1, "bob"): row}
    assert store.load_usage(range(today - 6, today + 1)) == {}


def test_a_cut_that_is_refused_leaves_usage_as_it_was(store: Store) -> None:
    store.save(whole(), HEAD)
    with pytest.raises(OutOfStep):
        store.save(Cut(is_whole=False, usage={(20_000, "ann"): (1, 1, 0, 1, 3.0)}, first_day=19_908), HEAD)
    assert store.load_usage(range(19_908, 20_001)) == {}


def test_a_cut_that_does_not_follow_and_one_of_an_earlier_life_are_refused(store: Store) -> None:
    part = Cut(is_whole=False, nodes={"ann": (7.0, 1.0, None)})
    with pytest.raises(OutOfStep):
        store.save(part, HEAD)
    store.save(whole(1.0), HEAD)
    for head in (HEAD, replace(HEAD, seq=3), replace(HEAD, seq=2, incarnation=6)):
        with pytest.raises(OutOfStep):
            store.save(part, head)
    with pytest.raises(Superseded):
        store.save(whole(2.0), replace(HEAD, life=8, seq=2))
    assert counter_of_ann(store) == 1
    store.save(part, replace(HEAD, seq=2))
    assert counter_of_ann(store) == 7


def test_audit_log_and_history_keep_the_newest_in_order(store: Store) -> None:
    for seq in range(1, 8):
        store.save_document("live", f"text {seq}", [(seq, f"entry {seq}")], max_audit=4, version=seq)
    assert store.load_document("live") == "text 7"
    assert store.load_audit(10) == [f"entry {seq}" for seq in (4, 5, 6, 7)]
    assert store.load_audit(2) == ["entry 6", "entry 7"]
    rows = [(60, float(t), client, float(t), 1.0, None) for t in (60, 120, 180) for client in ("ann", "bob")]
    store.save_history(rows)
    store.save_history([], {60: 120.0})
    assert store.load_history(60) == rows[2:]
    assert [row[1] for row in store.load_history(60, since_s=150, max_rows=1)] == [180.0]


# -- Redis only -------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_cannot_be_read_is_renamed_and_the_next_one_kept(fake: Any) -> None:
    store = redis_store(fake)
    for damage in ("{", '{"version": 99}'):
        store.save(whole(1.0), HEAD)
        fake.set("fairserve:fairserve.counters:here:head", damage)
        with pytest.raises(ValueError, match="cannot be read"):
            store.load()
        aside = store.set_aside()
        assert fake.get(f"{aside}:head") == damage and store.load() is None
    store.save(whole(2.0), HEAD)
    fake.hset("fairserve:fairserve.counters:here:nodes", "ann", '["much",1,null]')
    with pytest.raises(ValueError, match="no row of numbers"):
        store.load()
    store.set_aside()
    fake.set("fairserve:fairserve.counters:here:nodes", "a key of another kind")
    fake.set("fairserve:fairserve.counters:here:head", HEAD.dump())
    with pytest.raises(ValueError, match="cannot be read"):
        store.load()
    store.set_aside()
    store.save(whole(3.0), HEAD)
    assert counter_of_ann(store) == 3


def test_what_another_cluster_published_is_told_once_and_in_parts(fake: Any, desk: Desk) -> None:
    here, there = redis_store(fake), redis_store(fake, "there")
    replica = desk.replica()
    for seq, served in enumerate(({"ann": (10, 5), "bob": (1, 1)}, {"bob": (1, 0)}), 1):
        replica.report(served=served)
        cut = run_to_end(desk.dispatcher.cutter.steps(is_whole=False))
        there.save(cut, replace(HEAD, cluster="there", seq=seq))
    (news,) = here.others({})
    assert (news.cluster, news.incarnation, news.seq) == ("there", 5, 2)
    assert news.totals == {"ann": Totals(10, 0, 5, 20.0), "bob": Totals(2, 0, 1, 4.0)}
    (news,) = here.others({("there", 5): 1})
    assert set(news.totals) == {"bob"}
    assert here.others({("there", 5): 2}) == [] == there.others({})


def test_a_cluster_without_a_snapshot_begins_with_the_newest_of_the_others(fake: Any) -> None:
    for cluster, saved_s in (("old", NOW_S - FORGET_S - 1), ("newest", NOW_S - 1), ("other", NOW_S - 2)):
        redis_store(fake, cluster).save(whole(saved_s), replace(HEAD, cluster=cluster, saved_s=saved_s))
    store = redis_store(fake, "mine")
    assert counter_of_ann(store) == NOW_S - 1
    store.save(whole(), replace(HEAD, cluster="mine", saved_s=NOW_S))
    assert [head.cluster for head in store.heads()] == ["mine", "newest", "other"], "the old one was dropped"
    assert not [key for key in fake.scan_iter() if ":old:" in key]


def test_the_second_of_two_clusters_that_change_the_same_is_told_so(fake: Any) -> None:
    here, there = redis_store(fake), redis_store(fake, "there")
    here.save_document("live", "mine", [(3, "x")], version=3)
    for version in (2, 3):
        with pytest.raises(Overtaken, match="version 3"):
            there.save_document("live", "theirs", [(version, "y")], version=version)
    here.save_document("live", "mine", version=3)
    there.save_document("live", "theirs", version=4)
    assert (here.load_document("live"), here.load_audit(5)) == ("theirs", ["x"])


def test_redis_that_is_away_is_an_os_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PASSWORD, PASSWORD)
    with closing(socket.socket()) as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        store = RedisStore(url, "n", lambda: "here", time.time)
        for attempt in (store.load, store.heads, lambda: store.save(whole(), HEAD), lambda: store.others({})):
            with pytest.raises(OSError, match=r"127\.0\.0\.1.* cannot be (read|written)") as failed:
                attempt()
            assert PASSWORD not in str(failed.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({ENV_PASSWORD: PASSWORD, ENV_PASSWORD_FILE: "x"}, "not both"),
        ({ENV_PASSWORD_FILE: "/nowhere/at/all"}, "/nowhere/at/all cannot be read: No such file"),
        ({ENV_PASSWORD_FILE: os.devnull}, "is empty"),
    ],
)
def test_a_password_given_wrongly_is_told_when_it_is_needed(
    environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        store = RedisStore(f"redis://127.0.0.1:{server.getsockname()[1]}", "n", lambda: "here", time.time)
        with pytest.raises(OSError, match=expected):
            store.load()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"redis://:{PASSWORD}@host/0", "FAIRSERVE_REDIS_PASSWORD"),
        ("mysql://host", "redis://"),
        ("redis:///0", "redis://HOST:PORT/DB"),
        ("redis://host/zero", "redis://HOST:PORT/DB"),
        ("redis://host:port", "redis://HOST:PORT/DB"),
        ("redis://host?ssl_ca_certs=x", "no options"),
        ("rediss://host?password=x", "no options"),
    ],
)
def test_a_wrong_url_is_told_without_its_password(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as failed:
        CounterConfig(store=url)
    assert PASSWORD not in str(failed.value)


@pytest.mark.parametrize("url", ["redis://h", "rediss://u@h:1/2?ssl_ca_certs=/ca.pem", "redis://[::1]:6379/0"])
def test_a_right_url_is_taken(url: str) -> None:
    assert CounterConfig(store=url).is_in_redis


def test_tls_and_the_user_come_from_the_url_and_every_call_has_a_time_out() -> None:
    made = connected("rediss://fair@host:7000/4?ssl_ca_certs=/ca.pem", {ENV_PASSWORD: PASSWORD})
    options = made.connection_pool.connection_kwargs
    assert made.connection_pool.connection_class is redis.SSLConnection
    assert (options["host"], options["port"], options["db"], options["ssl_ca_certs"]) == ("host", 7000, 4, "/ca.pem")
    assert options["credential_provider"].get_credentials() == ("fair", PASSWORD)
    assert options["socket_timeout"] and options["socket_connect_timeout"]
    assert PASSWORD not in repr(options) + repr(made)


# -- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A Redis with a password on a free port: its URL, and what stops and starts it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server here")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    config = (
        f"bind 127.0.0.1\nport {port}\ndir {tmp_path}\nrequirepass {PASSWORD}\nappendonly yes\nappendfsync always\n"
    )
    running: list[subprocess.Popen[bytes]] = []

    def act(what: str) -> None:
        if what == "stop":
            process = running.pop()
            process.terminate()
            process.wait(60)
            return
        process = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        running.append(process)
        assert process.stdin is not None
        process.stdin.write(config.encode())
        process.stdin.close()
        probe = redis.Redis(port=port, password=PASSWORD)
        give_up_s = time.monotonic() + 60
        while True:
            try:
                assert probe.ping()
                return
            except redis.RedisError:
                assert time.monotonic() < give_up_s and process.poll() is None

    act("start")
    yield f"redis://127.0.0.1:{port}/2", act
    for process in running:
        process.terminate()
        process.wait(30)


def test_a_real_redis_keeps_it_over_its_own_restart(
    server: tuple[str, Callable[[str], None]], desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, act = server
    store = RedisStore(url, "n", lambda: "here", time.time)
    with pytest.raises(OSError, match=r"(?i)authentication|NOAUTH"):
        store.load()
    secret = tmp_path / "password"
    secret.write_text(f"wrong-{PASSWORD}\n")
    monkeypatch.setenv(ENV_PASSWORD_FILE, str(secret))
    store = RedisStore(url, "n", lambda: "here", time.time)
    with pytest.raises(OSError, match="cannot be read") as failed:
        store.load()
    assert PASSWORD not in str(failed.value)
    secret.write_text(f"{PASSWORD}\n")  # read anew at every connection
    replica = desk.replica()
    for seq in (1, 2):
        replica.report(served={f"c{i}": (1, 1) for i in range(1_200)})
        store.save(run_to_end(desk.dispatcher.cutter.steps(is_whole=False)), replace(HEAD, seq=seq))
    store.save_document("live", "text", [(1, "x")], version=1)
    act("stop")
    act("start")
    found = store.load()
    assert found is not None and normal(found[1]) == normal(desk.dispatcher.dump())
    assert store.load_document("live") == "text"
    there = RedisStore(url, "n", lambda: "there", time.time)
    (news,) = there.others({})
    assert len(news.totals) == 1_200
