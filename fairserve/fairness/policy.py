"""The Policy protocol, and the policies by name.

A policy decides and touches nothing of what it is shown: it names an order among waiting clients, a lift for a client
that becomes active, and whether a request may enter at all. :class:`~fairserve.fairness.queue.FairQueue` carries the
decisions out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fairserve.errors import ConfigError
from fairserve.fairness.baselines import Fcfs, Lcf, Rpm
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients


class Policy(Protocol):
    name: str

    def order(self, client: str, waiting: WaitingClients) -> float:
        """The client with the least value goes next; equal values go by the client's name."""
        ...

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        """What the counter of a client without waiting requests is lifted to when one arrives; None for no lift."""
        ...

    def retry_after_s(self, client: str, now_s: float) -> float | None:
        """Seconds until the client may try again, or None when its request may enter now."""
        ...

    def accepted(self, client: str, now_s: float) -> None:
        """The request entered: for policies that count requests."""
        ...


POLICIES: dict[str, Callable[..., Policy]] = {"vtc": Vtc, "fcfs": Fcfs, "lcf": Lcf, "rpm": Rpm}


def make_policy(name: str, rpm_limit: int = 60) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}: known are {', '.join(sorted(POLICIES))}")
    return POLICIES[name](rpm_limit) if name == "rpm" else POLICIES[name]()
