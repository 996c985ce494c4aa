"""Clusters that keep their counters in one Redis are fair together: every token counts once in each of them."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest

from fairserve.clock import VirtualClock
from fairserve.cluster import redis_store
from fairserve.cluster.counter_service import CounterService
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import NOTHING, RouterCall, StepReport, Submit, Totals
from fairserve.errors import ChangeNotKept

CLIENTS = ("ann", "bob", "acme/x/cyd")
MakeSite = Callable[..., "Site"]


class Memory:
    """Stands for Ray's own, of one cluster."""

    text: str | None = None

    def recall(self) -> str | None:
        return self.text

    def remember(self, text: str) -> None:
        self.text = text


class Site:
    """One Ray cluster: a counter actor, and the newest totals of its one replica."""

    def __init__(self, name: str, policy: str) -> None:
        self.name = name
        self.id, self.live = Memory(), Memory()
        self.id.text = name
        self.clock = VirtualClock(1_000.0)
        args = {"counter": {"store": "redis://shared/0"}, "fairness": {"policy": policy}}
        self.args = FairServeArgs.model_validate(args).model_dump_json()
        self.totals: dict[str, Totals] = {}
        self.seq = self.epoch = self.life = 0
        self.service = self.start()

    def start(self) -> CounterService:
        """The actor's next life."""
        self.life += 1
        self.service = CounterService(
            self.args, clock=self.clock, epoch=self.life, live_memory=self.live, id_memory=self.id
        )
        return self.service

    def report(self, *, is_full: bool = False, free_slots: int = 0, **served: tuple[int, int]) -> None:
        """``served``: client -> input and output tokens since the last report."""
        changed = {client.replace("_", "/"): tokens for client, tokens in served.items()}
        for client, (num_input, num_output) in changed.items():
            more = Totals(num_input, 0, num_output, num_input + 2.0 * num_output)
            self.totals[client] = self.totals.get(client, NOTHING) + more
        self.seq += 1
        names = self.totals if is_full else changed
        totals = {client: self.totals[client] for client in names}
        room = (1_000, free_slots, 1_000, 4)
        report = StepReport("r-" + self.name, 1, self.seq, self.epoch, *room, totals=totals, is_full=is_full)
        reply = self.dispatcher.report(report, self.clock.now_s())
        self.epoch = reply.epoch
        if reply.need_full:
            self.report(is_full=True)

    async def exchange(self) -> None:
        """What the actor does once a second."""
        self.clock.advance(1)
        store = self.service.main.upkeep.store
        assert store is not None
        await self.service.main.upkeep.keep(store)

    @property
    def dispatcher(self) -> Any:
        return self.service.dispatcher

    def input_of(self, client: str) -> int:
        return int(self.dispatcher.ledger.totals(client).num_input)

    def lead(self, ahead: str, behind: str) -> float:
        return float(self.dispatcher.queue.lead(ahead, behind))


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def site(server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch) -> MakeSite:
    def connected(url: str) -> Any:
        return fakeredis.FakeRedis(server=server, decode_responses=True)

    monkeypatch.setattr(redis_store, "connected", connected)
    return lambda name, policy="vtc": Site(name, policy)


async def test_what_one_cluster_serves_is_charged_in_the_other_once_and_does_not_come_back(site: MakeSite) -> None:
    east, west = site("east"), site("west")
    for each in (east, west):
        each.report(ann=(1, 0), bob=(1, 0))
    for _ in range(3):
        east.report(ann=(10, 5))
        west.report(bob=(7, 0))
        for _ in range(2):
            await east.exchange()
            await west.exchange()
            await east.exchange()
    for each in (east, west):
        assert (each.input_of("ann"), each.input_of("bob")) == (32, 23)
        assert each.lead("ann", "bob") == 3 * 20 - 3 * 7
        each.dispatcher.check()


async def test_the_least_served_over_both_clusters_goes_next(site: MakeSite) -> None:
    east, west = site("east"), site("west")
    submits = tuple(Submit(f"{client}-{i}", client, 10, 10) for i in range(3) for client in ("ann", "bob"))
    for each in (east, west):
        each.dispatcher.route(RouterCall("router", 1, 1, 0, submits), each.clock.now_s())
    east.report(ann=(500, 0))
    await east.exchange()
    await west.exchange()
    west.report(free_slots=2)
    waiting = [client for client in ("ann", "bob") for _ in range(west.dispatcher.room.num_waiting(client))]
    assert waiting == ["ann", "ann", "ann"], "two slots and the lookahead went to bob"
    assert west.dispatcher.bounds.staleness >= 500, "what came in one exchange is in the bound"


async def test_many_exchanges_with_restarts_of_both_charge_every_token_once(site: MakeSite) -> None:
    """No lifts under lcf: a lead is the difference of service, wherever it was received."""
    rng = random.Random(1)
    sites = [site("east", "lcf"), site("west", "lcf")]
    for each in sites:
        each.report(**{client.replace("/", "_"): (1, 0) for client in CLIENTS})
        await each.exchange()
    for _ in range(60):
        each = rng.choice(sites)
        act = rng.random()
        if act < 0.5:
            each.report(**{rng.choice(CLIENTS).replace("/", "_"): (rng.randrange(50), rng.randrange(9))})
        elif act < 0.85:
            await each.exchange()
        else:
            each.start()
            each.report()
    for each in (*sites, *sites):
        await each.exchange()
    served = {client: sum((each.totals[client] for each in sites), NOTHING) for client in CLIENTS}
    for each in sites:
        for client in CLIENTS:
            assert each.dispatcher.ledger.totals(client) == served[client], (each.name, client)
        assert each.lead("ann", "bob") == pytest.approx(served["ann"].service - served["bob"].service)


