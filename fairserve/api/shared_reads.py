"""Many readers, one question: what several dashboards want to know is asked once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fairserve.clock import Clock

Answer = TypeVar("Answer")
KEEP_S = 1.0
"""How long an answer (a failure too) serves for equal questions."""
MAX_KEPT = 1000
"""Distinct questions remembered; the oldest are forgotten, whoever waits for one still gets its answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    at_s: float
    task: asyncio.Task[Any]


class SharedReads:
    """Equal questions within ``KEEP_S`` of each other share one call and its outcome, also while it runs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._asked: dict[Hashable, Asked] = {}
        """In the order of asking."""

    async def read(self, question: Hashable, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of ``ask``, or of an equal question's. A reader that leaves does not end the call for others."""
        now_s = self._clock.now_s()
        asked = self._asked.get(question)
        if asked is None or now_s - asked.at_s >= KEEP_S:
            asked = Asked(now_s, asyncio.ensure_future(_outcome(ask)))
            self._asked.pop(question, None)
            self._asked[question] = asked
            self._forget(now_s)
        answer, error = await asyncio.shield(asked.task)
        if error is not None:
            raise error
        return cast(Answer, answer)

    def clear(self) -> None:
        """Forget all answers: something was changed, and whoever changed it looks next."""
        self._asked.clear()

    def _forget(self, now_s: float) -> None:
        while self._asked:
            question, oldest = next(iter(self._asked.items()))
            if len(self._asked) <= MAX_KEPT and now_s - oldest.at_s < KEEP_S:
                return
            del self._asked[question]


async def _outcome(ask: Callable[[], Awaitable[Any]]) -> tuple[Any, Exception | None]:
    """The error is handed on as a value: that of a task nobody waits for any more would be logged as lost."""
    try:
        return await ask(), None
    except Exception as error:
        return None, error
