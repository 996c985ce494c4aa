"""What a policy may look at."""

from __future__ import annotations

from typing import Protocol


class WaitingClients(Protocol):
    """Clients with waiting requests, and everybody's counters: a question never changes the answer."""

    def counter(self, client: str) -> float: ...

    def place(self, client: str) -> float:
        """Place (arrival time, s) of the client's first waiting request."""
        ...

    def least_served(self) -> str | None:
        """The waiting client that goes next; None when nobody waits."""
        ...

    @property
    def last_to_leave(self) -> str | None:
        """The client whose last waiting request left most recently; None before the first."""
        ...
