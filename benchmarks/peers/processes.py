"""A driver's process: started, told what to run, and stopped (SIGSTOP) while it is another's turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

from benchmarks.peers.driver import Spec
from benchmarks.peers.environments import ROOT

LIMIT_S = 1_800.0
"""For one answer; an engine that takes longer is ended, and is out of the comparison."""
TAIL = 800
"""Characters of what a driver that failed wrote to stderr."""


class DriverFailed(Exception):
    """The peer is left out from then on, with this as the reason."""


class Process:
    def __init__(self, python: str, module: str, spec: Spec, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(spec.threads)}
        self.started_s = time.monotonic()
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._tell(asdict(spec))

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ready(self) -> tuple[dict[str, str], float]:
        """Versions of what runs there, and seconds from the start of the process until its first two tokens.

        Raises:
            DriverFailed: it ended, or took too long.
        """
        versions: dict[str, str] = self._answer()["versions"]
        return versions, time.monotonic() - self.started_s

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One line there, one line back.

        Raises:
            DriverFailed: it ended, or took too long.
        """
        self._tell(message)
        return self._answer()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DriverFailed(self._last_words()) from None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._limit_s, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise DriverFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait(timeout=60)
        if -status == signal.SIGKILL:
            return f"killed: out of memory, or no answer within {self._limit_s:g} s"
        self._log.seek(0)
        return f"its driver ended with {status}: {self._log.read()[-TAIL:].strip()}"
