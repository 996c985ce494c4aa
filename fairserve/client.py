"""Ask a running fairserve and change it, from a notebook or a script.

::

    import fairserve

    with fairserve.connect() as service:                      # over Ray: "auto", or address="ray://..."
        print(service.overview().verdict.text)
        service.set_weight("alice", 4)

    fairserve.connect("http://127.0.0.1:8000", admin_key=KEY)  # over HTTP: the same methods

Answers are those of :mod:`fairserve.views`. Every method raises CounterUnreachable when nobody answers in time, and
Unauthenticated or AdminKeyRequired when the key does not do; a wrong value is InvalidRequest.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from datetime import date
from types import TracebackType
from typing import Any, Self

from fairserve.client_doors import Door, HttpDoor, RayDoor
from fairserve.cluster import changes
from fairserve.cluster.counter_query import typed, usage_asked, usage_views
from fairserve.config import CounterConfig
from fairserve.errors import InvalidRequest
from fairserve.views import (
    AuditView,
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
    Verdict,
)

PAGE = 1000
"""Clients asked for in one call."""
ENV_ADMIN_KEY = "FAIRSERVE_ADMIN_KEY"
_DEFAULT = CounterConfig()


def connect(
    address: str | None = None,
    *,
    name: str = _DEFAULT.name,
    namespace: str = _DEFAULT.namespace,
    admin_key: str | None = None,
    timeout_s: float = 5.0,
    who: str | None = None,
    model: str = "",
) -> Connection:
    """A connection to one running service.

    Args:
        address: of the service (``http://host:8000``, with its route prefix if it has one), or of its Ray cluster
            (``auto``, ``ray://host:10001``). None: the Ray that this process is connected to, else ``auto``.
        name: the counter actor's (``counter.name``); over Ray only.
        namespace: the counter actor's (``counter.namespace``); over Ray only.
        admin_key: over HTTP only; None: the environment variable FAIRSERVE_ADMIN_KEY.
        timeout_s: seconds that any call may take.
        who: written to the audit log with changes over Ray; None: ``python:`` and the user's name. Over HTTP it is the
            admin key's name.
        model: of a service of several models, the one to ask about; "" for the first. Changes hold for all.

    Raises:
        CounterUnreachable: no such Ray cluster, or no counter actor in it.
    """
    if address is not None and address.startswith(("http://", "https://")):
        key = admin_key if admin_key is not None else os.environ.get(ENV_ADMIN_KEY)
        return Connection(HttpDoor(address, key, timeout_s), model)
    return Connection(RayDoor(address, name, namespace, timeout_s, who or f"python:{getpass.getuser()}"), model)


class Connection:
    """The methods for people of one running service. Close it, or use it as a context manager."""

    def __init__(self, door: Door, model: str = "") -> None:
        self._door = door
        self._which = {"model": model} if model else {}

    def close(self) -> None:
        self._door.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- reads --------------------------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelView, ...]:
        """The models of the service, the first one first."""
        return typed(tuple[ModelView, ...], self._door.ask("models"))

    def overview(self, top: int = 50, search: str | None = None) -> Overview:
        """The service at a glance, with the ``top`` busiest clients."""
        return typed(Overview, self._ask("overview", top=top, search=search))

    def verdict(self) -> Verdict:
        """Is the service fair now?"""
        return self.overview().verdict

    def gap_and_bound(self) -> tuple[float, float]:
        """The widest difference of service / weight among clients that wait now, and what the proof allows."""
        verdict = self.verdict()
        return verdict.gap, verdict.bound

    def epoch(self) -> int:
        """Changes when the counter actor starts again or its settings change."""
        return self.overview().epoch

    def replicas(self) -> tuple[ReplicaView, ...]:
        return self.overview().replicas

    def leases(self) -> dict[str, int]:
        """Requests granted that the replica has not confirmed yet, by replica."""
        return {replica.name: replica.granted_unconfirmed for replica in self.replicas()}

    def clients(
        self, *, order: ClientOrder = "service", search: str | None = None, limit: int | None = None
    ) -> tuple[ClientView, ...]:
        """Every client, or the first ``limit``; ``search``: part of the name."""
        found: list[ClientView] = []
        while limit is None or len(found) < limit:
            room = PAGE if limit is None else min(PAGE, limit - len(found))
            asked = {"offset": len(found), "limit": room, "order": order, "search": search}
            page = typed(ClientPage, self._ask("clients", **asked))
            found += page.clients
            if not page.clients or len(found) >= page.total:
                break
        return tuple(found)

    def client(self, name: str) -> ClientView:
        """
        Raises:
            UnknownClient: no client of that name is known.
        """
        return typed(ClientView, self._ask("client", name=name))

    def counters(self) -> tuple[CounterView, ...]:
        """Counter, lead and weight of every client, by name."""
        return tuple(CounterView.model_validate(client.model_dump()) for client in self.clients(order="name"))

    def weights(self) -> dict[str, float]:
        """The weight in force of every client."""
        return {client.name: client.weight for client in self.clients(order="name")}

    def backlog(self) -> dict[str, int]:
        """Waiting requests of the clients that have some, most first."""
        return {client.name: client.waiting for client in self.clients(order="waiting") if client.waiting}

    def history(self, *clients: str, since_s: float = 0, resolution_s: int = 1) -> History:
        """Clients over time: a point a second of the last hour, or one a minute (``resolution_s=60``) of the last week;
        ``since_s`` in Unix seconds."""
        asked = {"clients": list(clients), "since_s": since_s, "resolution_s": resolution_s}
        return typed(History, self._ask("history", **asked))

    def usage(self, first: date, last: date, by: UsagePeriod = "day") -> tuple[UsageView, ...]:
        """What each client used, by day (UTC), or by hour, and client; the last day is included.

        Raises:
            InvalidRequest: ``by`` hour, and no hours are kept (``counter.usage_hour_days``).
        """
        found: list[UsageView] = []
        method, asked = usage_asked(first, last, by)
        while asked is not None:
            views, asked = usage_views(self._ask(method, **asked), asked)
            found += views
        return tuple(found)

    def events(self, after_seq: int = 0, limit: int = 200) -> tuple[EventView, ...]:
        """Oldest first."""
        return typed(tuple[EventView, ...], self._ask("events", after_seq=after_seq, limit=limit))

    def audit(self, before_seq: int | None = None, limit: int = 200) -> tuple[AuditView, ...]:
        """Newest first."""
        return typed(tuple[AuditView, ...], self._door.ask("audit", before_seq=before_seq, limit=limit))

    def keys(self) -> tuple[KeyView, ...]:
        """The API keys; over Ray the live ones only, since the actor does not know those of the deployment."""
        return typed(tuple[KeyView, ...], self._door.ask("keys"))

    def settings(self) -> tuple[SettingView, ...]:
        """The settings that can be changed live."""
        return typed(tuple[SettingView, ...], self._door.ask("settings"))

    # -- changes: from the next pick on, kept over restarts, written to the audit log ---------------------------------

    def set_weight(self, client: str, weight: float | None) -> ClientView:
        """None: as its key says."""
        return self._set_client(client, weight=weight)

    def pause(self, client: str) -> ClientView:
        """Its requests wait, and none is granted; what runs goes on."""
        return self._set_client(client, is_paused=True)

    def resume(self, client: str) -> ClientView:
        return self._set_client(client, is_paused=False)

    def set_limits(self, client: str, **limits: int | None) -> ClientView:
        """``max_waiting=`` and ``requests_per_min=``; one left out stays, None takes a live one back."""
        if unknown := limits.keys() - {"max_waiting", "requests_per_min"}:
            raise InvalidRequest(f"no limit {sorted(unknown)[0]!r}; these are: max_waiting, requests_per_min")
        return self._set_client(client, **limits)

    def set_budgets(self, client: str, budgets: dict[str, dict[str, int]] | None) -> ClientView:
        """Tokens by window and kind, such as ``{"day": {"soft": 800_000, "hard": 1_000_000}}``, in place of those of
        its key; ``{}``: none. None takes the live ones back."""
        return self._set_client(client, budgets=budgets)

    def set_settings(self, change: dict[str, Any]) -> tuple[SettingView, ...]:
        """Path -> value, such as ``{"fairness.quantum": 500}``; None takes a live value back. All or none."""
        asked = changes.settings_of(change)
        return typed(tuple[SettingView, ...], self._door.change("set_settings", change=asked))

    def create_key(
        self, client: str, *, weight: float = 1.0, max_waiting: int | None = None, applications: Sequence[str] = ()
    ) -> NewKey:
        """Make an API key that works within a second. The secret is in this answer and nowhere else."""
        values = {"client": client, "weight": weight, "max_waiting": max_waiting, "applications": tuple(applications)}
        return self._door.create_key(changes.checked(changes.KeyWanted, values))

    def revoke_key(self, id: str) -> KeyView:  # noqa: A002 (the view's word)
        """
        Raises:
            UnknownKey: no live key has an id that begins so.
        """
        return typed(KeyView, self._door.change("revoke_key", id=id))

    # -- moving counters between clusters; over Ray only ---------------------------------------------------------------

    def export_counters(self) -> dict[str, Any]:
        """Counters and totals of one moment, as plain values that are JSON."""
        return dict(self._ask("export_counters"))

    def import_counters(self, document: dict[str, Any]) -> int:
        """Lay the counters of an export over those in force. Returns how many clients it names.

        Raises:
            InvalidRequest: it is no export, or something in it is wrong.
        """
        return int(self._door.change("import_counters", exported=document))

    def _ask(self, method: str, **arguments: Any) -> Any:
        """What each model answers for itself."""
        return self._door.ask(method, **arguments, **self._which)

    def _set_client(self, client: str, **fields: Any) -> ClientView:
        asked = changes.change_of(fields).model_dump(exclude_unset=True)
        return typed(ClientView, self._door.change("set_client", name=client, change=asked))
