"""Keys that are created and revoked while the service runs: every ingress asks the counter actor for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fairserve.api.identity import Identities
from fairserve.config import ApiKey

logger = logging.getLogger(__name__)

POLL_S = 1.0
START_S = 30.0
UNKNOWN = -1
"""Version of the directory before the first answer."""

Ask = Callable[[int], Awaitable[dict[str, Any] | None]]


class LiveKeys:
    """Exchanges the directory of callers, as a whole, when live keys change.

    Args:
        deployed: who has a key of the deployment.
        ask: the counter actor's ``key_directory``, with a time-out of its own; may raise anything.
        adopt: takes the directory that holds from now on.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        deployed: Identities,
        ask: Ask,
        adopt: Callable[[Identities], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._deployed = deployed
        self._ask = ask
        self._adopt = adopt
        self._pause = pause
        self._version = UNKNOWN
        self._is_reachable = True
        self._is_open = deployed.is_open

    async def refresh(self) -> bool:
        """Ask once. False: the actor did not answer, or with something wrong, and the last directory stays."""
        try:
            directory = await self._ask(self._version)
            if directory is not None:
                self._take(int(directory["version"]), tuple(ApiKey(**entry) for entry in directory["keys"]))
        except Exception as error:
            if self._is_reachable:
                logger.warning("the live API keys could not be refreshed, the last ones hold: %r", error)
            self._is_reachable = False
            return False
        self._is_reachable = True
        return True

    async def begin(self) -> None:
        """Ask for the first time. A service without deployed keys waits for the answer: it cannot know whether it is
        open.

        Raises:
            RuntimeError: it waited for 30 s.
        """
        waited_s = 0.0
        while not await self.refresh() and self._deployed.is_open:
            if waited_s >= START_S:
                raise RuntimeError("the counter actor does not answer, and without it nobody knows who may call")
            waited_s += POLL_S
            await self._pause(POLL_S)

    async def run(self) -> None:
        """Refresh once a second, for ever."""
        while True:
            await self._pause(POLL_S)
            await self.refresh()

    def _take(self, version: int, keys: tuple[ApiKey, ...]) -> None:
        # 0: there never was a live key. Who was closed stays closed, even if the actor has lost its memory.
        identities = self._deployed.with_live(keys) if version or self._version > 0 else self._deployed
        self._adopt(identities)
        was_open, self._is_open, self._version = self._is_open, identities.is_open, version
        if was_open and not self._is_open:
            logger.warning("the service is no longer OPEN: from now on a caller needs a key")
        elif version:
            logger.info("%d live API keys hold (version %d)", len(keys), version)
