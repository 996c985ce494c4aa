"""A model replica without a model: every running request gets a token at fixed times. All else is the real replica.

``engine.max_num_seqs`` requests run at a time, in the order of the local queue; prompts take no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

from fairserve.assembly import make_local_book
from fairserve.clock import SystemClock
from fairserve.cluster.counter_actor import start_counter_actor
from fairserve.cluster.counter_client import RayTransport
from fairserve.cluster.metrics_sink import deployment_metrics
from fairserve.cluster.replica import ModelReplica, ReplicaCore
from fairserve.config import FairServeArgs
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import Limits, StepEvents
from fairserve.engine.request import FinishReason, GenerateRequest, RequestOutput, Usage

STEPS_PER_S = 30
KV_TOKENS = 2**22
TEXT, TOKEN = " token", 4711


class StubLoop:
    """Stands for an ``EngineLoop``; runs ``slots`` requests at a time."""

    def __init__(self, book: LocalBook[GenerateRequest], on_step: Callable[[StepEvents], None], slots: int) -> None:
        self._book = book
        self._slots = slots
        self._on_step = on_step
        self._lock = threading.Lock()
        self._inbox: list[Callable[[], None]] = []
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._ended: list[RequestOutput] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.ended: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        self._is_over.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: GenerateRequest) -> None:
        self.call(lambda: self._add(request))

    def abort(self, request_id: str, only_if: Callable[[], bool] = lambda: True) -> None:
        self.call(lambda: self._abort(request_id) if only_if() else None)

    def call(self, fn: Callable[[], None]) -> None:
        with self._lock:
            self._inbox.append(fn)

    def _add(self, request: GenerateRequest) -> None:
        self._book.received(request)
        self._book.push(request)

    def _fill(self) -> None:
        while len(self._running) < self._slots and self._book.peek() is not None:
            request = self._book.pop()
            self._book.started(request.request_id, request.num_input, 0)
            self._running[request.request_id] = (request, 0)

    def _abort(self, request_id: str) -> None:
        usage = Usage(0, 0, 0)
        if request_id in self._running:
            request, num = self._running.pop(request_id)
            usage = Usage(request.num_input, 0, num)
        elif self._book.remove(request_id) is None:
            return
        self._book.finished(request_id)
        self._ended.append(RequestOutput(request_id, "", (), usage, (), "abort"))

    def _run(self) -> None:
        began_s, step = time.perf_counter(), 0
        while not self._is_over.is_set():
            step = max(step + 1, int((time.perf_counter() - began_s) * STEPS_PER_S))
            time.sleep(max(0.0, began_s + step / STEPS_PER_S - time.perf_counter()))
            with self._lock:
                items, self._inbox = self._inbox, []
            for item in items:
                item()
            self._fill()
            if self._running or self._ended or items:
                self._step()

    def _step(self) -> None:
        outputs, self._ended = self._ended, []
        num_decoded = len(self._running)
        for request_id, (request, num) in list(self._running.items()):
            self._book.output(request_id, 1)
            is_last = num + 1 >= request.sampling.max_tokens
            reason: FinishReason | None = "length" if is_last else None
            usage = Usage(request.num_input, 0, num + 1)
            outputs.append(RequestOutput(request_id, TEXT, (TOKEN,), usage, (), reason))
            if is_last:
                del self._running[request_id]
                self._book.finished(request_id)
            else:
                self._running[request_id] = (request, num + 1)
        room = KV_TOKENS - sum(one.num_input + num for one, num in self._running.values())
        num_running, num_waiting = len(self._running), len(self._book)
        free_slots = self._slots - num_running - num_waiting
        self._on_step(
            StepEvents(tuple(outputs), num_running, num_waiting, room, free_slots, num_decode_tokens=num_decoded)
        )


class StubReplica(ModelReplica):
    """A Serve deployment class like its parent."""

    async def __init__(self, args_json: str, slot: str = "") -> None:  # type: ignore[misc]
        from ray import serve

        whole = FairServeArgs.model_validate_json(args_json)
        args = whole.of_model(slot)
        actor = await asyncio.to_thread(start_counter_actor, whole)
        book: LocalBook[GenerateRequest] = make_local_book(args.fairness)
        name = serve.get_replica_context().replica_id.unique_id
        transport = RayTransport(lambda: start_counter_actor(whole), actor, slot)
        metrics = deployment_metrics(args.metrics, args.counter.name)
        slots = args.engine.max_num_seqs
        limits = Limits(8192, KV_TOKENS, slots, block_size=16, vocab_size=50_000)
        self._core = ReplicaCore(name, limits, book, transport, args, SystemClock(), metrics)
        self._core.start(StubLoop(book, self._core.on_step, slots))


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Applications that are built inside the block have no model."""
    with mock.patch("fairserve.app.ModelReplica", StubReplica):
        yield
