"""The routers as the actor sees them: what each has been told, what it has acknowledged, and who must be woken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fairserve.dispatch.messages import Grant, Refusal, RouterCall

ANSWER_S = 3.0
"""A router that waits for grants asks for them all the time, and its next call acknowledges what the last one brought.
One that leaves a grant without an answer for so long is gone; one that was only slow submits again."""


@dataclass(slots=True)
class RouterSession:
    """Grants and late refusals stay in ``outbox`` until acknowledged, so that a lost reply loses nothing."""

    router: str
    incarnation: int
    heard_s: float
    is_complete: bool
    """The authority knows every request that waits there; if not, the router is asked to submit all again."""
    last_seq: int = 0
    last_refusals: tuple[Refusal, ...] = ()
    requests: set[str] = field(default_factory=set)
    """Every request of this router that waits or is granted and not finished."""
    outbox: dict[str, Grant | Refusal] = field(default_factory=dict)
    """By request."""
    told_s: float = 0.0
    """When there was something in the outbox, after nothing."""

    def is_dead(self, now_s: float, dead_s: float) -> bool:
        """No call for ``dead_s``, or none for ``ANSWER_S`` although there is something to fetch. The requests of a dead
        router must not be granted for long: each grant holds room that nobody will use until its lease lapses."""
        waits_s = now_s - max(self.heard_s, self.told_s)
        return now_s - self.heard_s > dead_s or (bool(self.outbox) and waits_s > ANSWER_S)

    def is_repeat(self, call: RouterCall) -> bool:
        return call.seq <= self.last_seq

    @property
    def grants(self) -> tuple[Grant, ...]:
        return tuple(news for news in self.outbox.values() if isinstance(news, Grant))

    @property
    def late_refusals(self) -> tuple[Refusal, ...]:
        return tuple(news for news in self.outbox.values() if isinstance(news, Refusal))

    def is_refused(self, request_id: str) -> bool:
        """It was refused after it had been accepted, and the router may not know."""
        return isinstance(self.outbox.get(request_id), Refusal)

    def acknowledge(self, grants_ack: int) -> None:
        for news in [news for news in self.outbox.values() if news.seq <= grants_ack]:
            del self.outbox[news.request_id]

    def withdraw(self, request_id: str) -> None:
        """Take back a grant that was not acknowledged."""
        self.outbox.pop(request_id, None)


class Sessions:
    """By router."""

    def __init__(self) -> None:
        self._sessions: dict[str, RouterSession] = {}
        self._to_wake: set[str] = set()

    def __iter__(self) -> Iterator[RouterSession]:
        return iter(self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, router: str) -> RouterSession | None:
        return self._sessions.get(router)

    def add(self, session: RouterSession) -> None:
        self._sessions[session.router] = session

    def remove(self, router: str) -> None:
        del self._sessions[router]

    def tell(self, router: str, news: Grant | Refusal, now_s: float) -> None:
        """The router, which is known, gets this with its next call, and should make it now."""
        session = self._sessions[router]
        if not session.outbox:
            session.told_s = now_s
        session.outbox[news.request_id] = news
        self._to_wake.add(router)

    def take_to_wake(self) -> set[str]:
        """Routers that have something to be told since the last call."""
        routers, self._to_wake = self._to_wake, set()
        return routers

    def holds_grant(self, router: str, request_id: str) -> bool:
        """It was told nobody yet, as far as is known: the router has not acknowledged it."""
        session = self._sessions.get(router)
        return session is not None and request_id in session.outbox
