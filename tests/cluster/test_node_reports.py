"""Reports of a node's replicas in one call: who goes which way, and that every token counts once. No Ray."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fairserve.clock import SystemClock, VirtualClock
from fairserve.cluster import node_reports
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.node_reports import (
    ALONE_S,
    BACK_OFF_S,
    GATHERING_S,
    IDLE_S,
    REMEMBERED_S,
    NodeReports,
    NodeTransport,
    way_of_reports,
)
from fairserve.cluster.replica import ReplicaCore
from fairserve.config import CounterConfig, FairServeArgs
from fairserve.dispatch.messages import ReportReply, StepReport, Totals
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest
from fairserve.errors import CounterUnreachable
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.cluster.scripted import ScriptedLoop, Wire, until

CONFIG = CounterConfig(call_timeout_s=0.4, poll_s=0.05, heartbeat_s=0.05)
ARGS = FairServeArgs.model_validate({"counter": CONFIG.model_dump() | {"store": None}})


def report(seq: int, replica: str = "a", num_output: int = 0) -> StepReport:
    totals = {"ann": Totals(10, 0, num_output, 10.0 + 2 * num_output)} if num_output else {}
    return StepReport(replica, 1, seq, 0, 1000, 4, 1000, 4, totals)


@dataclass
class Node:
    """The node's actor as Ray's handle to it; may be gone, or hang. What travels is pickled, as Ray would."""

    reports: NodeReports
    is_gone: bool = False
    hangs: bool = False
    num_calls: int = 0
    num_found: int = 0

    def find(self) -> Any:
        self.num_found += 1
        if self.is_gone:
            raise ConnectionError("no such actor")
        return self

    @property
    def report(self) -> Any:
        return type("Method", (), {"remote": staticmethod(self._report)})

    async def _report(self, one: StepReport) -> Any:
        self.num_calls += 1
        if self.is_gone:
            raise ConnectionError("gone")
        if self.hangs:
            await asyncio.Event().wait()
        return pickle.loads(pickle.dumps(await self.reports.report(pickle.loads(pickle.dumps(one)))))


@dataclass
class Actor:
    """The counter actor behind two ways: one call with many reports, and one for each."""

    service: CounterService
    straight: Wire = field(init=False)
    batches: list[tuple[StepReport, ...]] = field(default_factory=list)
    is_cut: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.straight = Wire(self.service)
        self.gate.set()

    async def send(self, reports: tuple[StepReport, ...]) -> tuple[ReportReply, ...]:
        self.batches.append(reports)
        await self.gate.wait()
        if self.is_cut:
            raise ConnectionError("cut")
        return await self.service.reports(reports)

    def output_of(self, client: str = "ann") -> int:
        return self.service.dispatcher.ledger.totals(client).num_output


@pytest.fixture
def actor() -> Actor:
    return Actor(CounterService(ARGS.model_dump_json()))


@pytest.fixture
def node(actor: Actor) -> Node:
    return Node(NodeReports(CONFIG.model_dump_json(), send=actor.send))


async def way(actor: Actor, node: Node, clock: Any = None) -> NodeTransport:
    """Of one replica, which has found its node's actor."""
    transport = NodeTransport(actor.straight, node.find, 0.2, clock or SystemClock())
    await transport._look()
    return transport


async def test_what_comes_while_a_call_is_out_goes_together_in_the_next_one(actor: Actor, node: Node) -> None:
    actor.gate.clear()
    first = asyncio.ensure_future(node.reports.report(report(1, "a", 3)))
    await until(lambda: len(actor.batches) == 1)
    others = [asyncio.ensure_future(node.reports.report(report(seq, name, 5))) for seq, name in enumerate("bcd", 2)]
    await asyncio.sleep(0)
    actor.gate.set()
    replies = await asyncio.gather(first, *others)
    assert [[one.replica for one in batch] for batch in actor.batches] == [["a"], ["b", "c", "d"]]
    assert [reply.ack for reply, _ in replies] == [1, 2, 3, 4], "each gets its own"
    assert [is_alone for _, is_alone in replies] == [False] * 4
    assert actor.output_of() == 3 + 3 * 5
    assert replies[3][0].counters == {"ann": actor.service.dispatcher.queue.counter("ann")}


async def test_reports_that_come_soon_after_a_call_wait_for_one_another(actor: Actor, node: Node) -> None:
    await node.reports.report(report(1, "a"))
    second = asyncio.ensure_future(node.reports.report(report(1, "b")))
    await asyncio.sleep(0)
    third = asyncio.ensure_future(node.reports.report(report(1, "c")))
    await asyncio.gather(second, third)
    assert [[one.replica for one in batch] for batch in actor.batches] == [["a"], ["b", "c"]]


