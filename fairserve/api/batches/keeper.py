"""Of one ingress process: takes up batches that nobody runs, keeps its holds alive, and lets go of what it has lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fairserve.api.batches.files import Files
from fairserve.api.batches.hold import Hold
from fairserve.api.batches.runner import Runner
from fairserve.api.batches.store import BatchStore, OpenBatch
from fairserve.clock import Clock

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the folder."""
SWEEP_S = 600.0
"""Between two searches for what has expired."""
BEATS = 3
"""Signs of life in the time of a lease."""


@dataclass
class _Run:
    """A batch that runs here. Times are the clock's."""

    runner: Runner
    owner: str
    task: asyncio.Task[None]
    beat_s: float
    """When the last sign of life was given."""


@dataclass
class _Seen:
    """The lease of a batch that runs elsewhere, and since when it has not changed."""

    lease: int
    beat: int
    since_s: float


class BatchKeeper:
    """One batch of an owner runs here at a time, so that nobody fills the process; the oldest first.

    Args:
        store, files: the common folder.
        make_runner: runs a hold.
        lease_s: seconds without a sign of life after which a batch is free.
        clock: for leases.
        unix_time_s: for the end of a batch's window.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        store: BatchStore,
        files: Files,
        make_runner: Callable[[Hold], Runner],
        lease_s: float,
        *,
        clock: Clock,
        unix_time_s: Callable[[], float],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._files = files
        self._make_runner = make_runner
        self._lease_s = lease_s
        self._clock = clock
        self._unix_time_s = unix_time_s
        self._pause = pause
        self._runs: dict[str, _Run] = {}
        self._seen: dict[str, _Seen] = {}
        self._swept_s = clock.now_s() - SWEEP_S
        self._looking = asyncio.Lock()
        self._is_leaving = False

    async def run(self) -> None:
        """Look once a second, for ever."""
        is_reachable = True
        while True:
            try:
                await self.look()
                is_reachable = True
            except OSError as error:
                if is_reachable:
                    logger.warning("the folder of batches cannot be reached: %s", error)
                is_reachable = False
            except Exception:
                logger.exception("looking for batches failed")
            await self._pause(LOOK_S)

    async def look(self) -> None:
        """
        Raises:
            OSError: the folder cannot be reached.
        """
        async with self._looking:
            if self._is_leaving:
                return
            await self._look()
        if self._clock.now_s() - self._swept_s >= SWEEP_S:
            self._swept_s = self._clock.now_s()
            await asyncio.to_thread(self._files.sweep)
            await asyncio.to_thread(self._store.sweep)

    async def release(self) -> None:
        """This process is about to end: take up nothing more and give back what runs, so that others go on with it as
        soon as they look. Lines that are under way are dropped here, and run again there."""
        self._is_leaving = True
        async with self._looking:  # what is being claimed now is given back, too
            await self.close()
            for batch_id, run in self._runs.items():
                try:
                    await asyncio.to_thread(run.runner.hold.release)
                except OSError as error:
                    logger.warning("batch %s: others go on when its lease has run out: %s", batch_id, error)

    async def _look(self) -> None:
        for batch_id, run in list(self._runs.items()):
            if run.task.done():
                del self._runs[batch_id]
            else:
                await self._tend(batch_id, run)
        for one in await asyncio.to_thread(self._store.open):
            if self._is_free(one) and (hold := await asyncio.to_thread(self._store.claim, one)) is not None:
                self._begin(one, hold)

    async def settled(self) -> None:
        """Wait until nothing runs here any more."""
        await asyncio.gather(*(run.task for run in self._runs.values()), return_exceptions=True)

    async def close(self) -> None:
        """Let go of everything and tell nobody: others go on with it when the leases have run out."""
        for run in self._runs.values():
            run.task.cancel()
        await self.settled()

    def _is_free(self, one: OpenBatch) -> bool:
        """Nobody runs it, and it is its turn here."""
        if one.id in self._runs:
            return False
        now_s = self._clock.now_s()
        seen = self._seen.get(one.id)
        if seen is None or (seen.lease, seen.beat) != (one.lease, one.beat):
            seen = self._seen[one.id] = _Seen(one.lease, one.beat, now_s)
        is_held = one.lease > 0 and not one.is_free and now_s - seen.since_s < self._lease_s
        return not is_held and all(run.owner != one.owner for run in self._runs.values())

    def _begin(self, one: OpenBatch, hold: Hold) -> None:
        self._seen.pop(one.id, None)
        runner = self._make_runner(hold)
        task = asyncio.create_task(self._work(runner))
        self._runs[one.id] = _Run(runner, one.owner, task, self._clock.now_s())

    async def _work(self, runner: Runner) -> None:
        hold = runner.hold
        try:
            await runner.run()
            await asyncio.to_thread(self._store.publish, hold)
        except Exception as error:
            if not await asyncio.to_thread(hold.is_lost):
                logger.error("batch %s stopped, and is taken up again later", hold.batch_id, exc_info=error)
                return
            # Others have finished it and taken away what it read; what it made since then goes, too.
            await asyncio.to_thread(self._store.publish, hold)

    async def _tend(self, batch_id: str, run: _Run) -> None:
        now_s, hold = self._clock.now_s(), run.runner.hold
        try:
            if now_s - run.beat_s >= self._lease_s / BEATS:
                await asyncio.to_thread(hold.beat)
                run.beat_s = now_s
            is_lost = await asyncio.to_thread(hold.is_lost)
            is_cancelled = await asyncio.to_thread(hold.is_cancelled)
            await run.runner.tell()
        except OSError as error:
            is_lost, is_cancelled = now_s - run.beat_s >= self._lease_s, False
            logger.warning("batch %s: the folder cannot be reached: %s", batch_id, error)
        if is_lost and not run.runner.is_ending:
            logger.warning("batch %s: another ingress goes on with it", batch_id)
            run.task.cancel()
        elif is_cancelled:
            run.runner.stop("cancelled")
        elif self._unix_time_s() >= hold.expires_s:
            run.runner.stop("expired")
