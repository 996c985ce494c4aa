"""Long polls: calls that wait until there is something to tell their router."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class LongPolls:
    """One event per waiting call."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def __len__(self) -> int:
        """Routers that wait."""
        return len(self._waiting)

    async def wait(self, router: str, longest_s: float) -> None:
        """Until the router is woken, at most ``longest_s`` seconds."""
        event = asyncio.Event()
        mine = self._waiting.setdefault(router, set())  # more than one when the router gave one up
        mine.add(event)
        try:
            async with asyncio.timeout(longest_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            mine.discard(event)
            if not mine:
                self._waiting.pop(router, None)

    def wake(self, routers: Iterable[str]) -> None:
        for router in routers:
            for event in self._waiting.get(router, ()):
                event.set()

    def wake_all(self) -> None:
        self.wake(self._waiting)
