"""One router as the actor sees it: what it has been told, what it has acknowledged."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairserve.dispatch.messages import Grant, Refusal, RouterCall


@dataclass(slots=True)
class RouterSession:
    """Grants stay in ``outbox`` until acknowledged, so that a lost reply loses nothing."""

    router: str
    incarnation: int
    heard_s: float
    is_complete: bool
    """The authority knows every request that waits there; if not, the router is asked to submit all again."""
    last_seq: int = 0
    last_refusals: tuple[Refusal, ...] = ()
    requests: set[str] = field(default_factory=set)
    """Every request of this router that waits or is granted and not finished."""
    outbox: dict[str, Grant] = field(default_factory=dict)

    def is_repeat(self, call: RouterCall) -> bool:
        return call.seq <= self.last_seq

    def put(self, grant: Grant) -> None:
        self.outbox[grant.request_id] = grant

    def acknowledge(self, grants_ack: int) -> None:
        for grant in [g for g in self.outbox.values() if g.seq <= grants_ack]:
            del self.outbox[grant.request_id]

    def withdraw(self, request_id: str) -> None:
        """Take back a grant that was not acknowledged."""
        self.outbox.pop(request_id, None)
