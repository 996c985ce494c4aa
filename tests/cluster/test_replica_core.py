"""A replica's event-loop side with a scripted engine and a counter service in the same loop. No Ray, no thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from fairserve.clock import SystemClock
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.replica import ENDED, ModelReplica, ReplicaCore
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, Grammar, RequestOutput, SamplingParams, Usage
from fairserve.errors import ModelFailed, ReplicaDied, ReplicaFailed
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.cluster.scripted import ScriptedLoop, Wire, until

ARGS = FairServeArgs.model_validate({"counter": {"call_timeout_s": 0.2, "poll_s": 0.05, "heartbeat_s": 0.05}})
LIMITS = Limits(512, 1000, 4, 16, 258)


@pytest.fixture
def wire() -> Wire:
    return Wire(CounterService(ARGS.model_dump_json()))


@pytest.fixture
def engine() -> ScriptedLoop:
    return ScriptedLoop(LocalBook(make_policy("vtc"), WeightedTokens()))


@pytest.fixture
async def core(wire: Wire, engine: ScriptedLoop) -> AsyncIterator[ReplicaCore]:
    core = ReplicaCore("replica", LIMITS, engine.book, wire, ARGS, SystemClock())
    engine.core = core
    core.start(engine)
    yield core
    if not engine.is_stopped:
        await core.stop()
    assert core.num_streams == 0
    engine.book.check()


def request(name: str = "r1", client: str = "ann", num_input: int = 10) -> GenerateRequest:
    return GenerateRequest(name, client, (5,) * num_input)


async def began(core: ReplicaCore, name: str = "r1", **values: Any) -> tuple[Any, asyncio.Task[RequestOutput]]:
    """A stream whose reader waits for its first output."""
    stream = core.generate(request(name, **values))
    reading = asyncio.ensure_future(anext(stream))
    await until(lambda: name in core._streams)
    return stream, reading


async def test_outputs_arrive_step_by_step_and_the_stream_ends_with_the_finish_reason(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    stream, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    assert (await reading).token_ids == (7,)
    engine.step(engine.output("r1", "length", tokens=1))
    rest = [output async for output in stream]
    assert [output.finish_reason for output in rest] == ["length"]
    assert engine.aborted == []


async def test_what_piles_up_behind_a_slow_reader_comes_as_one(core: ReplicaCore, engine: ScriptedLoop) -> None:
    stream, reading = await began(core)
    for _ in range(3):
        engine.step(engine.output("r1", tokens=1))
    engine.step(engine.output("r1", "stop", tokens=1))
    first = await reading
    rest = [output async for output in stream]
    assert "".join(output.text for output in (first, *rest)) == "tttt"
    assert len(rest) <= 1
    assert (first, *rest)[-1].usage == Usage(10, 0, 4)


async def test_the_wait_of_the_grant_is_told_once(core: ReplicaCore, engine: ScriptedLoop) -> None:
    stream = core.generate(request(), waited_s=1.5)
    reading = asyncio.ensure_future(anext(stream))
    await until(lambda: core.num_streams == 1)
    engine.step(engine.output("r1", tokens=1))
    assert (await reading).waited_s == 1.5
    engine.step(engine.output("r1", "length", tokens=1))
    assert (await anext(stream)).waited_s is None


async def test_closing_a_stream_early_aborts_in_the_engine(core: ReplicaCore, engine: ScriptedLoop) -> None:
    stream, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    await reading
    await stream.aclose()
    assert engine.aborted == ["r1"]
    engine.step(engine.output("r1", "abort"))  # the engine's last word, for nobody


async def test_a_reader_cancelled_before_its_first_output_aborts(core: ReplicaCore, engine: ScriptedLoop) -> None:
    _, reading = await began(core)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert engine.aborted == ["r1"]


async def test_a_stream_closed_before_it_was_read_never_reached_the_engine(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    stream = core.generate(request())
    await stream.aclose()  # type: ignore[attr-defined]
    assert engine.requests == {} and engine.aborted == []


async def test_an_engine_error_is_a_failed_replica_and_aborts_nothing(core: ReplicaCore, engine: ScriptedLoop) -> None:
    _, reading = await began(core)
    engine.step(engine.output("r1", "error", error="the step failed"))
    with pytest.raises(ReplicaFailed, match="the step failed"):
        await reading
    assert engine.aborted == []


async def test_a_grammar_is_compiled_on_another_thread_before_the_engine_has_the_request(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    class Grammars:
        threads: ClassVar[dict[Grammar, str]] = {}

        def is_prepared(self, grammar: Grammar) -> bool:
            return grammar in self.threads

        def prepare(self, grammar: Grammar) -> None:
            assert engine.requests == {}
            self.threads[grammar] = threading.current_thread().name

    engine.grammars = Grammars()  # type: ignore[attr-defined]
    ruled = replace(request(), sampling=SamplingParams(grammar=Grammar("regex", "a")))
    for name in ("r1", "r2"):
        stream = core.generate(replace(ruled, request_id=name))
        reading = asyncio.ensure_future(anext(stream))
        await until(lambda name=name: name in core._streams)  # type: ignore[misc]
        engine.step(engine.output(name, "stop", tokens=1))
        assert (await reading).token_ids == (7,)
        assert [output async for output in stream] == []
    assert list(Grammars.threads.values()) == ["grammar_0"]


async def test_a_request_that_the_model_fails_on_is_not_the_replicas_failure(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    _, reading = await began(core)
    engine.step(replace(engine.output("r1", "error", error="NaN"), error_code="model_error"))
    with pytest.raises(ModelFailed, match="NaN"):
        await reading
    assert core.is_healthy


async def test_a_broken_engine_still_reports_its_last_tokens(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    wire.is_cut = True
    _, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    await reading
    engine.step(engine.output("r1", "error", tokens=2, error="it broke"))
    engine.is_running, engine.ended = False, "it broke"
    await until(lambda: core._is_leaving)
    wire.is_cut = False
    await until(lambda: bool(wire.reports) and wire.reports[-1].finished == ("r1",))
    assert wire.reports[-1].totals["ann"].num_output == 3
    assert wire.reports[-1].free_slots == 0
    assert core.why_ended == f"{ENDED}: it broke"


async def test_a_second_try_of_the_same_request_fails_and_leaves_the_first_alone(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    stream, reading = await began(core)
    with pytest.raises(ReplicaFailed, match="already"):
        await anext(core.generate(request()))
    engine.step(engine.output("r1", "length", tokens=2))
    assert (await reading).text == "tt"
    assert [output async for output in stream] == []


async def test_an_id_may_come_again_only_after_the_engine_let_go_of_it(core: ReplicaCore, engine: ScriptedLoop) -> None:
    """Or the last output of an aborted request would end its successor."""
    _, reading = await began(core)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    with pytest.raises(ReplicaFailed, match="already"):
        await anext(core.generate(request()))
    engine.step(engine.output("r1", "abort"))
    await until(lambda: not core._clients)
    _, again = await began(core)
    engine.step(engine.output("r1", "length", tokens=1))
    assert (await again).finish_reason == "length"


async def test_a_dead_engine_fails_its_streams_and_is_granted_nothing(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    _, reading = await began(core)
    engine.is_running = False
    with pytest.raises(ReplicaDied, match=ENDED):
        await reading
    await until(lambda: wire.reports[-1].is_draining)
    assert (wire.reports[-1].free_slots, wire.reports[-1].free_kv_tokens) == (0, 0), "room would draw grants"
    num_reports = len(wire.reports)
    await asyncio.sleep(3 * ARGS.counter.heartbeat_s)
    assert len(wire.reports) == num_reports, "it would be taken for alive"
    assert not core.is_healthy
    with pytest.raises(ReplicaDied, match=ENDED):
        await anext(core.generate(request("r2")))


async def test_a_step_is_reported_at_once_with_what_it_charged(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    core._config = core._config.model_copy(update={"heartbeat_s": 10.0})  # it would hide what "at once" is
    await until(lambda: bool(wire.reports))
    _, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    await reading
    await until(lambda: bool(wire.reports) and wire.reports[-1].totals != {})
    report = wire.reports[-1]
    assert report.totals == {"ann": Totals(10, 0, 1, 12.0)}
    assert (report.received, report.started, report.finished) == (("r1",), ("r1",), ())
    assert (report.free_kv_tokens, report.free_slots, report.num_running) == (900, 3, 1)
    assert (report.kv_capacity_tokens, report.max_slots) == (1000, 4)
    assert (await wire.service.status())["clients"]["ann"]["service"] == 12
    engine.step(engine.output("r1", "length"))
    await until(lambda: wire.reports[-1].finished == ("r1",))


async def test_an_idle_replica_reports_its_room_every_heartbeat(core: ReplicaCore, wire: Wire) -> None:
    await until(lambda: len(wire.reports) >= 3)
    assert wire.reports[-1].totals == {}
    assert wire.reports[-1].free_slots == 4


async def test_the_counters_in_a_reply_reach_the_local_queue(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    wire.service.dispatcher.queue.table.register("ann", 1.0)
    wire.service.dispatcher.queue.table.set("ann", 5000.0)
    _, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    await reading
    await until(lambda: engine.calls > 0)
    assert engine.book.counter("ann") == 5012
    engine.step(engine.output("r1", "length"))


async def test_a_report_that_was_lost_comes_again_with_all_that_happened_since(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    wire.is_cut = True
    _, reading = await began(core)
    engine.step(engine.output("r1", tokens=1))
    await reading
    calls = wire.num_calls
    await until(lambda: wire.num_calls > calls + 1)
    engine.step(engine.output("r1", "length", tokens=4))
    wire.is_cut = False
    await until(lambda: bool(wire.reports) and wire.reports[-1].finished == ("r1",))
    assert wire.reports[-1].totals["ann"] == Totals(10, 0, 5, 20.0)
    assert wire.reports[-1].received == ("r1",)


async def test_a_call_into_a_partition_does_not_end_the_reports(core: ReplicaCore, wire: Wire) -> None:
    wire.hangs = True
    calls = wire.num_calls
    await until(lambda: wire.num_calls > calls)
    wire.hangs = False
    num_reports = len(wire.reports)
    await until(lambda: len(wire.reports) > num_reports)


async def test_a_bug_in_one_report_does_not_end_the_reports(
    core: ReplicaCore, wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(core._reporter, "compose", lambda **_: 1 / 0)
        await until(lambda: "ZeroDivisionError" in caplog.text)
    num_reports = len(wire.reports)
    await until(lambda: len(wire.reports) > num_reports)


async def test_a_request_without_a_grant_is_given_back_unless_it_is_served_already(
    core: ReplicaCore, engine: ScriptedLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairserve.cluster.replica.KEEP_S", 0.0)
    engine.holds.add("r2")  # waits in the local queue
    _, served = await began(core, "r1")
    _, waiting = await began(core, "r2")
    stream = core.generate(request("r3"), waited_s=1.0)  # came with a grant
    engine.holds.add("r3")
    granted = asyncio.ensure_future(anext(stream))
    await until(lambda: engine.aborted == ["r2"])
    engine.step(engine.output("r2", "abort"))
    assert (await waiting).finish_reason == "returned"
    await asyncio.sleep(2 * ARGS.counter.heartbeat_s)
    assert engine.aborted == ["r2"]
    engine.step(engine.output("r1", "length", tokens=1), engine.output("r3", "length"))
    assert (await served).token_ids == (), "says that it has started"
    assert (await granted).finish_reason == "length"


async def test_a_request_whose_prompt_takes_several_steps_says_that_it_has_started(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    stream = core.generate(request(), waited_s=1.5)
    reading = asyncio.ensure_future(anext(stream))
    await until(lambda: core.num_streams == 1)
    engine.step()
    first = await reading
    assert (first.token_ids, first.finish_reason, first.waited_s) == ((), None, 1.5)
    engine.step()
    engine.step(engine.output("r1", "length", tokens=1))
    assert [one.token_ids async for one in stream] == [(7,)]


async def test_a_draining_replica_finishes_what_runs_and_gives_back_what_does_not(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    await until(lambda: bool(wire.reports))
    engine.holds.add("r2")
    running, served = await began(core, "r1")
    _, waiting = await began(core, "r2")
    wire.service.dispatcher._losses.drain("replica", wire.service._clock.now_s())  # a router said so
    await until(lambda: wire.reports[-1].is_draining)
    assert engine.aborted == ["r2"]
    engine.step(engine.output("r1", tokens=1), engine.output("r2", "abort"))
    assert (await waiting).finish_reason == "returned"
    assert [one.finish_reason async for one in core.generate(request("r3"))] == ["returned"]
    assert "r3" not in engine.requests
    engine.step(engine.output("r1", "length", tokens=1))
    assert (await served).token_ids == (7,)
    assert [one.finish_reason async for one in running] == ["length"]


async def test_a_counter_actor_that_knows_nothing_of_the_drain_hears_of_it(core: ReplicaCore, wire: Wire) -> None:
    await until(lambda: bool(wire.reports))
    wire.service.dispatcher._losses.drain("replica", wire.service._clock.now_s())
    await until(lambda: wire.reports[-1].is_draining)
    wire.service = CounterService(ARGS.model_dump_json())
    num_reports = len(wire.reports)
    await until(lambda: len(wire.reports) > num_reports)
    assert (await wire.service.status())["replicas"]["replica"]["is_draining"]


async def test_stop_fails_what_runs_and_reports_the_last_tokens_and_no_room(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    _, reading = await began(core)
    engine.book.output("r1", 3)  # charged, and in no report yet
    await core.stop()
    with pytest.raises(ReplicaFailed, match="stopped"):
        await reading
    report = wire.reports[-1]
    assert report.totals["ann"].num_output == 3
    assert report.finished == ("r1",)
    assert (report.free_kv_tokens, report.free_slots) == (0, 0), "it would be granted more"
    with pytest.raises(ReplicaFailed):
        await anext(core.generate(request("r2")))


async def test_a_reader_that_leaves_while_the_replica_stops_meets_no_second_error(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    _, reading = await began(core)
    engine.is_stopped = True  # from here on the loop refuses every call
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_stop_ends_also_when_nobody_takes_the_last_report(core: ReplicaCore, wire: Wire) -> None:
    wire.hangs = True
    async with asyncio.timeout(2):
        await core.stop()


async def test_usage_counts_every_request_that_ended_whoever_was_reading(
    core: ReplicaCore, engine: ScriptedLoop
) -> None:
    stream, reading = await began(core, "r1")
    _, other = await began(core, "r2", client="bob", num_input=3)
    engine.step(engine.output("r1", tokens=2), engine.output("r2", tokens=1))
    await asyncio.gather(reading, other)
    assert core.usage() == {}
    await stream.aclose()
    engine.step(engine.output("r1", "abort", tokens=1), engine.output("r2", "length", tokens=4))
    await until(lambda: len(core.usage()) == 2)
    assert core.usage() == {"ann": Usage(10, 0, 3), "bob": Usage(3, 0, 5)}
    _, third = await began(core, "r3", num_input=7)
    engine.step(engine.output("r3", "stop", tokens=1))
    await third
    assert core.usage()["ann"] == Usage(17, 0, 4)


async def test_a_replica_whose_start_failed_half_way_can_be_taken_down() -> None:
    await ModelReplica.__del__(object())  # type: ignore[arg-type]


async def test_a_policy_that_is_changed_live_orders_the_local_queue_too(
    core: ReplicaCore, engine: ScriptedLoop, wire: Wire
) -> None:
    await until(lambda: core._reporter.epoch > 0)
    await wire.service.set_settings({"fairness.policy": "fcfs"}, "test")
    assert engine.book.policy == "vtc"
    await until(lambda: engine.book.policy == "fcfs")
    await wire.service.set_settings({"fairness.policy": None}, "test")
    await until(lambda: engine.book.policy == "vtc")
