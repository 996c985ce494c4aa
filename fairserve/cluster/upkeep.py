"""What should outlive the counter actor: taken from the store when a life begins, and put there about once a second."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from fairserve.cluster.authority import Authority
from fairserve.cluster.desk import MAX_AUDIT, Desk
from fairserve.cluster.keeper import Keeper
from fairserve.cluster.reading import Reading
from fairserve.cluster.saver import Saver
from fairserve.dispatch.controls import NO_CONTROL
from fairserve.dispatch.cut import Cut
from fairserve.dispatch.history import WEEK_S
from fairserve.dispatch.messages import StepReport
from fairserve.dispatch.snapshots import adopted
from fairserve.dispatch.store import Head, Overtaken, Store

logger = logging.getLogger(__name__)

MAX_RESTORED = 300_000
"""Points of history that a restart waits for."""


class Upkeep:
    """``took_over`` is called when another cluster that shares the store has changed settings or controls."""

    def __init__(
        self,
        authority: Authority,
        desk: Desk,
        reading: Reading,
        keeper: Keeper,
        saver: Saver,
        took_over: Callable[[], None],
        unix_s: Callable[[], float],
    ) -> None:
        self.keeper = keeper
        self.changing = asyncio.Lock()
        """Held while something changes that is kept before it is in force."""
        self._authority = authority
        self._desk = desk
        self._reading = reading
        self._saver = saver
        self._took_over = took_over
        self._unix_s = unix_s
        self._seen_live: str | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._saved_acks: dict[tuple[str, int], int] = {}
        """What the snapshot in the store has of each replica's reports."""

    @property
    def cluster(self) -> str:
        """Id of this Ray cluster."""
        return self._saver.cluster

    def restore(self, audit: list[dict[str, Any]]) -> tuple[str, str]:
        """Where the counters go on from: a snapshot, or nowhere (""), and why nowhere if there was one."""
        restored, why, store = "", "", self.keeper.store
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
            self.keeper.put_back(self._desk.state, audit)
        usage = self._authority.usage
        try:
            if restored:
                usage.load(store.load_usage(range(usage.first_day, usage.now.day + 1)))
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
        if self.keeper.store is None:
            return None
        return self._saved_acks.get((report.replica, report.incarnation), 0)

    async def cut(self) -> tuple[Head, Cut]:
        """Everything, as of one moment."""
        return await self._saver.take(self._authority.dispatcher)

    async def move(self, store: Store | None, *, is_shared: bool) -> None:
        """From now on to another store, or to none."""
        async with self.changing:
            self._saver.moved()
            self._saved_acks = {}
            self._authority.usage.save_all_again()
            await asyncio.to_thread(self.keeper.move, store, self._desk.state)
            self._authority.share(is_shared)

    def begin(self) -> bool:
        """Save beside what the event loop does; False while the last time still goes on (a store may hang), and where
        there is no store."""
        store = self.keeper.store
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
                await self._share_changes(store)
        except (OSError, ValueError) as error:
            saver.failed(store, error)
        except Exception:
            logger.exception("what should outlive the counter actor could not be kept")

    async def _share_changes(self, store: Store) -> None:
        """Take over what another cluster changed live, or tell what was changed here."""
        async with self.changing:
            try:
                shared = await asyncio.to_thread(self.keeper.share, self._desk.state, self._seen_live)
            except Overtaken:  # the next round takes it over
                return
            state, self._seen_live = shared
            if state is None:
                return
            audit = [json.loads(entry) for entry in await asyncio.to_thread(store.load_audit, MAX_AUDIT)]
            before = self._desk.state.controls
            self._desk.take_over(state, audit)
            for client in {**before, **state.controls}:
                if self._desk.control(client) != before.get(client, NO_CONTROL):
                    self._authority.control(client, self._desk.control(client))
            self._took_over()
