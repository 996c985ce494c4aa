"""The engine thread: requests come in through an inbox, events go out after each step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from fairserve.engine.engine import Engine
from fairserve.engine.events import StepEvents
from fairserve.engine.request import GenerateRequest
from fairserve.errors import FairServeError, ReplicaDied

logger = logging.getLogger(__name__)


class EngineLoop:
    """Drives one engine on its own thread. Every public method may be called from any thread.

    ``on_step`` is called on the engine thread, in order, after each step, and after inbox items that left nothing to
    run. It must be quick and must not raise.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepEvents], None], name: str = "engine") -> None:
        self._engine = engine
        self._on_step = on_step
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._stalled = False
        """The last step found nothing to compute although requests wait: only an inbox item can change that."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        """Add a request. One that the engine refuses comes out as an output with finish_reason 'error'."""
        self.call(lambda: self._add(request))

    def abort(self, request_id: str, only_if: Callable[[], bool] = lambda: True) -> None:
        """End a request wherever it stands; ``only_if`` is asked on the engine thread, just before."""
        self.call(lambda: self._engine.abort(request_id) if only_if() else None)

    def call(self, fn: Callable[[], None]) -> None:
        """Run ``fn`` on the engine thread between two steps, in the order of the calls.

        Raises:
            ReplicaDied: the loop was stopped.
        """
        with self._wake:
            if self._stopping:
                raise ReplicaDied("its engine was stopped")
            self._inbox.append(fn)
            self._wake.notify()

    def stop(self, timeout: float | None = None) -> bool:
        """Fail what is left, tell, and end the thread. True when it ended within ``timeout`` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            return True
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
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
                self._tell(self._engine.idle_events())
                return
            events = self._step()
            did = (events.num_prefill_tokens, events.num_decode_tokens, events.num_preempted, len(events.outputs))
            self._stalled = not any(did)
            self._tell(events)

    def _step(self) -> StepEvents:
        if not self._engine.has_work():
            return self._engine.idle_events()
        try:
            return self._engine.step()
        except Exception as error:
            # The engine handles what a model can do wrong; this is a bug in the bookkeeping. Nobody may hang on it.
            logger.exception("the engine failed outside a step")
            message = f"the engine failed: {error}"
            self._guarded(lambda: self._engine.fail_all(message))
            return self._engine.idle_events()

    def _add(self, request: GenerateRequest) -> None:
        try:
            self._engine.add(request)
        except FairServeError as error:
            self._engine.refuse(request.request_id, str(error))
        except Exception as error:  # a bug, or a tokenizer's: nobody may hang on it
            logger.exception("request %s could not be taken", request.request_id)
            self._engine.refuse(request.request_id, f"the request could not be taken: {error}")

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
