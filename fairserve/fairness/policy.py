"""What a policy is: answers to a few questions, with first come, first served as the answer where it has none.

A policy touches nothing of what it is shown. It names an order among siblings, a lift for one that becomes active, what
service costs a client, and who may not enter at all. :class:`~fairserve.fairness.queue.FairQueue` and
``dispatch/granting.py`` carry the answers out, and tell a policy that keeps notes (turns, rates) what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fairserve.errors import Refused
from fairserve.fairness.waiting import WaitingClients

Order = Any
"""A float or a tuple of floats; of one kind within a policy."""


@dataclass(frozen=True, slots=True)
class Place:
    """A replica that could take a request now."""

    replica: str
    num_matched: int
    """Leading prompt tokens that its prefix cache is believed to hold."""
    num_requests: int
    """Requests running or waiting there."""


class Policy:
    name = ""
    window = 1
    """How many clients of equal order the dispatcher may choose among by cached prefix; 1 keeps the strict order."""
    looks_everywhere = False
    """Whether :meth:`choose_replica` is shown every replica with room, at O(replicas) a grant, and not the roomiest and
    those that know the beginning of the prompt alone."""

    def order(self, client: str, waiting: WaitingClients) -> Order:
        """The client with the least value goes next; equal values go by the client's name."""
        return waiting.place(client)

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        """What the counter of a client without waiting requests is lifted to when one arrives; None for no lift."""
        return None

    def price(self, client: str, application: str) -> float:
        """Counter units (before the weight) that a unit of service costs."""
        return 1.0

    def choose_replica(self, client: str, places: Sequence[Place]) -> str | None:
        """One of ``places``, which are never empty; None leaves it to free KV room."""
        return None

    def refuse(self, client: str, now_s: float) -> Refused | None:
        """Why a new request may not enter now, or None."""
        return None

    # -- what happened ------------------------------------------------------------------------------------------------

    def accepted(self, client: str, now_s: float) -> None:
        """A new request entered."""

    def picked(self, client: str) -> None:
        """A request of the client (or group) was picked to run."""

    def placed(self, client: str, replica: str, service: float) -> None:
        """A request was granted to ``replica``, its input worth ``service``."""

    def lost_replica(self, replica: str) -> None:
        """It is gone."""

    def forget(self, client: str) -> None:
        """The client (or group) is not known any more: if it comes, it comes as a newcomer."""

    def finished(self, client: str, application: str, replica: str, input_service: float, service: float) -> None:
        """A request ended, having received ``service`` in all, ``input_service`` of it for its input."""
