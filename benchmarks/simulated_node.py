"""The model replicas of one node in one process, without models: engines that keep a beat, real reports, real grants.

All but the tokens is what a service runs: :class:`ReplicaCore` with its local book, reporter and time-outs, the
router's client, Ray's calls. A granted request goes to the process of its replica in batches, in place of Serve's call
for each.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from fairserve.assembly import make_local_book
from fairserve.clock import SystemClock
from fairserve.cluster.counter_actor import find_counter_actor
from fairserve.cluster.counter_client import CounterTransport, RayTransport, RouterClient
from fairserve.cluster.counter_service import CounterService
from fairserve.cluster.node_reports import way_of_reports
from fairserve.cluster.replica import ReplicaCore
from fairserve.config import FairServeArgs
from fairserve.dispatch.messages import ReportReply, RouterCall, RouterReply, StepReport, Submit
from fairserve.dispatch.replica_book import LocalBook
from fairserve.dispatch.router_book import RouterBook
from fairserve.engine.events import Limits, StepEvents
from fairserve.engine.request import GenerateRequest, SamplingParams

STEPS_PER_S = 30
SLOTS = 16
"""Requests that run on one replica, each of which makes a token in every step."""
LIMITS = Limits(max_model_len=8192, kv_capacity_tokens=2**22, max_num_seqs=SLOTS, block_size=16, vocab_size=50_000)
NUM_INPUT = 16
NUM_OUTPUT = (32, 96)
"""Tokens of an answer, from and to."""
PAUSE_S = 0.03
"""Between two requests that are alone in the cluster: each has ended before the next one comes."""

Sent = dict[tuple[str, int], list[float]]
"""(replica, seq) of a report -> when the steps were, by the monotonic clock, that it was the first to tell of."""


class PacedEngine:
    """Stands for an ``EngineLoop``, without a thread: whoever holds it says when a step is."""

    def __init__(
        self, book: LocalBook[GenerateRequest], on_step: Callable[[StepEvents], None], length: Callable[[], int]
    ) -> None:
        self.is_endless = False
        """What runs, runs on for ever."""
        self._book = book
        self._on_step = on_step
        self._length = length
        self._left: dict[str, int] = {}
        """request id -> tokens that it has yet to make."""
        self.ended: str | None = None

    def start(self) -> None: ...

    def stop(self, timeout: float | None = None) -> bool:
        self.ended = "stopped"
        return True

    def is_alive(self) -> bool:
        return self.ended is None

    def submit(self, request: GenerateRequest) -> None:
        self._book.received(request)
        self._book.push(request)

    def call(self, fn: Callable[[], None]) -> None:
        fn()

    @property
    def num_here(self) -> int:
        return len(self._left) + len(self._book)

    def step(self) -> bool:
        """A token for each request that runs, after the free slots were filled; False where there was nothing to do."""
        if not self.num_here:
            return False
        while len(self._left) < SLOTS and self._book.peek() is not None:
            request = self._book.pop()
            self._book.started(request.request_id, request.num_input, 0)
            self._left[request.request_id] = min(self._length(), request.sampling.max_tokens)
        for request_id, num in list(self._left.items()):
            self._book.output(request_id, 1)
            if num <= 1 and not self.is_endless:
                del self._left[request_id]
                self._book.finished(request_id)
            else:
                self._left[request_id] = max(1, num - 1)
        num_tokens = NUM_INPUT * self.num_here + NUM_OUTPUT[1] * len(self._left)
        self._on_step(
            StepEvents(
                (), len(self._left), len(self._book), LIMITS.kv_capacity_tokens - num_tokens, SLOTS - self.num_here
            )
        )
        return True

    def spread_ends(self) -> None:
        """What ran without end does not end all at once."""
        self._left = {request_id: self._length() for request_id in self._left}


class NotedTransport:
    """Notes which report told of which steps."""

    def __init__(self, inner: CounterTransport, sent: Sent) -> None:
        self._inner = inner
        self._sent = sent
        self._untold: list[float] = []

    def stepped(self) -> None:
        self._untold.append(time.monotonic())

    async def report(self, report: StepReport) -> ReportReply:
        steps, self._untold = self._untold, []
        try:
            reply = await self._inner.report(report)
        except BaseException:  # a time-out cancels: the next report tells of these steps again
            self._untold = steps + self._untold
            raise
        self._sent[report.replica, report.seq] = steps
        return reply

    async def route(self, call: RouterCall) -> RouterReply:
        return await self._inner.route(call)

    async def poll(self, call: RouterCall) -> RouterReply:
        return await self._inner.poll(call)


class SimulatedReplica:
    """``due_s`` is when its next step is."""

    def __init__(
        self, name: str, args: FairServeArgs, transport: CounterTransport, due_s: float, length: Callable[[], int]
    ) -> None:
        book: LocalBook[GenerateRequest] = make_local_book(args.fairness)
        self.sent: Sent = {}
        self.due_s = due_s
        self._noted = NotedTransport(transport, self.sent)
        self.core = ReplicaCore(name, LIMITS, book, self._noted, args, SystemClock())
        self.engine = PacedEngine(book, self.core.on_step, length)
        self.core.start(self.engine)

    def step(self, now_s: float) -> None:
        if self.engine.step():
            self._noted.stepped()
        self.due_s = max(self.due_s + 1 / STEPS_PER_S, now_s)


class Node:
    """``num_replicas`` replicas and one router, in the event loop of this process. A Ray actor, or a test's object.

    ``transports``, of settings and the name of this node, makes the way of one replica's reports to the counter actor,
    and of the router's calls.
    """

    def __init__(
        self, name: str, args_json: str, num_replicas: int, transports: Callable[[FairServeArgs, str], CounterTransport]
    ) -> None:
        self._name = name
        self._args = FairServeArgs.model_validate_json(args_json)
        self._num_replicas = num_replicas
        self._transports = transports
        self._random = random.Random(name)
        self._replicas: dict[str, SimulatedReplica] = {}
        self._nodes: dict[str, Any] = {}
        self._bags: dict[str, list[tuple[str, GenerateRequest]]] = {}
        self._carrying: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: list[asyncio.Task[None]] = []
        self._num_made = 0

    async def start(self, nodes: dict[str, Any]) -> None:
        """``nodes``: the other nodes' handles, by name."""
        self._nodes = nodes
        now_s = time.monotonic()
        for i in range(self._num_replicas):
            due_s = now_s + (i + self._random.random()) / self._num_replicas / STEPS_PER_S
            name = f"{self._name}/{i}"
            transport = self._transports(self._args, self._name)
            self._replicas[name] = SimulatedReplica(name, self._args, transport, due_s, self._length)
        book = RouterBook(f"router-{self._name}", time.time_ns())
        self._router = RouterClient(book, self._transports(self._args, self._name), self._args.counter, SystemClock())
        self._tasks.append(asyncio.create_task(self._beat()))

    async def load(self, clients: list[str]) -> None:
        """From now on each of these always has a request that waits."""
        self._clients = [asyncio.create_task(self._keep_asking(client)) for client in clients]

    async def endless(self, is_endless: bool) -> None:
        """Whether what runs ends at all."""
        for one in self._replicas.values():
            one.engine.is_endless = is_endless
            if not is_endless:
                one.engine.spread_ends()

    async def unload(self) -> None:
        """Nobody asks for anything any more; until all that ran here has ended."""
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        self._clients = []
        while any(one.engine.num_here for one in self._replicas.values()):  # noqa: ASYNC110 (engines tell nobody)
            await asyncio.sleep(0.1)

    async def take_sent(self) -> Sent:
        """Of all replicas here, since the last time."""
        sent: Sent = {}
        for one in self._replicas.values():
            sent |= one.sent
            one.sent.clear()
        return sent

    async def receive(self, granted: list[tuple[str, GenerateRequest]]) -> None:
        """Requests, each for a replica here."""
        for replica, request in granted:
            self._replicas[replica].engine.submit(request)

    async def alone(self, num: int, actor: Any) -> list[tuple[float, float]]:
        """Seconds of a bare round trip to the counter actor, and seconds that a request alone in the cluster waits for
        its grant, in turn."""
        pairs: list[tuple[float, float]] = []
        while len(pairs) < num:
            began_s = time.perf_counter()
            await actor.ping.remote()
            trip_s = time.perf_counter() - began_s
            began_s = time.perf_counter()
            if await self._ask("alone", 1):
                pairs.append((trip_s, time.perf_counter() - began_s))
            else:  # this machine is so busy that the counter actor seems to be away
                await asyncio.sleep(1)
            await asyncio.sleep(PAUSE_S + 2 / STEPS_PER_S)
        return pairs

    async def stop(self) -> None:
        for task in (*self._clients, *self._tasks, *self._carrying.values()):
            task.cancel()
        await self._router.close()
        await asyncio.gather(*(one.core.stop() for one in self._replicas.values()))

    def _length(self) -> int:
        return self._random.randint(*NUM_OUTPUT)

    async def _beat(self) -> None:
        while True:
            one = min(self._replicas.values(), key=lambda one: one.due_s)
            await asyncio.sleep(max(0.0, one.due_s - time.monotonic()))
            one.step(time.monotonic())

    async def _keep_asking(self, client: str) -> None:
        while True:
            if not await self._ask(client, NUM_OUTPUT[1]):  # without a grant it would go ahead; here it comes again
                await asyncio.sleep(1 + 2 * self._random.random())

    async def _ask(self, client: str, max_output: int) -> bool:
        """Whether a grant came; the request then is on its way."""
        self._num_made += 1
        request_id = f"{self._name}-{self._num_made}"
        grant = await self._router.acquire(Submit(request_id, client, NUM_INPUT, max_output))
        if grant is None:
            return False
        sampling = SamplingParams(max_tokens=max_output)
        self._bags.setdefault(grant.replica.rpartition("/")[0], []).append(
            (grant.replica, GenerateRequest(request_id, client, (5,) * NUM_INPUT, sampling))
        )
        for name in self._bags:
            if self._bags[name] and (name not in self._carrying or self._carrying[name].done()):
                self._carrying[name] = asyncio.create_task(self._carry(name))
        return True

    async def _carry(self, name: str) -> None:
        """One call at a time; the next one takes all that was granted meanwhile."""
        while self._bags[name]:
            granted, self._bags[name] = self._bags[name], []
            await (self.receive(granted) if name == self._name else self._nodes[name].receive.remote(granted))


