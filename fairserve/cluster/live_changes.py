"""Changes to a running service: planned at the desk, kept, and only then in force; shared with other clusters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any

from fairserve.cluster.desk import MAX_AUDIT, Change, Desk
from fairserve.cluster.keeper import Keeper
from fairserve.dispatch.controls import NO_CONTROL
from fairserve.dispatch.store import Overtaken, Store


class LiveChanges:
    """``audit``: the newest entries that an earlier life kept, oldest first. ``took_over`` is called when another
    cluster that shares the store has changed something, with the clients whose controls differ from then on."""

    def __init__(
        self,
        desk: Desk,
        keeper: Keeper,
        audit: list[dict[str, Any]],
        took_over: Callable[[Iterable[str]], None],
    ) -> None:
        self._desk = desk
        self._keeper = keeper
        self._audit = audit
        self._took_over = took_over
        self._changing = asyncio.Lock()
        """Held while something changes that is kept before it is in force."""
        self._seen: str | None = None

    async def make(self, plan: Callable[[], Change], apply: Callable[[Change], None]) -> Any:
        """Check, keep, adopt, apply; one change at a time. What is kept is adopted even when the caller has gone.
        Returns the plan's answer."""

        async def make() -> Any:
            async with self._changing:
                change = plan()
                await asyncio.to_thread(self._keeper.keep, change)
                self._desk.adopt(change)
                apply(change)
                return change.answer

        return await asyncio.shield(asyncio.create_task(make()))

    async def move(self, store: Store | None) -> None:
        """From now on they are kept there, or nowhere."""
        async with self._changing:
            await asyncio.to_thread(self._keeper.move, store, self._desk.state)

    def put_back(self) -> None:
        """The store was set aside when this life began: into the new one."""
        self._keeper.put_back(self._desk.state, self._audit)

    async def share(self, store: Store) -> None:
        """Take over what another cluster changed live, or tell what was changed here."""
        async with self._changing:
            try:
                shared = await asyncio.to_thread(self._keeper.share, self._desk.state, self._seen)
            except Overtaken:  # the next round takes it over
                return
            state, self._seen = shared
            if state is None:
                return
            audit = [json.loads(entry) for entry in await asyncio.to_thread(store.load_audit, MAX_AUDIT)]
            before = self._desk.state.controls
            self._desk.take_over(state, audit)
            clients = {**before, **state.controls}
            self._took_over([one for one in clients if self._desk.control(one) != before.get(one, NO_CONTROL)])
