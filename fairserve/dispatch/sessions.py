"""One router as the actor sees it: what it has been told, what it has acknowledged."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairserve.dispatch.messages import Grant, Refusal, RouterCall


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

    def put(self, news: Grant | Refusal) -> None:
        self.outbox[news.request_id] = news

    def acknowledge(self, grants_ack: int) -> None:
        for news in [news for news in self.outbox.values() if news.seq <= grants_ack]:
            del self.outbox[news.request_id]

    def withdraw(self, request_id: str) -> None:
        """Take back a grant that was not acknowledged."""
        self.outbox.pop(request_id, None)
