"""What a policy may look at."""

from __future__ import annotations

from typing import Protocol


class WaitingClients(Protocol):
    """One group of siblings: clients, or whole organisations and teams. Those that wait, and everybody's counters.

    In a flat system there is one group, of all clients. A question never changes the answer.
    """

    def counter(self, client: str) -> float: ...

    def place(self, client: str) -> float:
        """Place (arrival time, s) of the first waiting request of the client or, for a group, of whoever in it goes
        next."""
        ...

    def is_under_way(self, client: str) -> bool:
        """The client has an interaction that has begun and is not over."""
        ...

    def least_served(self) -> str | None:
        """The waiting one that goes next; None when nobody waits."""
        ...

    @property
    def last_to_leave(self) -> str | None:
        """The one whose last waiting request left most recently; None before the first."""
        ...
