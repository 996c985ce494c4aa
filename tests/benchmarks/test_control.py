"""What the benchmark of the control path counts: simulated nodes on a service in the same loop, and the figures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks import simulated_node
from benchmarks.control import PER_NODE, Window, row, table, window
from benchmarks.simulated_node import SLOTS, MeteredService, Node, PacedEngine
from fairserve.cluster.counter_client import CounterTransport
from fairserve.config import FairServeArgs
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import StepEvents
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.cluster.scripted import Wire, until

ARGS = FairServeArgs.model_validate({"counter": {"store": None, "heartbeat_s": 0.05}, "metrics": {"enabled": False}})


class Remote:
    """A node, or a service, as Ray's handle to it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._inner, method)
        return type("Method", (), {"remote": staticmethod(call)})


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A service, and two nodes of two replicas that call it directly."""
    monkeypatch.setattr(simulated_node, "NUM_OUTPUT", (1, 4))
    service = MeteredService(ARGS.model_dump_json())

    def wire(args: FairServeArgs, node: str) -> CounterTransport:
        return Wire(service)

    nodes = {name: Node(name, ARGS.model_dump_json(), 2, wire) for name in ("a", "b")}
    for name, node in nodes.items():
        await node.start({other: Remote(handle) for other, handle in nodes.items() if other != name})
    yield service, nodes
    for node in nodes.values():
        await node.stop()


async def test_every_slot_runs_and_the_meter_knows_when_each_step_was_counted(stage: Any) -> None:
    service, nodes = stage
    for node in nodes.values():
        await node.endless(True)
        await node.load([f"client-{i}" for i in range(8)])
    engines = [one.engine for node in nodes.values() for one in node._replicas.values()]
    await until(lambda: all(len(engine._left) == SLOTS for engine in engines))
    before = await service.meter()
    for node in nodes.values():
        await node.take_sent()
    await until(lambda: service._num_reports >= before["reports"] + 8)
    after = await service.meter()
    sent = await nodes["a"].take_sent() | await nodes["b"].take_sent()
    counted = window(before, after, sent)
    assert counted.reports >= 8 and counted.grants == 0
    assert len(counted.stale_s) >= 1 and all(0 <= stale_s < 5 for stale_s in counted.stale_s)
    granted = service.dispatcher.num_granted
    for node in nodes.values():
        await node.endless(False)
    await until(lambda: service.dispatcher.num_granted > granted)
    await asyncio.gather(*(node.unload() for node in nodes.values()))
    assert not any(engine.num_here for engine in engines)
    pairs = await nodes["a"].alone(2, Remote(service))
    assert len(pairs) == 2 and all(trip_s > 0 and waited_s > 0 for trip_s, waited_s in pairs)


def test_a_paced_engine_fills_its_slots_and_ends_requests_when_they_are_long_enough() -> None:
    seen: list[StepEvents] = []
    book: LocalBook[GenerateRequest] = LocalBook(make_policy("vtc"), WeightedTokens())
    engine = PacedEngine(book, seen.append, lambda: 3)
    assert not engine.step() and not seen, "nothing to do is no step"
    for i in range(SLOTS + 2):
        engine.submit(GenerateRequest(f"r{i}", "ann", (5,) * 4, SamplingParams(max_tokens=2)))
    engine.step()
    assert (seen[-1].num_running, seen[-1].num_waiting, seen[-1].free_slots) == (SLOTS, 2, -2)
    engine.step()
    engine.step()
    assert (seen[-1].num_running, seen[-1].num_waiting) == (2, 0)
    totals = book.take_events().totals["ann"]
    assert (totals.num_input, totals.num_output) == (4 * (SLOTS + 2), 2 * SLOTS + 2)
    engine.is_endless = True
    for _ in range(5):
        engine.step()
    assert engine.num_here == 2


def test_a_grant_is_charged_what_its_window_took_beyond_its_reports() -> None:
    steps = [Window(2.0, 0.5, 0.2, 500, 250, 0, [0.001, 0.003]), Window(2.0, 1.0, 0.2, 500, 250, 0, [0.002])]
    grants = [Window(2.0, 1.0, 0.2, 400, 400, 100, [])]
    made = row(PER_NODE, "one", steps, grants, [(0.001, 0.002), (0.003, 0.004)], 0.5)
    assert (made.report_cpu.least, made.report_cpu.median, made.report_cpu.most) == (1.0, 1.5, 2.0)
    assert made.grant_cpu.median == pytest.approx((1_000 - 400 * 1.5) / 100)
    assert (made.cores.least, made.cores.most) == (0.25, 0.5)
    assert made.reports_per_call.median == 2.0
    assert made.stale_p99.most == 3.0 and made.alone_p50 == 2.0 and made.round_trip_p99 == 3.0
    told = table([made]).splitlines()
    assert told[1].split()[0] == str(PER_NODE) and "alone among 8 replicas, one: granted after 2.00 ms" in told[-1]


def test_steps_of_reports_that_the_meter_did_not_see_are_left_out() -> None:
    before = {
        "at_s": 0.0,
        "cpu_s": 0.0,
        "handled_s": 0.0,
        "reports": 0,
        "calls": 0,
        "grants": 0,
        "node_cpu_s": 0.25,
        "taken": [("a", 1, 1.0)],
    }
    after = {
        "at_s": 2.0,
        "cpu_s": 1.0,
        "handled_s": 0.5,
        "reports": 2,
        "calls": 1,
        "grants": 1,
        "node_cpu_s": 0.5,
        "taken": [("a", 2, 2.0)],
    }
    made = window(before, after, {("a", 1): [0.9], ("a", 2): [1.5, 1.9], ("b", 1): [0.1]})
    assert made.stale_s == pytest.approx([0.5, 0.1])
    assert (made.seconds, made.reports, made.grants, made.node_cpu_s) == (2.0, 2, 1, 0.25)
