"""What should outlive the counter actor: taken from the store when a life begins, and put there about once a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fairserve.cluster.authority import Authority
from fairserve.cluster.live_changes import LiveChanges
from fairserve.cluster.reading import Reading
from fairserve.cluster.saver import Saver
from fairserve.dispatch.cut import Cut
from fairserve.dispatch.history import WEEK_S
from fairserve.dispatch.messages import StepReport
from fairserve.dispatch.snapshots import adopted
from fairserve.dispatch.store import Head, Store

logger = logging.getLogger(__name__)

MAX_RESTORED = 300_000
"""Points of history that a restart waits for."""


class Upkeep:
    """Of one model's counters. ``store``: where they go, None for nowhere. ``changes``: what was changed live, where
    that is kept beside them and shared with the clusters that share the store."""

    def __init__(
        self,
        authority: Authority,
        reading: Reading,
        saver: Saver,
        store: Store | None,
        changes: LiveChanges | None,
        unix_s: Callable[[], float],
    ) -> None:
        self.store = store
        self._authority = authority
        self._changes = changes
        self._reading = reading
        self._saver = saver
        self._unix_s = unix_s
        self._keeping: asyncio.Task[None] | None = None
        self._saved_acks: dict[tuple[str, int], int] = {}
        """What the snapshot in the store has of each replica's reports."""

    @property
    def cluster(self) -> str:
        """Id of this Ray cluster."""
        return self._saver.cluster

    @property
    def incarnation(self) -> int:
        """When counting began: see :class:`~fairserve.dispatch.store.Head`."""
        return self._saver.incarnation

    def restore(self) -> tuple[str, str]:
        """Where the counters go on from: a snapshot, or nowhere (""), and why nowhere if there was one."""
        restored, why, store = "", "", self.store
        is_mine = True
        if store is None:
            return restored, why
        mine = self._saver.cluster  # asks Ray now: later the event loop would wait for the answer
        is_shared = self._authority.args.counter.is_in_redis
        try:
            found = store.load()
            if found is None:
                self._saver.go_on(None)
            else:
                head, snapshot = found
                is_mine = head.cluster in ("", mine) or not is_shared
                alive = {one.cluster for one in store.heads()}
                self._authority.dispatcher.load(snapshot if is_mine else adopted(head, snapshot, alive))
                restored = "snapshot"
                self._saver.go_on(head if is_mine else None)
        except OSError as error:
            why = f"{error}"
            logger.error("counters begin level: %s", why)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            try:
                why = f"{error}; set aside as {store.set_aside()}"
            except OSError as failed:
                why = f"{error}; it could not be set aside: {failed}"
            logger.error("counters begin level: %s", why)
            self._authority.begin_level()
            if self._changes is not None:
                self._changes.put_back()
        usage = self._authority.usage
        try:
            if restored:
                days, hours = range(usage.first_day, usage.now.day + 1), range(usage.first_hour, usage.now.hour + 1)
                usage.load(store.load_usage(days), store.load_usage_hours(hours))
            if restored and not is_mine:
                usage.save_all_again()
        except (OSError, ValueError) as error:
            logger.error("usage begins anew: %s", error)
        try:
            if not why:
                self._reading.history_book.load(store.load_history(60, self._unix_s() - WEEK_S, MAX_RESTORED))
        except (OSError, ValueError) as error:
            logger.error("history begins anew: %s", error)
        return restored, why

    def saved_of(self, report: StepReport) -> int | None:
        """The newest report of this replica's life that is in the store; None where nothing is kept."""
        if self.store is None:
            return None
        return self._saved_acks.get((report.replica, report.incarnation), 0)

    async def cut(self) -> tuple[Head, Cut]:
        """Everything, as of one moment."""
        return await self._saver.take(self._authority.dispatcher)

    async def move(self, store: Store | None, *, is_shared: bool) -> None:
        """From now on to another store, or to none."""
        self._saver.moved()
        self._saved_acks = {}
        self._authority.usage.save_all_again()
        self.store = store
        if self._changes is not None:
            await self._changes.move(store)
        self._authority.share(is_shared)

    def begin(self) -> bool:
        """Save beside what the event loop does; False while the last time still goes on (a store may hang), and where
        there is no store."""
        store = self.store
        if store is None or not (self._keeping is None or self._keeping.done()):
            return False
        self._keeping = asyncio.create_task(self.keep(store))
        return True

    async def keep(self, store: Store) -> None:
        """Save what changed; exchange with the clusters that share the store."""
        saver, authority = self._saver, self._authority
        try:
            acks = authority.dispatcher.ledger.acks()
            if not await saver.save(store, lambda: authority.dispatcher):
                return
            self._saved_acks = acks
            if rows := self._reading.take_new_rows():
                await asyncio.to_thread(store.save_history, rows, {60: self._unix_s() - WEEK_S})
            if authority.is_shared:
                await saver.merge_others(store, lambda: authority.dispatcher)
                if self._changes is not None:
                    await self._changes.share(store)
        except (OSError, ValueError) as error:
            saver.failed(store, error)
        except Exception:
            logger.exception("what should outlive the counter actor could not be kept")
