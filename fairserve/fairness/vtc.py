"""The Virtual Token Counter (arXiv 2401.00588, algorithm 2), weighted (section 4.3)."""

from __future__ import annotations

from fairserve.fairness.policy import Order, Policy
from fairserve.fairness.waiting import WaitingClients


class Vtc(Policy):
    """Least counter first; a client that becomes active is lifted, so that idling earns nothing."""

    name = "vtc"

    def order(self, client: str, waiting: WaitingClients) -> Order:
        return waiting.counter(client)

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        """Both branches of the paper: to the least counter among waiting clients, or, when nobody waits, to the
        counter of the client that was the last to leave the queue. The caller takes the maximum with its own."""
        reference = waiting.least_served() or waiting.last_to_leave
        return None if reference is None else waiting.counter(reference)
