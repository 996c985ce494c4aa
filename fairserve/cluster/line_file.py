"""A file of lines that is written now and then, off the path of whoever makes them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000_000
MAX_PENDING = 200_000
"""Lines kept while the disk is slow; beyond that the oldest are dropped."""


class LineFile:
    """``write`` only remembers; ``flush``, which may block and never raises, appends: when it returns, all that was
    remembered before is in the file. At ``max_bytes`` the file moves
    to FILE.1, over the one before, and the next one begins with ``heading()``, where that is not empty."""

    def __init__(self, path: str, max_bytes: int = MAX_BYTES, heading: Callable[[], str] = str) -> None:
        self._path = Path(path).expanduser()
        self._max_bytes = max_bytes
        self._heading = heading
        self._has_moved = False
        self._pending: deque[str] = deque(maxlen=MAX_PENDING)
        self._flushing = threading.Lock()

    def write(self, line: str) -> None:
        self._pending.append(line)

    def flush(self) -> None:
        with self._flushing:
            self._append()

    def _append(self) -> None:
        lines = [self._pending.popleft() for _ in range(len(self._pending))]
        if not lines:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._has_moved and (heading := self._heading()) and lines[0] != heading:
                lines.insert(0, heading)
            with self._path.open("a") as file:
                file.writelines(line + "\n" for line in lines)
                size = file.tell()
            self._has_moved = size >= self._max_bytes
            if self._has_moved:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        except OSError:
            logger.exception("%d lines could not be written to %s", len(lines), self._path)