async def test_each_replica_of_a_call_is_told_the_settings_in_force() -> None:
    service = CounterService(ARGS.model_dump_json())
    replies = await service.reports((report(1, "a"), report(1, "b")))
    assert [reply.fairness for reply in replies] == [ARGS.fairness.model_dump_json()] * 2
    (again,) = await service.reports((replace(report(2, "a"), epoch=replies[0].epoch),))
    assert again.fairness == ""


async def test_a_report_that_goes_both_ways_counts_once(actor: Actor, node: Node) -> None:
    actor.gate.clear()
    transport = await way(actor, node)
    reply = await transport.report(report(1, num_output=7))  # by way of the node it takes too long
    assert reply.ack == 1 and len(actor.straight.reports) == 1
    assert actor.output_of() == 7
    assert (await transport.report(report(2, num_output=9))).ack == 2
    actor.gate.set()
    await until(
        lambda: not node.reports._waiting and node.reports._sending is not None and node.reports._sending.done()
    )
    assert (await transport.report(report(3, num_output=9))).ack == 3
    assert actor.output_of() == 9


@pytest.mark.parametrize("fault", ["is_gone", "hangs"])
async def test_a_node_actor_that_is_gone_or_hangs_costs_nobody_a_report(actor: Actor, node: Node, fault: str) -> None:
    clock = VirtualClock()
    await node.reports.report(report(1, "b", 1))
    transport = await way(actor, node, clock)
    assert (await transport.report(report(1, num_output=1))).ack == 1
    assert not actor.straight.reports
    setattr(node, fault, True)
    assert (await transport.report(report(2, num_output=4))).ack == 2
    assert [one.seq for one in actor.straight.reports] == [2]
    num_calls = node.num_calls
    assert (await transport.report(report(3, num_output=6))).ack == 3
    assert node.num_calls == num_calls, "it is left alone for a while"
    assert actor.output_of() == 6 + 1
    setattr(node, fault, False)
    clock.advance(BACK_OFF_S)
    assert (await transport.report(report(4, num_output=8))).ack == 4  # it looks for the actor beside
    await until(lambda: transport._node is not None)
    num_straight = len(actor.straight.reports)
    assert (await transport.report(report(5, num_output=9))).ack == 5
    assert len(actor.straight.reports) == num_straight
    assert actor.output_of() == 9 + 1


async def test_a_counter_actor_that_is_cut_off_is_cut_off_both_ways_and_told_so(actor: Actor, node: Node) -> None:
    transport = await way(actor, node)
    actor.is_cut = actor.straight.is_cut = True
    with pytest.raises(ConnectionError):
        await transport.report(report(1))
    with pytest.raises(CounterUnreachable):
        await node.reports.report(report(1))
    actor.is_cut = False
    assert (await node.reports.report(report(2, num_output=5)))[0].ack == 2
    assert actor.output_of() == 5


async def test_who_is_alone_on_its_node_reports_straight_until_another_one_comes(actor: Actor) -> None:
    clock = VirtualClock(1000.0)
    node = Node(NodeReports(CONFIG.model_dump_json(), send=actor.send, clock=clock))
    one, other = await way(actor, node, clock), await way(actor, node, clock)
    await one.report(report(0, "a"))
    clock.advance(GATHERING_S)  # until then others may be about to start
    await one.report(report(1, "a"))
    await one.report(report(2, "a"))
    assert (node.num_calls, len(actor.straight.reports)) == (2, 1)
    clock.advance(ALONE_S / 2)
    await other.report(report(1, "b"))
    await other.report(report(2, "b"))
    assert (node.num_calls, len(actor.straight.reports)) == (4, 1), "the node remembers the first"
    clock.advance(ALONE_S / 2)
    await one.report(report(3, "a"))
    await one.report(report(4, "a"))
    assert (node.num_calls, len(actor.straight.reports)) == (6, 1)
    clock.advance(REMEMBERED_S + 1)
    await one.report(report(5, "a"))
    await one.report(report(6, "a"))
    assert (node.num_calls, len(actor.straight.reports)) == (7, 2), "the other one is long gone"


