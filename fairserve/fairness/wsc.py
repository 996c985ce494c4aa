"""FairServe's weighted service counter (arXiv 2411.15997, section 4.2), with its holes closed.

The counter counts requests of typical size: service is divided by what a request of its application is expected to
cost. The authors charge when a request ends; here the expected amount is charged when it is picked and settled while it
runs (``fairness.prediction``), so a burst is not free.

What a label is worth must not be up to its sender. The divisor is the smaller of two moving means: that of the
application over all clients, and the client's own under that label. A client that labels small requests as a large
application lowers its own mean until each costs what it would have cost anyway; one that labels large requests as a
small application pays for every token. On average every label costs at least one unit per request.

Clients with an interaction under way go first, but only among those whose counters lie within the same ``grace``:
under the authors' absolute precedence, one endless interaction starves everybody.
"""

from __future__ import annotations

from math import floor

from fairserve.fairness.policy import Order
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients

RATE = 0.05
"""Share of the newest request in an application's mean."""
MOST_APPLICATIONS = 1_000
"""Applications whose means are kept, of one client and of all."""


class Wsc(Vtc):
    """``grace``: service / weight within which an interaction under way is preferred. ``expected``: service of a
    typical request by application, where the operator knows it; the others are learned."""

    name = "wsc"

    def __init__(self, grace: float = 500.0, expected: dict[str, float] | None = None) -> None:
        if not grace > 0:
            raise ValueError(f"grace must be above 0, not {grace}")
        self.grace = grace
        self._given = dict(expected or {})
        self._mean: dict[str, float] = {}
        self._own: dict[str, dict[str, float]] = {}
        """By client and application."""
        self._typical: float | None = None

    def order(self, client: str, waiting: WaitingClients) -> Order:
        counter = waiting.counter(client)
        return floor(counter / self.grace), not waiting.is_under_way(client), counter

    def price(self, client: str, application: str) -> float:
        """Typical service of all requests / expected service of this one's application: 1 on average, so that counters
        remain service. Requests of no application pay for what they cost."""
        if not application or not self._typical:
            return 1.0
        expected = self._given.get(application, self._mean.get(application, self._typical))
        own = self._own.get(client, {}).get(application, expected)
        return self._typical / max(1e-9, min(expected, own))

    def finished(self, client: str, application: str, replica: str, input_service: float, service: float) -> None:
        own = self._own.setdefault(client, {})
        own[application] = _mixed(own.get(application), service)
        self._mean[application] = _mixed(self._mean.pop(application, None), service)
        for means in (own, self._mean):  # a trusted gateway may name any application
            if len(means) > MOST_APPLICATIONS:
                del means[next(iter(means))]
        self._typical = _mixed(self._typical, service)

    def forget(self, client: str) -> None:
        self._own.pop(client, None)


def _mixed(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - RATE) * mean + RATE * value