async def test_a_cluster_that_begins_goes_on_from_the_others_counters_and_no_token_counts_twice(site: MakeSite) -> None:
    old = site("old")
    old.report(ann=(100, 0), bob=(10, 0))
    old.dispatcher.queue.set_counter("dan", 55.0)  # lifted: no total says so
    await old.exchange()
    old.report(ann=(1, 0))
    new = site("new")
    assert (new.lead("ann", "bob"), new.lead("dan", "bob")) == (90, 45)
    for _ in range(2):
        await old.exchange()
        await new.exchange()
    assert new.lead("ann", "bob") == 91 and new.input_of("ann") == 101
    new.report(bob=(5, 0))
    await new.exchange()
    await old.exchange()
    assert old.lead("ann", "bob") == new.lead("ann", "bob") == 86
    for each in (old, new):
        each.start()
        each.report()
        await each.exchange()
        assert (each.lead("ann", "bob"), each.input_of("bob")) == (86, 15), each.name
    new.report(bob=(1, 0))  # the old cluster is gone: what it served stays
    await new.exchange()
    assert new.input_of("ann") == 101 and new.lead("ann", "bob") == 85


async def test_a_chain_of_upgrades_keeps_all_tokens(site: MakeSite) -> None:
    for i in range(4):
        each = site(f"cluster-{i}")
        each.report(ann=(10, 0), bob=(1, 0))
        await each.exchange()
        await each.exchange()
        assert (each.input_of("ann"), each.lead("ann", "bob")) == (10 * (i + 1), 9 * (i + 1))


async def test_a_cluster_that_lost_its_snapshot_is_not_charged_again_by_the_other(
    site: MakeSite, server: fakeredis.FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    east, west = site("east"), site("west")
    for each in (east, west):
        each.report(ann=(100, 0), bob=(10, 0))
        await each.exchange()
    await west.exchange()
    client = fakeredis.FakeRedis(server=server, decode_responses=True)
    client.set("fairserve:fairserve.fairserve-counters:east:head", "{")
    with caplog.at_level(logging.ERROR):
        east.start()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "counters begin level" in caplog.text and "set aside as" in caplog.text
    assert "set aside as" in east.dispatcher.events.newest(1)[0].text
    east.report()
    for _ in range(2):
        await east.exchange()
        await west.exchange()
    assert west.input_of("ann") == 200 and west.lead("ann", "bob") == 180, "neither charged again nor given back"
    assert east.lead("ann", "bob") == 0, "level, whatever was before"
    east.report(ann=(3, 0))
    await east.exchange()
    await west.exchange()
    assert (west.input_of("ann"), west.lead("ann", "bob"), east.lead("ann", "bob")) == (203, 183, 3)


async def test_live_changes_of_one_cluster_hold_in_the_other_and_the_newest_wins(site: MakeSite) -> None:
    east, west = site("east"), site("west")
    await east.service.set_client("ann", {"weight": 3.0}, "op")
    await east.exchange()
    await west.exchange()
    assert west.dispatcher.queue.table.weight("ann") == 3.0
    await west.service.set_client("ann", {"weight": None, "is_paused": True}, "op2")
    digest = "ab" * 32
    await west.service.add_key({"client": "bob", "key_sha256": digest}, "op2")
    await west.service.set_settings({"fairness.policy": "lcf"}, "op2")
    for each in (west, east):
        await each.exchange()
    assert east.dispatcher.controls.of("ann").is_paused and east.dispatcher.queue.table.weight("ann") == 1.0
    assert (await east.service.key_directory(-1))["keys"][0]["key_sha256"] == digest  # type: ignore[index]
    assert east.dispatcher.queue.policy.name == "lcf"
    assert [entry["who"] for entry in await east.service.audit()] == ["op2", "op2", "op2", "op"]
    assert json.loads(east.live.text or "")["version"] == 4, "and outlives a restart without Redis"


async def test_two_changes_at_the_same_moment_one_is_told_to_try_again(site: MakeSite) -> None:
    east, west = site("east"), site("west")
    await east.service.set_client("ann", {"weight": 3.0}, "op")
    with pytest.raises(ChangeNotKept, match="another cluster changed something at the same moment"):
        await west.service.set_client("ann", {"weight": 5.0}, "op2")
    await west.exchange()
    await west.service.set_client("ann", {"weight": 5.0}, "op2")
    await east.exchange()
    assert east.dispatcher.queue.table.weight("ann") == 5.0


async def test_redis_away_is_told_once_serving_goes_on_and_all_is_kept_when_it_is_back(
    site: MakeSite, server: fakeredis.FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    east, west = site("east"), site("west")
    east.report(ann=(10, 0), bob=(10, 0))
    for each in (east, west):
        await each.exchange()
    server.connected = False
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            east.report(ann=(1, 0))
            await east.exchange()
        assert [record.message.split(",")[0] for record in caplog.records] == [
            "nothing is saved in redis://shared:6379/0 (fairserve:fairserve.fairserve-counters) for now"
        ]
        caplog.clear()
        server.connected = True
        for _ in range(12):
            await east.exchange()
        assert [record.message.partition(" in ")[0] for record in caplog.records] == ["saved again"]
    await west.exchange()
    assert west.input_of("ann") == 30
    east.start()
    assert east.input_of("ann") == 30 and east.lead("ann", "bob") == 20


async def test_redis_away_at_the_start_stops_nobody(
    site: MakeSite, server: fakeredis.FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.connected = False
    east = site("east")
    assert "counters begin level" in caplog.text
    east.report(ann=(10, 0))
    await east.exchange()
    server.connected = True
    for _ in range(12):
        await east.exchange()
    assert site("west").input_of("ann") == 10
