"""Asking the counter actor what people want to know, and telling it what they change: typed, with time-outs.

The transport is handed in, so that tests run without Ray. The answers are those of :mod:`fairserve.views`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any, NoReturn, Protocol, TypeVar

from pydantic import TypeAdapter

from fairserve.cluster.counter_client import RayTransport
from fairserve.config import ApiKey, CounterConfig
from fairserve.dispatch.periods import DAY_S, HOUR_S, utc
from fairserve.dispatch.usage import HOURS
from fairserve.errors import ConfigError, CounterUnreachable, FairServeError, InvalidRequest, unwrapped
from fairserve.views import (
    AuditView,
    ClientChange,
    ClientOrder,
    ClientPage,
    ClientView,
    EventView,
    History,
    KeyView,
    ModelView,
    Overview,
    SettingView,
    UsagePeriod,
    UsageView,
)

Answer = TypeVar("Answer")
DAY_0 = date(1970, 1, 1)


class AskTransport(Protocol):
    """One call of a method of the counter actor; may raise anything, and may hang."""

    async def call(self, method: str, **arguments: Any) -> Any: ...


class CounterQuery:
    """Reads and writes of the counter actor. Every call ends within ``timeout_s`` seconds.

    Raises (every method):
        CounterUnreachable: no actor, no answer in time, or the actor died meanwhile.
        FairServeError: what the actor itself raised, without Ray's wrapper; a wrong setting as InvalidRequest.
    """

    def __init__(self, transport: AskTransport, timeout_s: float, model: str = "") -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._which = {"model": model} if model else {}

    def of(self, model: str) -> CounterQuery:
        """The same about one of several models, by its name; "" for the first."""
        return CounterQuery(self._transport, self._timeout_s, model)

    @classmethod
    def over_ray(cls, config: CounterConfig) -> CounterQuery:
        """For the named actor of the Ray cluster that this process is connected to."""
        return cls(RayTransport(lambda: found_actor(config.name, config.namespace)), config.call_timeout_s)

    # -- reads --------------------------------------------------------------------------------------------------------

    async def models(self) -> tuple[ModelView, ...]:
        """Of the service, the first one first."""
        return typed(tuple[ModelView, ...], await self._read("models"))

    async def overview(self, top: int = 50, search: str | None = None) -> Overview:
        return typed(Overview, await self._look("overview", top=top, search=search))

    async def clients(
        self, offset: int = 0, limit: int = 100, order: ClientOrder = "service", search: str | None = None
    ) -> ClientPage:
        arguments = {"offset": offset, "limit": limit, "order": order, "search": search}
        return typed(ClientPage, await self._look("clients", **arguments))

    async def client(self, name: str) -> ClientView:
        """
        Raises:
            UnknownClient: the actor knows no client of that name.
        """
        return typed(ClientView, await self._look("client", name=name))

    async def history(self, clients: Sequence[str], since_s: float = 0, resolution_s: int = 1) -> History:
        arguments = {"clients": list(clients), "since_s": since_s, "resolution_s": resolution_s}
        return typed(History, await self._look("history", **arguments))

    async def usage(self, first: date, last: date, by: UsagePeriod = "day") -> list[UsageView]:
        """Of every model, unless this asks about one; by day (UTC), or by hour, and client.

        Raises:
            InvalidRequest: ``by`` hour, and no hours are kept.
        """
        found: list[UsageView] = []
        method, asked = usage_asked(first, last, by)
        while asked is not None:
            views, asked = usage_views(await self._look(method, **asked), asked)
            found += views
        return found

    async def events(self, after_seq: int = 0, limit: int = 200) -> tuple[EventView, ...]:
        """Oldest first."""
        return typed(tuple[EventView, ...], await self._look("events", after_seq=after_seq, limit=limit))

    async def audit(self, before_seq: int | None = None, limit: int = 200) -> tuple[AuditView, ...]:
        """Newest first."""
        return typed(tuple[AuditView, ...], await self._read("audit", before_seq=before_seq, limit=limit))

    async def keys(self) -> tuple[KeyView, ...]:
        """The live keys."""
        return typed(tuple[KeyView, ...], await self._read("keys"))

    async def key_directory(self, version: int) -> dict[str, Any] | None:
        """``{"version": ..., "keys": [fields of config.ApiKey]}`` of live keys; None when ``version`` is the newest."""
        directory: dict[str, Any] | None = await self._read("key_directory", version=version)
        return directory

    async def settings(self) -> tuple[SettingView, ...]:
        return typed(tuple[SettingView, ...], await self._read("settings"))

    # -- writes -------------------------------------------------------------------------------------------------------

    async def set_client(self, name: str, change: ClientChange, who: str) -> ClientView:
        asked = change.model_dump(exclude_unset=True)
        return typed(ClientView, await self._write("set_client", name=name, change=asked, who=who))

    async def set_settings(self, change: dict[str, Any], who: str) -> tuple[SettingView, ...]:
        """Path -> value; None takes a live value back. Returns the settings that were named."""
        return typed(tuple[SettingView, ...], await self._write("set_settings", change=change, who=who))

    async def add_key(self, entry: ApiKey, who: str) -> KeyView:
        return typed(
            KeyView, await self._write("add_key", entry=entry.model_dump(mode="json", exclude={"key"}), who=who)
        )

    async def revoke_key(self, id: str, who: str) -> KeyView:  # noqa: A002 (the view's word)
        """
        Raises:
            UnknownKey: no live key has an id that begins so.
            InvalidRequest: several have.
        """
        return typed(KeyView, await self._write("revoke_key", id=id, who=who))

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _look(self, method: str, **arguments: Any) -> Any:
        """What each model answers for itself."""
        return await self._read(method, **arguments, **self._which)

    async def _read(self, method: str, **arguments: Any) -> Any:
        """A handle may point to an actor that has ended: the transport forgets it, and the second try finds another."""
        try:
            return await self._ask(method, arguments)
        except CounterUnreachable as error:
            if not has_ended(error):
                raise
        return await self._ask(method, arguments)

    async def _write(self, method: str, **arguments: Any) -> Any:
        """Never repeated: an actor that died may have carried it out."""
        return await self._ask(method, arguments)

    async def _ask(self, method: str, arguments: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._transport.call(method, **arguments)
        except TimeoutError:
            raise CounterUnreachable(silent(method, self._timeout_s)) from None
        except Exception as error:
            raise_plainly(error)


def date_of(day: int) -> str:
    """Such as 2026-11-21, of a day since 1970."""
    return (DAY_0 + timedelta(days=day)).isoformat()


def usage_asked(first: date, last: date, by: UsagePeriod = "day") -> tuple[str, dict[str, int] | None]:
    """The actor's method, and its arguments of a first call."""
    first_day, last_day = (first - DAY_0).days, (last - DAY_0).days
    if by == "day":
        return "usage", {"first_day": first_day, "last_day": last_day}
    return "usage_by_hour", {"first_hour": first_day * HOURS, "last_hour": last_day * HOURS + HOURS - 1}