async def test_a_node_without_an_actor_is_looked_at_again_later(
    actor: Actor, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.is_gone = True
    clock = VirtualClock(1000.0)
    transport = NodeTransport(actor.straight, node.find, 0.2, clock)
    with caplog.at_level(logging.WARNING):
        await transport.report(report(1))
        await until(lambda: node.num_found == 1 and transport._finding is None)
    assert "no actor for reports" in caplog.text
    await transport.report(report(2))
    assert node.num_found == 1 and len(actor.straight.reports) == 2
    node.is_gone = False
    clock.advance(BACK_OFF_S)
    await transport.report(report(3))
    await until(lambda: transport._node is node)


async def test_the_node_actor_ends_when_nobody_reports_any_more(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ended = VirtualClock(1000.0), asyncio.Event()
    slept: list[float] = []
    sleep = asyncio.sleep

    async def jump(seconds: float) -> None:
        slept.append(seconds)
        clock.advance(seconds)
        await sleep(0)

    reports = NodeReports(CONFIG.model_dump_json(), send=actor.send, clock=clock, on_idle=ended.set)
    monkeypatch.setattr(node_reports.asyncio, "sleep", jump)
    await reports.report(report(1))
    await asyncio.wait_for(ended.wait(), 5)
    assert max(slept) == IDLE_S


@pytest.fixture
async def replicas(actor: Actor, node: Node) -> AsyncIterator[dict[str, ScriptedLoop]]:
    """Two real replica cores that share the node."""
    engines = {name: ScriptedLoop(LocalBook(make_policy("vtc"), WeightedTokens())) for name in ("a", "b")}
    for name, engine in engines.items():
        transport = await way(actor, node)
        engine.core = ReplicaCore(name, Limits(512, 1000, 4, 16, 258), engine.book, transport, ARGS, SystemClock())
        engine.core.start(engine)
    yield engines
    for engine in engines.values():
        assert engine.core is not None
        await engine.core.stop()
        engine.book.check()


async def test_totals_stay_exact_while_the_node_actor_comes_and_goes_and_the_counter_actor_with_it(
    actor: Actor, node: Node, replicas: dict[str, ScriptedLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_reports, "BACK_OFF_S", 0.02)
    monkeypatch.setattr(node_reports, "ALONE_S", 0.0)
    for name, engine in replicas.items():
        engine.submit(GenerateRequest(name, "ann", (5,) * 10))
    made = 0

    def all_known() -> bool:
        return actor.output_of() == made

    for round_ in range(12):
        node.is_gone = round_ % 4 == 1
        actor.is_cut = actor.straight.is_cut = round_ % 4 == 2
        for name, engine in replicas.items():
            engine.step(engine.output(name, tokens=1))
            made += 1
        if round_ % 4 != 2:
            await until(all_known)
        else:
            await asyncio.sleep(0)
    await until(all_known)
    assert actor.output_of() == 24
    assert max(map(len, actor.batches)) == 2, "both went in one call"


@pytest.mark.parametrize(
    ("setting", "expected"), [({}, False), ({"reports_per_node": "each"}, False), ({"reports_per_node": "one"}, True)]
)
def test_a_setting_says_which_way_reports_go(actor: Actor, setting: dict[str, Any], expected: bool) -> None:
    args = FairServeArgs.model_validate({"num_replicas": 64, "counter": setting})
    assert isinstance(way_of_reports(args, actor.straight, SystemClock()), NodeTransport) is expected


@pytest.mark.cluster
async def test_on_a_real_ray_reports_go_together_and_straight_when_the_node_actor_is_killed(ray_cluster: Any) -> None:
    import ray

    from fairserve.cluster.counter_actor import start_counter_actor
    from fairserve.cluster.counter_client import RayTransport
    from fairserve.local import forget_counters

    config = {"name": "node-reports", "store": None, "reports_per_node": "one", "call_timeout_s": 10.0}
    args = FairServeArgs.model_validate({"counter": config})
    straight = RayTransport(lambda: start_counter_actor(args))
    transport = way_of_reports(args, straight, SystemClock(), group="a-test")
    assert isinstance(transport, NodeTransport)
    try:
        assert (await transport.report(report(1, num_output=3))).ack == 1
        async with asyncio.timeout(120):  # a process starts
            while transport._node is None:  # noqa: ASYNC110 (Ray tells nobody)
                await asyncio.sleep(0.05)
        reply = await transport._by_node(report(2, num_output=5))
        assert reply is not None and reply.ack == 2 and set(reply.counters) == {"ann"}
        ray.kill(transport._node)
        assert (await transport.report(report(3, num_output=7))).ack == 3
        assert transport._straight_until_s > 0
        status = await straight.call("status")
        assert status["clients"]["ann"]["num_output"] == 7
    finally:
        forget_counters(args)
