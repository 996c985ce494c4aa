"""VTC and FairServe by the rules of their authors' own code, for comparison. Nothing here serves anybody.

Both run on this project's queue, replicas and protocol: the authors' engines are one process each, and a cluster of
such would share no counters at all (``benchmarks.skew``). So their rules alone are compared, under the best conditions.

VTC (arXiv 2401.00588; Ying1123/VTC-artifact at 192c2e2, ``vtc_req_queue.py`` and ``manager.py``):

- a client that arrives while nobody waits is not lifted, and a client that was never seen starts at 0;
- output is charged before each decode step, so the token that the prefill makes is never charged;
- whenever a request ends, ``update_counter`` runs once more for the whole batch: everybody pays for one more token;
- nothing is given back for what an aborted request was charged and did not get;
- a request is admitted when its worst case fits: all of max_tokens is reserved, and no request is granted ahead.

FairServe (arXiv 2411.15997, sections 4.1 and 4.2):

- a request is charged when it ends, divided by what a request of its application costs on average, whoever sends it;
- clients with an interaction under way go before all others;
- the first call of an interaction is the one that says so; the others are never throttled.
"""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.dispatch.limits import DispatchLimits
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest
from fairserve.fairness.cost import WeightedTokens
from fairserve.fairness.interactions import Interactions
from fairserve.fairness.policy import Order
from fairserve.fairness.vtc import Vtc
from fairserve.fairness.waiting import WaitingClients
from fairserve.fairness.wsc import Wsc

TOKENS = WeightedTokens()
LIMITS = DispatchLimits(lookahead=0, reserve_output_tokens=None)


# -- VTC ---------------------------------------------------------------------------------------------------------------


class PublishedVtc(Vtc):
    """``append`` of the artifact: lifted to the least counter among the others that wait, if any does."""

    def lift(self, client: str, waiting: WaitingClients) -> float | None:
        reference = waiting.least_served()
        return None if reference is None else waiting.counter(reference)


@dataclass(frozen=True, slots=True)
class FirstTokenFree:
    """w_p * n_in + w_q * (n_out - 1): the prefill's token is not charged."""

    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        return TOKENS.service(num_input, max(0.0, num_output - 1), num_cached)


class _Book(LocalBook[GenerateRequest]):
    """Charges beside what the cost function says, for requests that have started."""

    def surcharge(self, request_id: str, service: float) -> None:
        entry = self._open[request_id]
        self._totals[entry.account].service += service
        self._service[entry.client] += service
        self._changed.add(entry.account)
        self._queue.charge(entry.client, service)


class PublishedVtcBook(_Book):
    """A replica's charges as ``update_counter`` makes them."""

    def __init__(self) -> None:
        super().__init__(PublishedVtc(), FirstTokenFree())
        self._has_ended = False
        """Somebody ended since the last step, and everybody has paid for it."""

    def finished(self, request_id: str) -> None:
        num_output = self._open[request_id].num_output
        if num_output == 1:  # it ends with its prefill, in a batch of its own
            self.surcharge(request_id, TOKENS.output_weight)
        elif num_output and not self._has_ended:
            self._has_ended = True
            for name in [name for name, entry in self._open.items() if entry.num_output and name not in self._queue]:
                self.surcharge(name, TOKENS.output_weight)
        super().finished(request_id)

    def refund_input(self, request_id: str, num_tokens: int) -> None:
        super().refund_input(request_id, num_tokens)
        self.surcharge(request_id, num_tokens * TOKENS.input_weight)

    def output(self, request_id: str, num_tokens: int) -> None:
        self._has_ended = False
        super().output(request_id, num_tokens)


# -- FairServe ---------------------------------------------------------------------------------------------------------


class PublishedWsc(Wsc):
    """Section 4.2: interactions under way first, and the application's mean over everybody as the divisor."""

    def order(self, client: str, waiting: WaitingClients) -> Order:
        return not waiting.is_under_way(client), waiting.counter(client)

    def price(self, client: str, application: str) -> float:
        if not self._typical:
            return 1.0
        return self._typical / max(1e-9, self._given.get(application, self._mean.get(application, self._typical)))


class PublishedInteractions(Interactions):
    """Believes its callers."""

    def is_first(self, client: str, interaction: str, call_index: int, now_s: float) -> bool:
        return not interaction or call_index == 0


@dataclass(frozen=True, slots=True)
class NothingYet:
    def service(self, num_input: int, num_output: float, num_cached: int = 0) -> float:
        return 0.0


class PublishedWscBook(_Book):
    """Charges a request when it ends."""

    def __init__(self) -> None:
        super().__init__(PublishedWsc(), NothingYet())

    def finished(self, request_id: str) -> None:
        entry = self._open[request_id]
        if entry.num_input:
            self.surcharge(request_id, TOKENS.service(entry.num_input, entry.num_output, entry.num_cached))
        super().finished(request_id)