def usage_views(answer: dict[str, Any], asked: dict[str, int]) -> tuple[list[UsageView], dict[str, int] | None]:
    """One answer of the actor, and the arguments of the next call, None at the end. Over HTTP it comes whole."""
    if "views" in answer:
        return typed(list[UsageView], answer["views"]), None
    period, period_s = ("day", DAY_S) if "next_day" in answer else ("hour", HOUR_S)
    names = tuple(UsageView.model_fields)
    views = [
        UsageView(**dict(zip(names, (client, utc(number * period_s), *numbers), strict=True)))
        for number, client, *numbers in answer["rows"]
    ]
    following = answer[f"next_{period}"]
    return views, None if following is None else asked | {f"first_{period}": following}


def typed(kind: type[Answer], answer: Any) -> Answer:
    """The actor's plain answer as one of the views."""
    return TypeAdapter(kind).validate_python(answer)


def found_actor(name: str, namespace: str) -> Any:
    """The handle of the running counter actor. Blocks on Ray.

    Raises:
        CounterUnreachable: there is none of that name.
    """
    import ray

    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        detail = (
            f"there is no counter actor {name!r} in namespace {namespace!r} of this Ray cluster: is fairserve running?"
        )
        raise CounterUnreachable(detail) from None


def silent(method: str, timeout_s: float) -> str:
    """What to say when the actor did not answer."""
    return (
        f"the counter actor did not answer '{method}' within {timeout_s:g} s; serving goes on without it. "
        "If this was a change, look whether it was made"
    )


def raise_plainly(error: Exception) -> NoReturn:
    """Raise what a call of the actor failed with, as one of our errors where it is one."""
    plain = unwrapped(error)
    if isinstance(plain, ConfigError):
        raise InvalidRequest(str(plain)) from None
    if isinstance(plain, FairServeError):
        raise plain from None
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        raise CounterUnreachable("the counter actor has ended or is starting again; try again") from error
    raise error


def has_ended(error: CounterUnreachable) -> bool:
    """The handle was of an actor that will not come back; there may be another of its name."""
    from ray.exceptions import ActorDiedError

    return isinstance(error.__cause__, ActorDiedError)
