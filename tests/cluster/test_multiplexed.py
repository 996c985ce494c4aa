"""Many requests from one ingress to one replica and back, over trunks that fail in every way. No Ray, no engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fairserve.clock import SystemClock
from fairserve.cluster import arrivals, multiplex
from fairserve.cluster.backend import HandleBackend
from fairserve.cluster.counter_actor import CounterService
from fairserve.cluster.multiplex import Message
from fairserve.cluster.replica import ReplicaCore
from fairserve.config import ApiConfig, FairServeArgs
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import Limits
from fairserve.engine.request import GenerateRequest, RequestOutput, SamplingParams, Usage
from fairserve.errors import ReplicaDied, ReplicaFailed
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens
from tests.cluster.direct import Fault, Handle
from tests.cluster.scripted import ScriptedLoop, Wire, until

ARGS = FairServeArgs.model_validate({"counter": {"call_timeout_s": 0.5, "poll_s": 0.05, "heartbeat_s": 0.05}})
LIMITS = Limits(512, 100_000, 2000, 16, 258)


class Numbered(ScriptedLoop):
    """The n-th token of a request is n, so that one that is lost, repeated or misplaced shows."""

    def output(self, request_id: str, finish_reason: Any = None, tokens: int = 0, error: Any = None) -> RequestOutput:
        first = self.made[request_id]
        one = super().output(request_id, finish_reason, tokens, error)
        ids = tuple(range(first, first + tokens))
        text = "".join(f"<{i}>" for i in ids)
        return RequestOutput(request_id, text, ids, one.usage, (), one.finish_reason, error=error)


@pytest.fixture
def engine() -> Numbered:
    return Numbered(LocalBook(make_policy("vtc"), WeightedTokens()))


@pytest.fixture
async def core(engine: Numbered, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ReplicaCore]:
    monkeypatch.setattr(arrivals, "RETRY_S", 0.0)
    monkeypatch.setattr(multiplex, "IDLE_S", 0.01)
    core = ReplicaCore(
        "replica", LIMITS, engine.book, Wire(CounterService(ARGS.model_dump_json())), ARGS, SystemClock()
    )
    engine.core = core
    core.start(engine)
    yield core
    await until(lambda: core._trunks.num_lines == 0)
    await core.stop()
    assert core.num_streams == 0


class Caller:
    """Reads one request as its caller does."""

    def __init__(self, backend: HandleBackend, name: str, max_tokens: int = 100) -> None:
        self.seen: list[RequestOutput] = []
        request = GenerateRequest(name, "ann", (5,) * 3, SamplingParams(max_tokens=max_tokens))
        self.stream = backend.generate(request)
        self.task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for output in self.stream:
            self.seen.append(output)

    @property
    def tokens(self) -> list[int]:
        return [i for output in self.seen for i in output.token_ids]

    def check(self, num: int) -> None:
        """It got so many tokens, each once and in order, and its end."""
        assert self.tokens == list(range(num))
        assert "".join(output.text for output in self.seen) == "".join(f"<{i}>" for i in range(num))
        assert (self.seen[-1].finish_reason, self.seen[-1].usage) == ("length", Usage(3, 0, num))
        assert [one.waited_s for one in self.seen if one.waited_s is not None] == [0.1]


def ingress(core: ReplicaCore, fault: Fault | None = None, **api: Any) -> tuple[Handle, HandleBackend]:
    handle = Handle(core, fault)
    return handle, HandleBackend(handle, ApiConfig(**api))


async def began(core: ReplicaCore, backend: HandleBackend, num: int) -> list[Caller]:
    before = core.num_streams
    callers = [Caller(backend, f"r{before + i}") for i in range(num)]
    await until(lambda: core.num_streams == before + num)
    return callers


async def step(engine: Numbered, reason: Any = None) -> None:
    """A token for every request."""
    engine.step(*[engine.output(name, reason, tokens=1) for name in list(engine.requests)])
    for _ in range(10):
        await asyncio.sleep(0)


def has_trunk(core: ReplicaCore) -> bool:
    return any(line.trunk is not None for line in core._trunks._lines.values())


async def ended(callers: list[Caller], backend: HandleBackend) -> None:
    async with asyncio.timeout(20):
        await asyncio.gather(*(caller.task for caller in callers))
    assert backend._arrivals.num_open[0] == 0


async def test_a_thousand_streams_take_one_message_a_step(core: ReplicaCore, engine: Numbered) -> None:
    handle, backend = ingress(core)
    callers = await began(core, backend, 1000)
    await until(lambda: has_trunk(core))
    sent: list[Any] = []
    for call in handle.calls["trunk"]:
        put = call._arrived.put_nowait
        call._arrived.put_nowait = lambda item, put=put: (sent.append(item), put(item))[1]  # type: ignore[method-assign]
    for _ in range(5):
        await step(engine)
    await until(lambda: all(len(caller.tokens) == 5 for caller in callers))
    assert (len(handle.calls["trunk"]), len(sent)) == (1, 5)
    assert len(sent[0]) < 120 * len(callers), "bytes"
    await step(engine, "length")
    await ended(callers, backend)
    for caller in callers:
        caller.check(6)


async def test_without_the_setting_there_is_no_trunk(core: ReplicaCore, engine: Numbered) -> None:
    handle, backend = ingress(core, multiplex=False)
    callers = await began(core, backend, 3)
    for _ in range(4):
        await step(engine)
    await step(engine, "length")
    await ended(callers, backend)
    assert handle.calls["trunk"] == []
    for caller in callers:
        caller.check(5)


async def loses_some(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        if message.number % 3 != 2:
            yield message


async def loses_the_last(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        if message.number < 4:
            yield message


async def repeats(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    all_before = []
    async for message in messages:
        all_before.append(message)
        for one in (*all_before, message):
            yield one


async def reorders(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    held = None
    async for message in messages:
        if message.number and held is None:
            held = message
            continue
        yield message
        if held is not None:
            yield held
            held = None


async def breaks(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        yield message
        if message.number == 3:
            raise ConnectionError("broken")


async def says_nothing(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        if not message.number:
            yield message


async def never_comes_up(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    raise ConnectionError("refused")
    yield  # a generator


FAULTS: list[Fault] = [loses_some, loses_the_last, repeats, reorders, breaks, says_nothing, never_comes_up]


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_fault_of_a_trunk_loses_or_repeats_a_token_or_holds_up_an_end(
    core: ReplicaCore, engine: Numbered, fault: Fault
) -> None:
    _, backend = ingress(core, fault)
    callers = await began(core, backend, 8)
    for i in range(30):
        await step(engine)
        if i == 15:
            callers += await began(core, backend, 4)
    await step(engine, "length")
    await ended(callers, backend)
    for caller in callers[:8]:
        caller.check(31)
    for caller in callers[8:]:
        caller.check(15)


@pytest.mark.parametrize("fault", [loses_some, repeats, reorders, breaks, never_comes_up])
async def test_tokens_come_while_the_request_runs_whatever_breaks(
    core: ReplicaCore, engine: Numbered, fault: Fault
) -> None:
    _, backend = ingress(core, fault)
    callers = await began(core, backend, 4)
    for _ in range(12):
        await step(engine)
    await until(lambda: all(len(caller.tokens) >= 10 for caller in callers))
    await step(engine, "length")
    await ended(callers, backend)


async def test_requests_that_come_and_go_at_random_get_what_is_theirs(core: ReplicaCore, engine: Numbered) -> None:
    rng = random.Random(3)

    async def wild(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        async for message in messages:
            if rng.random() < 0.1:
                raise ConnectionError("broken")
            for _ in range(rng.choice((1, 1, 1, 1, 0, 2)) if message.number else 1):
                yield message

    _, backend = ingress(core, wild)
    running: dict[str, Caller] = {}
    done: list[tuple[Caller, int]] = []
    left: list[Caller] = []
    for i in range(400):
        if len(running) < 30 and rng.random() < 0.6:
            name = f"r{i}"
            running[name] = Caller(backend, name)
            await until(lambda name=name: name in engine.requests)  # type: ignore[misc]
        ending = {name for name in running if rng.random() < 0.03}
        outputs = [engine.output(name, "length" if name in ending else None, tokens=1) for name in running]
        done += [(running.pop(name), engine.made[name]) for name in ending]
        engine.step(*outputs)
        if running and rng.random() < 0.2:
            name = rng.choice(list(running))
            caller = running.pop(name)
            caller.task.cancel()
            left.append(caller)
            await until(lambda name=name: name in engine.aborted)  # type: ignore[misc]
            engine.step(engine.output(name, "abort"))
    engine.step(*[engine.output(name, "length", tokens=1) for name in running])
    done += [(caller, engine.made[name]) for name, caller in running.items()]
    await ended([caller for caller, _ in done], backend)
    assert len(done) > 50 and len(left) > 20, "or this test shows nothing"
    for caller, num in done:
        caller.check(num)
    for caller in left:
        assert caller.tokens == list(range(len(caller.tokens)))


async def test_a_caller_who_leaves_is_aborted_at_once_and_the_others_go_on(core: ReplicaCore, engine: Numbered) -> None:
    _, backend = ingress(core)
    callers = await began(core, backend, 3)
    await until(lambda: has_trunk(core))
    await step(engine)
    await until(lambda: all(len(caller.tokens) == 1 for caller in callers))
    callers[1].task.cancel()
    await until(lambda: engine.aborted == ["r1"])
    assert core.num_streams == 2
    engine.step(engine.output("r1", "abort"))
    await step(engine, "length")
    await ended([callers[0], callers[2]], backend)
    for caller in (callers[0], callers[2]):
        caller.check(2)


@pytest.mark.parametrize("kill", [True, False])
async def test_all_requests_of_a_replica_that_dies_hear_of_it_at_once(
    core: ReplicaCore, engine: Numbered, kill: bool
) -> None:
    handle, backend = ingress(core)
    callers = await began(core, backend, 4)
    await until(lambda: has_trunk(core))
    for _ in range(3):
        await step(engine)
    await until(lambda: all(len(caller.tokens) == 3 for caller in callers))
    if kill:
        handle.die()
    else:
        engine.is_running, engine.ended = False, "it broke"
    for caller in callers:
        with pytest.raises(ReplicaDied):
            await asyncio.wait_for(caller.task, 5)
        assert caller.tokens == [0, 1, 2]
    await until(lambda: backend._arrivals.num_open == (0, 0))


async def test_streams_go_on_elsewhere_behind_the_tokens_that_came_over_the_trunk(
    core: ReplicaCore, engine: Numbered
) -> None:
    handle, backend = ingress(core, retry_on_replica_death=True)
    callers = await began(core, backend, 3)
    await until(lambda: has_trunk(core))
    for _ in range(3):
        await step(engine)
    await until(lambda: all(len(caller.tokens) == 3 for caller in callers))
    for call in [*handle.calls["generate"], *handle.calls["trunk"]]:
        call.die()  # as if the others had died, and a new replica were here under the same name
    await until(lambda: core.num_streams == 3 and all("~1" in name for name in core._streams))
    for name in ("r0", "r1", "r2"):
        again = engine.requests[f"{name}~1"]
        assert (again.num_generated, again.sampling.max_tokens) == (3, 97)
        engine.step(engine.output(name, "abort"))
    for name in ("r0~1", "r1~1", "r2~1"):
        engine.made[name] = 0
        engine.step(engine.output(name, "length", tokens=1))
    await ended(callers, backend)
    for caller in callers:
        assert caller.tokens == [0, 1, 2, 0]
        assert caller.seen[-1].usage == Usage(3, 0, 4)


async def test_an_error_of_one_request_is_its_own(core: ReplicaCore, engine: Numbered) -> None:
    _, backend = ingress(core)
    callers = await began(core, backend, 3)
    await until(lambda: has_trunk(core))
    await step(engine)
    engine.step(engine.output("r1", "error", error="the step failed"))
    with pytest.raises(ReplicaFailed, match="the step failed"):
        await callers[1].task
    await step(engine, "length")
    await ended([callers[0], callers[2]], backend)


async def test_a_draining_replica_has_no_trunk_once_its_last_request_has_ended(
    core: ReplicaCore, engine: Numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplex, "IDLE_S", 1000.0)
    handle, backend = ingress(core)
    callers = await began(core, backend, 2)
    await until(lambda: has_trunk(core))
    core._drain()
    await step(engine)
    await until(lambda: all(len(caller.tokens) == 1 for caller in callers))
    assert has_trunk(core)
    await step(engine, "length")
    await ended(callers, backend)
    await until(lambda: all(call._task.done() for call in handle.calls["trunk"]))
    await until(lambda: backend._arrivals.num_open == (0, 0))


async def test_two_ingresses_each_get_their_own(core: ReplicaCore, engine: Numbered) -> None:
    doors = [ingress(core) for _ in range(2)]
    callers: list[list[Caller]] = []
    for i, (_, backend) in enumerate(doors):
        callers.append([Caller(backend, f"d{i}-{j}") for j in range(3)])
    await until(lambda: core.num_streams == 6)
    await until(lambda: sum(line.trunk is not None for line in core._trunks._lines.values()) == 2)
    for _ in range(3):
        await step(engine)
    await step(engine, "length")
    for (handle, backend), some in zip(doors, callers, strict=True):
        await ended(some, backend)
        assert len(handle.calls["trunk"]) == 1
        for caller in some:
            caller.check(4)


async def test_a_caller_cancelled_by_the_cluster_hears_of_it(core: ReplicaCore, engine: Numbered) -> None:
    """Serve may cancel the task that waits for its answer, instead of failing it."""
    handle, backend = ingress(core)
    callers = await began(core, backend, 1)

    async def cancelled() -> Any:
        raise asyncio.CancelledError

    call = handle.calls["generate"][0]
    call.__class__ = type("Cancelled", (type(call),), {"__anext__": lambda self: cancelled()})
    await step(engine)
    with pytest.raises(ReplicaFailed, match="cancelled"):
        await asyncio.wait_for(callers[0].task, 5)
    call.cancel()
    await until(lambda: core.num_streams == 0)
