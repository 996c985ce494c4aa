"""The engine thread: requests come in through an inbox, events go out after each step."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from fairserve.clock import Clock, SystemClock
from fairserve.engine.engine import Engine
from fairserve.engine.events import StepEvents
from fairserve.engine.grammar import Grammars
from fairserve.engine.request import ErrorCode, GenerateRequest
from fairserve.errors import FairServeError, ReplicaDied, RequestError

logger = logging.getLogger(__name__)


class EngineLoop:
    """Drives one engine on its own thread. Every public method may be called from any thread.

    ``on_step`` is called on the engine thread, in order, after each step, and after inbox items that left nothing to
    run. It must be quick and must not raise.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepEvents], None],
        name: str = "engine",
        *,
        clock: Clock | None = None,
        step_timeout_s: float | None = None,
        nice: int = 0,
    ) -> None:
        """``step_timeout_s``: a step that runs for longer counts as stuck, and the loop as dead; None: never.
        ``nice``: added to the niceness of the engine thread and of the threads that it computes with, where the system
        gives each thread its own (Linux)."""
        self._engine = engine
        self._on_step = on_step
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._ended: str | None = None
        self._clock = clock or SystemClock()
        self._step_timeout_s = step_timeout_s
        self._step_began_s: float | None = None
        """When the step that is being computed began."""
        self._nice = nice
        self._stalled = False
        """The last step found nothing to compute although requests wait: only an inbox item can change that."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def grammars(self) -> Grammars:
        """To compile a grammar in before its request is submitted: else the engine thread does it."""
        return self._engine.grammars

    def submit(self, request: GenerateRequest) -> None:
        """Add a request. One that the engine refuses comes out as an output with finish_reason 'error'."""
        self.call(lambda: self._add(request))

    def abort(self, request_id: str, only_if: Callable[[], bool] = lambda: True) -> None:
        """End a request wherever it stands; ``only_if`` is asked on the engine thread, just before."""
        self.call(lambda: self._engine.abort(request_id) if only_if() else None)

    def call(self, fn: Callable[[], None]) -> None:
        """Run ``fn`` on the engine thread between two steps, in the order of the calls.

        Raises:
            ReplicaDied: the loop was stopped, or its engine broke.
        """
        with self._wake:
            if (ended := self.ended) is not None:
                raise ReplicaDied(ended)
            self._inbox.append(fn)
            self._wake.notify()

    def stop(self, timeout: float | None = None) -> bool:
        """Fail what is left, tell, and end the thread. True when it ended within ``timeout`` seconds."""
        with self._wake:
            self._stopping = True
            self._ended = self._ended or "its engine was stopped"
            self._wake.notify()
        if self._thread.ident is None:
            return True
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def is_alive(self) -> bool:
        """The thread runs, and not one step for longer than ``step_timeout_s``: a dead device or a deadlock in a
        library raises nothing."""
        return self._thread.is_alive() and self._why_stuck() is None

    @property
    def ended(self) -> str | None:
        """Why the loop takes nothing any more, None as long as it does."""
        return self._ended or self._why_stuck()

    def _why_stuck(self) -> str | None:
        began_s, limit_s = self._step_began_s, self._step_timeout_s
        if began_s is None or limit_s is None or (lasted_s := self._clock.now_s() - began_s) <= limit_s:
            return None
        return f"one step of its engine has been running for {lasted_s:.0f} s, {limit_s:g} s are allowed"

    def _run(self) -> None:
        if self._nice:
            _lower_priority(self._nice)
        try:
            self._drive()
        except BaseException as error:  # whatever ends the thread, nobody may hang on it
            logger.exception("the engine thread ends")
            self._engine.break_off(f"{type(error).__name__}: {error}")
        finally:
            with self._wake:
                self._ended = self._ended or self._engine.broken
                items = list(self._inbox)
                self._inbox.clear()
            for item in items:  # they learn that they came too late
                self._guarded(item)
            self._tell(self._engine.idle_events())
            self._guarded(self._engine.stop)

    def _drive(self) -> None:
        """Until the loop is stopped or the engine broken."""
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or (self._engine.has_work() and not self._stalled)):
                    self._wake.wait()
                items, stopping = list(self._inbox), self._stopping
                self._inbox.clear()
            for item in items:
                self._guarded(item)
            if stopping:
                self._guarded(lambda: self._engine.fail_all("the engine was stopped"))
                return
            events = self._step() if self._engine.has_work() else self._engine.idle_events()
            did = events.num_prefill_tokens + events.num_decode_tokens + events.num_preempted + len(events.outputs)
            self._stalled = not (did or events.num_out_of_memory)
            self._tell(events)
            if self._engine.broken is not None:
                return

    def _step(self) -> StepEvents:
        self._step_began_s = self._clock.now_s()
        events = self._engine.step()
        if (why := self._why_stuck()) is not None:  # it was taken for dead meanwhile, and stays so
            self._engine.break_off(why)
        self._step_began_s = None
        return events

    def _add(self, request: GenerateRequest) -> None:
        try:
            self._engine.add(request)
        except FairServeError as error:
            code: ErrorCode = "invalid_request" if isinstance(error, RequestError) else "replica_failed"
            self._engine.refuse(request.request_id, str(error), code)
        except Exception as error:  # a bug, a tokenizer's or a parameter's: nobody may hang on it
            logger.exception("request %s could not be taken", request.request_id)
            self._engine.refuse(request.request_id, f"the request could not be taken: {error}", "model_error")

    def _guarded(self, fn: Callable[[], None]) -> None:
        try:
            fn()
        except Exception:
            logger.exception("a call on the engine thread failed")

    def _tell(self, events: StepEvents) -> None:
        try:
            self._on_step(events)
        except Exception:
            logger.exception("on_step failed")


def _lower_priority(nice: int) -> None:
    """Of this thread and of those that it will start; torch makes a pool of its own for each thread that computes."""
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)
    except (AttributeError, OSError) as error:
        logger.warning("the engine thread keeps its priority: %s", error)
