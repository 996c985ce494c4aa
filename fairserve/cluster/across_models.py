"""What clients are served by one model of the service, charged to their turns at the others (``across_models``).

The same as between clusters that share a store (``saver.py``): cumulative totals, of which every other model takes the
difference to what it has taken before, so nothing counts twice, whichever of them begins anew. A unit of service of
one model counts at another as much as their prices say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fairserve.cluster.model_counters import ModelCounters
from fairserve.dispatch.dispatcher import Dispatcher
from fairserve.fairness.accounts import client_of

PART = 200
"""Accounts told in one go."""


class AcrossModels:
    """``models``: by slot, as they are at any time."""

    def __init__(self, models: Mapping[str, ModelCounters]) -> None:
        self._models = models
        self.is_on = False
        self._told: dict[str, tuple[Dispatcher, frozenset[str]]] = {}
        """By slot: whose totals were last told to whom."""

    async def exchange(self) -> None:
        """Tell every model what the others have served since the last time."""
        slots = frozenset(self._models) if self.is_on else frozenset[str]()
        for slot in self._told.keys() - (slots if len(slots) > 1 else ()):
            del self._told[slot]
            if slot in self._models:
                self._models[slot].dispatcher.ledger.no_news()
        for slot in slots if len(slots) > 1 else ():
            await self._tell(slot, slots - {slot})

    async def _tell(self, slot: str, others: frozenset[str]) -> None:
        one = self._models[slot]
        is_known = self._told.get(slot) == (one.dispatcher, others)
        self._told[slot] = (one.dispatcher, others)
        ledger, incarnation = one.dispatcher.ledger, one.upkeep.incarnation
        strangers = {other for other in others if not self._models[other].dispatcher.knows_model(slot, incarnation)}
        accounts = ledger.take_news(is_whole=not is_known)
        for begin in range(0, max(1, len(accounts)), PART):
            part = accounts[begin : begin + PART]
            weights = {account: one.dispatcher.weights.carried(client_of(account)) for account in part}
            for other in others & self._models.keys():
                theirs = self._models[other]
                price = one.authority.args.price / theirs.authority.args.price
                service = {account: price * ledger.served_by_model(account) for account in part}
                if part or other in strangers:
                    is_first = other in strangers
                    theirs.dispatcher.merge_model(slot, incarnation, service, weights, is_first=is_first)
            await asyncio.sleep(0)
