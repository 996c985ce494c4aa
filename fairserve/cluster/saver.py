"""The counter actor's counters go into a store about once a second, beside its decisions; other clusters' come out.

Cuts are taken in slices between which the event loop is free; rows are encoded and written on another thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

from fairserve.dispatch.cut import Cut
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.dispatch.store import Head, OutOfStep, Store, Superseded

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 10.0
"""Between two tries while the store cannot be reached."""
RESTART = 1_000_000
"""Cuts that a restart skips: what a store may have lost of the newest must not be taken for known by others."""
PART = 200
"""Accounts merged in one go."""


class Saver:
    """``cluster`` makes or finds the id of this Ray cluster; ``life`` is this one of the authority."""

    def __init__(
        self,
        cluster: Callable[[], str],
        life: int,
        unix_s: Callable[[], float],
        now_s: Callable[[], float],
    ) -> None:
        self._find_cluster = cluster
        self._cluster = ""
        self._head = Head(incarnation=life, life=life)
        self._unix_s = unix_s
        self._now_s = now_s
        self._cutting = asyncio.Lock()
        self._is_whole_due = True
        self._num_failures = 0
        self._retry_s = -math.inf
        self._knows_others = False

    @property
    def cluster(self) -> str:
        self._cluster = self._cluster or self._find_cluster()
        return self._cluster

    @property
    def incarnation(self) -> int:
        """When counting began, by the life of the authority that began it."""
        return self._head.incarnation

    def go_on(self, head: Head | None) -> None:
        """This life counts on from the snapshot with this head. None: from one of another cluster, or from the very
        beginning of all."""
        self._knows_others = True
        if head is None:
            return
        life = max(self._head.life, head.life + 1)
        self._head = replace(head, life=life, incarnation=head.incarnation or life, seq=head.seq + RESTART)

    def moved(self) -> None:
        """There is another store now."""
        self._knows_others = False
        self._is_whole_due = True
        self._num_failures, self._retry_s = 0, -math.inf

    async def take(self, dispatcher: Dispatcher) -> tuple[Head, Cut]:
        """A whole cut, to be looked at."""
        async with self._cutting:
            self._is_whole_due = True  # the next one saved, as this one took note of what had changed
            cut = await _driven(dispatcher, is_whole=True)
            return self._next_head(), cut

    async def save(self, store: Store, dispatcher: Callable[[], Dispatcher]) -> bool:
        """Whether what changed since the last time is kept now. Of failures only the first is told, and when it works
        again; meanwhile it is tried ever more seldom."""
        if self._now_s() < self._retry_s:
            return False
        async with self._cutting:
            is_whole, self._is_whole_due = self._is_whole_due, True  # until it is kept
            cut = await _driven(dispatcher(), is_whole=is_whole)
            head = self._next_head()
            try:
                await asyncio.to_thread(store.save, cut, head)
            except OutOfStep:
                return False
            except (OSError, ValueError, Superseded) as error:
                self.failed(store, error)
                return False
            self._head, self._is_whole_due = head, False
        if self._num_failures:
            logger.warning("saved again in %s, after %d failures", store.place, self._num_failures)
            self._num_failures = 0
        return True

    def failed(self, store: Store, error: Exception) -> None:
        """It could not be reached: wait."""
        if not self._num_failures:
            logger.warning("nothing is saved in %s for now, serving goes on: %s", store.place, error)
        self._num_failures += 1
        self._retry_s = self._now_s() + min(LONGEST_WAIT_S, 2.0 ** (self._num_failures - 1))

    async def merge_others(self, store: Store, dispatcher: Callable[[], Dispatcher]) -> None:
        """Charge what other clusters that share the store have served since the last time. Where nothing is known of
        them from earlier, what they served until now is charged to nobody: totals without the lifts of that time would
        say that a newcomer is far behind."""
        known = dispatcher().ledger.known_clusters()
        for news in await asyncio.to_thread(store.others, known):
            as_baseline = not self._knows_others and (news.cluster, news.incarnation) not in known
            accounts = iter(news.totals.items())
            while part := dict(islice(accounts, PART)):
                dispatcher().merge_cluster(
                    news.cluster, news.incarnation, part, news.weights, 0, as_baseline=as_baseline
                )
                await asyncio.sleep(0)
            dispatcher().merge_cluster(news.cluster, news.incarnation, {}, {}, news.seq)
        self._knows_others = True

    def _next_head(self) -> Head:
        return replace(self._head, cluster=self.cluster, seq=self._head.seq + 1, saved_s=self._unix_s())


async def _driven(dispatcher: Dispatcher, *, is_whole: bool) -> Cut:
    steps = dispatcher.cutter.steps(is_whole=is_whole)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            cut: Cut = end.value
            return cut
        await asyncio.sleep(0)