class MeteredService(CounterService):
    """The counter actor's service, which counts its work and notes when it took in which report."""

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(*values, **named)
        self._num_reports = self._num_calls = 0
        self._handled_s = 0.0
        self._taken: list[tuple[str, int, float]] = []

    async def report(self, report: StepReport, model: str = "") -> ReportReply:
        began_s = time.thread_time()
        reply = await super().report(report, model)
        self._handled_s += time.thread_time() - began_s
        self._num_reports += 1
        self._num_calls += 1
        self._taken.append((report.replica, report.seq, time.monotonic()))
        return reply

    async def reports(self, reports: tuple[StepReport, ...], model: str = "") -> tuple[ReportReply, ...]:
        began_s = time.thread_time()
        replies = await super().reports(reports, model)
        self._handled_s += time.thread_time() - began_s
        self._num_reports += len(reports)
        self._num_calls += 1
        now_s = time.monotonic()
        self._taken += [(report.replica, report.seq, now_s) for report in reports]
        return replies

    async def meter(self) -> dict[str, Any]:
        """Seconds of CPU and counts since the beginning; ``taken``, (replica, seq, when), since the last time."""
        taken, self._taken = self._taken, []
        return {
            "at_s": time.monotonic(),
            "cpu_s": time.process_time(),
            "handled_s": self._handled_s,
            "reports": self._num_reports,
            "calls": self._num_calls,
            "grants": self.dispatcher.num_granted,
            "node_cpu_s": 0.0,
            "taken": taken,
        }


def over_ray(args: FairServeArgs, node: str) -> CounterTransport:
    """The way that the settings say, as if each of these nodes were one of Ray's."""
    straight = RayTransport(lambda: find_counter_actor(args.counter))
    return way_of_reports(args, straight, SystemClock(), f"{args.counter.name}-{node}")
