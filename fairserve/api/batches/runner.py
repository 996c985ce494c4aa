"""The lines of one batch: checked, then asked, a few at a time, each answer kept before it counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Literal

from fairserve.api.batches.disk import Json
from fairserve.api.batches.hold import End, Hold
from fairserve.api.batches.lines import Answered, Line, checked, parsed, read_lines
from fairserve.api.batches.usage import NO_USAGE, of_body, of_line
from fairserve.api.identity import Client

Ask = Callable[[str, Line, Client], Awaitable[Answered]]
READ_AHEAD = 16
"""Lines read at a time."""
Stop = Literal["expired", "cancelled"]


class Runner:
    """Runs what ``hold`` holds.

    Args:
        ask: makes the answer of one line.
        client: as whom the lines run.
        max_running: lines that are asked at the same time.
        max_lines, max_body_bytes: what a batch and a line of it may hold.
        unix_time_s: for the times in the batch.
    """

    def __init__(
        self,
        hold: Hold,
        ask: Ask,
        client: Client,
        *,
        max_running: int,
        max_lines: int,
        max_body_bytes: int,
        unix_time_s: Callable[[], float],
    ) -> None:
        self.hold = hold
        self.is_ending = False
        """All is answered, and how the batch ends is being decided."""
        self._ask = ask
        self._client = client
        self._max_running = max_running
        self._max_lines = max_lines
        self._max_body_bytes = max_body_bytes
        self._unix_time_s = unix_time_s
        self._stop: Stop | None = None
        self._working: asyncio.Task[None] | None = None
        self._done: set[int] = set()
        self._num_ok = 0
        self._used = NO_USAGE
        self._num_total = 0
        self._state: Json = {}
        self._told: Json = {}
        self._reading = asyncio.Lock()
        self._lines: Iterator[tuple[int, bytes | None]] = iter(())
        self._ahead: list[Line] = []
        self._writing = asyncio.Lock()
        self._unwritten: list[tuple[Line, Answered]] = []

    async def run(self) -> None:
        """To the end, or until :meth:`stop`. Cancel it to let go of the batch.

        Raises:
            OSError: the folder cannot be reached; another holder may go on.
        """
        hold = self.hold
        self._state = await asyncio.to_thread(hold.told)
        total, problems = await asyncio.to_thread(
            checked, hold.input, hold.endpoint, self._max_lines, self._max_body_bytes
        )
        if problems:
            await self._finish("failed", problems)
            return
        self._num_total = total
        await asyncio.to_thread(self._recall)
        self._state.setdefault("in_progress_at", self._now_s())
        self._state["status"] = "in_progress"
        await self.tell()
        self._lines = read_lines(hold.input, self._max_body_bytes)
        self._working = asyncio.create_task(self._work())
        if self._stop is not None:
            self._working.cancel()
        try:
            await self._working
        except asyncio.CancelledError:
            if self._stop is None or _is_cancelled():
                raise
        finally:
            self._working.cancel()
        # Stopped in the very moment in which the last line was answered, it is complete all the same.
        is_whole = len(self._done) == self._num_total
        self._state |= {"status": "finalizing", "finalizing_at": self._now_s()}
        await self.tell()
        await self._finish("completed" if is_whole or self._stop is None else self._stop)

    def stop(self, why: Stop) -> None:
        """Ask no more lines, drop those that run, and finish with what is answered."""
        if self._stop is None:
            self._stop = why
            if self._working is not None:
                self._working.cancel()

    async def tell(self) -> None:
        """Show how far it is, if there is news."""
        progress = self._state | self._sums()
        if self._state and progress != self._told:
            self._told = progress
            await asyncio.to_thread(self.hold.tell, progress)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._max_running, self._num_total - len(self._done))):
                group.create_task(self._one_after_another())

    async def _one_after_another(self) -> None:
        while (line := await self._next()) is not None:
            await self._keep(line, await self._ask(self.hold.endpoint, line, self._client))

    async def _next(self) -> Line | None:
        """A line that nobody has answered or asks now."""
        async with self._reading:
            if not self._ahead:
                self._ahead = await asyncio.to_thread(self._read_ahead)
            return self._ahead.pop(0) if self._ahead else None

    def _read_ahead(self) -> list[Line]:
        missing = ((number, raw) for number, raw in self._lines if number not in self._done)
        return [parsed(number, raw, self.hold.endpoint) for number, raw in islice(missing, READ_AHEAD)]

    async def _keep(self, line: Line, answered: Answered) -> None:
        """Returns when the answer is on disk; answers that come while the disk is busy go there together."""
        self._unwritten.append((line, answered))
        async with self._writing:
            if not self._unwritten:
                return  # another one's write has taken it along
            answers, self._unwritten = self._unwritten, []
            await asyncio.to_thread(self.hold.keep, answers)
            self._done.update(line.number for line, _ in answers)
            for _, answered in answers:
                if answered.is_ok:
                    self._num_ok, self._used = self._num_ok + 1, self._used + of_body(answered.body)

    def _recall(self) -> None:
        for number, ok, answer in self.hold.answers():
            self._done.add(number)
            if ok:
                self._num_ok, self._used = self._num_ok + 1, self._used + of_line(answer)

    async def _finish(self, end: End, problems: list[Json] | None = None) -> None:
        self.is_ending = True
        progress = self._state | self._sums()
        await asyncio.to_thread(
            self.hold.finish, end, self._now_s(), progress, max_body_bytes=self._max_body_bytes, problems=problems
        )

    def _sums(self) -> Json:
        counts = {
            "total": self._num_total,
            "completed": self._num_ok,
            "failed": len(self._done) - self._num_ok,
        }
        return {"request_counts": counts, "usage": self._used.told()}

    def _now_s(self) -> int:
        return int(self._unix_time_s())


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
