"""What the engine asks of its surroundings: who goes next, and where charges go. Two small protocols.

``dispatch/replica_book.py`` implements both with the cluster's policy and counters; a test may pass something simpler.
All methods are called on the engine thread.
"""

from __future__ import annotations

from typing import Protocol

from fairserve.engine.request import GenerateRequest


class WaitingQueue(Protocol):
    """Requests that were granted to this replica and are not running."""

    def push(self, request: GenerateRequest) -> None:
        """A request arrives."""
        ...

    def push_front(self, request: GenerateRequest) -> None:
        """A preempted request comes back, ahead of its client's other requests."""
        ...

    def peek(self) -> GenerateRequest | None:
        """The request that goes next; changes nothing."""
        ...

    def pop(self) -> GenerateRequest:
        """Take out what :meth:`peek` names."""
        ...

    def remove(self, request_id: str) -> GenerateRequest | None:
        """Take out one request wherever it stands; None when it does not wait here."""
        ...

    def standing(self, client: str) -> tuple[float, ...]:
        """What the client has had, as known here: of two clients the greater has had more. The most served client's
        youngest request is preempted first."""
        ...

    def lead(self, ahead: str, behind: str) -> float:
        """Service / weight by which the first client is ahead of the second."""
        ...

    def __len__(self) -> int: ...


class Account(Protocol):
    """Charges, per request. Each request is received, started once (never again after a preemption) and finished."""

    def received(self, request: GenerateRequest) -> None:
        """The request is on this replica."""
        ...

    def started(self, request_id: str, num_input: int, num_cached: int) -> None:
        """Charge ``num_input`` prompt tokens, ``num_cached`` of which came from the prefix cache."""
        ...

    def output(self, request_id: str, num_tokens: int) -> None:
        """Charge ``num_tokens`` newly generated tokens."""
        ...

    def refund_input(self, request_id: str, num_tokens: int) -> None:
        """Give back prompt tokens that were charged but never computed (aborted in the middle of the prompt)."""
        ...

    def finished(self, request_id: str) -> None:
        """The request has left, for whatever reason. Called once, also for one that never started."""
        ...
