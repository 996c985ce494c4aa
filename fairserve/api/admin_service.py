"""The admin API as a plain object: no HTTP, no Ray; a test hands it a scripted counter actor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from datetime import UTC, date, datetime
from typing import Any

from fairserve.api.admin_auth import Admins
from fairserve.api.identity import deployed_keys
from fairserve.api.shared_reads import SharedReads
from fairserve.clock import Clock
from fairserve.cluster import changes
from fairserve.cluster.counter_query import CounterQuery
from fairserve.cluster.live_state import ID_DIGITS
from fairserve.config import ApiConfig, ApiKey
from fairserve.errors import InvalidRequest
from fairserve.views import (
    AuditView,
    ClientChange,
    ClientOrder,
    ClientPage,
    ClientView,
    CounterView,
    EventView,
    History,
    KeyView,
    ModelView,
    NewKey,
    Overview,
    ReplicaView,
    SettingView,
    UsagePeriod,
    UsageView,
)

PAGE = 1000
"""Clients asked for in one call."""


class AdminService:
    """Reads, shared by all who ask the same within a second, and changes.

    Args:
        query: reaches the counter actor.
        admins: who may look and who may change.
        deployed: the API keys of the deployment, which the actor does not know.
        clock: for the shared reads.
        unix_s: the wall clock, for the month of usage that is meant.

    Raises (every method):
        CounterUnreachable: the counter actor did not answer in time.
    """

    def __init__(
        self,
        query: CounterQuery,
        admins: Admins,
        deployed: Iterable[ApiKey],
        clock: Clock,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.admins = admins
        self._unix_s = unix_s
        self._query = query
        self._reads = SharedReads(clock)
        self._model = ""
        self._deployed = tuple(_deployed_view(key) for key in deployed)

    @classmethod
    def from_config(
        cls,
        config: ApiConfig,
        query: CounterQuery,
        clock: Clock,
        *,
        is_open: Callable[[], bool],
        environ: Mapping[str, str] = os.environ,
    ) -> AdminService:
        """``is_open``: whether the service has no API key now.

        Raises:
            ConfigError: the keys are wrong.
        """
        keys = deployed_keys(config, environ)
        admins = Admins.from_config(config, environ, is_open, {key.digest for key in keys})
        return cls(query, admins, keys, clock)

    def of(self, model: str) -> AdminService:
        """The same about one of several models, by its name; "" for the first. Changes hold for all.

        Raises (every read of it):
            UnknownModel: no model of that name is served.
        """
        if model == self._model:
            return self
        one = copy(self)
        one._model, one._query = model, self._query.of(model)
        return one

    # -- reads --------------------------------------------------------------------------------------------------------

    async def models(self) -> tuple[ModelView, ...]:
        return await self._reads.read(("models",), self._query.models)

    async def overview(self, top: int = 50, search: str | None = None) -> Overview:
        return await self._reads.read((self._model, "overview", top, search), lambda: self._query.overview(top, search))

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return (await self.overview()).replicas

    async def clients(
        self, offset: int = 0, limit: int = 100, order: ClientOrder = "service", search: str | None = None
    ) -> ClientPage:
        question = (self._model, "clients", offset, limit, order, search)
        return await self._reads.read(question, lambda: self._query.clients(offset, limit, order, search))

    async def client(self, name: str) -> ClientView:
        return await self._reads.read((self._model, "client", name), lambda: self._query.client(name))

    async def counters(self) -> list[CounterView]:
        """Of every client, by name."""
        found: list[CounterView] = []
        while True:
            page = await self.clients(len(found), PAGE, "name")
            found += [CounterView.model_validate(client.model_dump()) for client in page.clients]
            if not page.clients or len(found) >= page.total:
                return found

    async def history(self, clients: Sequence[str], since_s: float, resolution_s: int) -> History:
        # On whole points, so that dashboards that began at different moments ask the same.
        since_s = since_s // resolution_s * resolution_s
        question = (self._model, "history", tuple(clients), since_s, resolution_s)
        return await self._reads.read(question, lambda: self._query.history(clients, since_s, resolution_s))

    async def events(self, after_seq: int, limit: int) -> tuple[EventView, ...]:
        return await self._reads.read(
            (self._model, "events", after_seq, limit), lambda: self._query.events(after_seq, limit)
        )

    async def audit(self, before_seq: int | None, limit: int) -> tuple[AuditView, ...]:
        return await self._reads.read(("audit", before_seq, limit), lambda: self._query.audit(before_seq, limit))

    async def usage(
        self, first: date | None = None, last: date | None = None, by: UsagePeriod = "day"
    ) -> list[UsageView]:
        """By day (UTC) or hour, and client, from the first to the last day: from the first of this month to today.

        Raises:
            InvalidRequest: the last day lies before the first; or ``by`` hour, and no hours are kept.
        """
        today = datetime.fromtimestamp(self._unix_s(), UTC).date()
        last = last or max(today, first or today)
        first = first or last.replace(day=1)
        if last < first:
            raise InvalidRequest(f"to ({last}) lies before from ({first})", param="to")
        question = (self._model, "usage", first, last, by)
        return await self._reads.read(question, lambda: self._query.usage(first, last, by))

    async def keys(self) -> tuple[KeyView, ...]:
        """The live keys, then those of the deployment."""
        return await self._reads.read("keys", self._query.keys) + self._deployed

    async def settings(self) -> tuple[SettingView, ...]:
        return await self._reads.read("settings", self._query.settings)

    # -- changes ------------------------------------------------------------------------------------------------------

    async def set_client(self, name: str, change: ClientChange, who: str) -> ClientView:
        """
        Raises:
            InvalidRequest: nothing is to be changed.
        """
        asked = changes.change_of(change.model_dump(exclude_unset=True))
        try:
            return await self._query.set_client(name, asked, who)
        finally:
            self._reads.clear()  # also after an error: a change that timed out may have been made

    async def set_settings(self, change: dict[str, Any], who: str) -> tuple[SettingView, ...]:
        try:
            return await self._query.set_settings(changes.settings_of(change), who)
        finally:
            self._reads.clear()

    async def create_key(self, wanted: changes.KeyWanted, who: str) -> NewKey:
        secret, entry = changes.new_key(wanted)
        try:
            return NewKey(secret=secret, key=await self._query.add_key(entry, who))
        finally:
            self._reads.clear()

    async def revoke_key(self, id: str, who: str) -> KeyView:  # noqa: A002 (the view's word)
        """
        Raises:
            UnknownKey: no live key has an id that begins so.
            InvalidRequest: several have.
        """
        try:
            return await self._query.revoke_key(id, who)
        finally:
            self._reads.clear()


def _deployed_view(key: ApiKey) -> KeyView:
    return KeyView(
        id=key.digest[:ID_DIGITS],
        client=key.client,
        weight=key.weight,
        max_waiting=key.max_waiting,
        applications=key.applications,
        budgets=key.budgets,
        source="deployed",
    )
