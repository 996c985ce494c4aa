"""The two ways to a running service: the counter actor over Ray, the admin API over HTTP. Both block."""

from __future__ import annotations

import logging
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from fairserve.cluster.changes import KeyWanted, new_key
from fairserve.cluster.counter_query import date_of, found_actor, has_ended, raise_plainly, silent, typed
from fairserve.dispatch.usage import HOURS
from fairserve.errors import (
    AdminKeyRequired,
    ChangeNotKept,
    ConfigError,
    CounterUnreachable,
    FairServeError,
    InvalidRequest,
    Unauthenticated,
    UnknownClient,
    UnknownKey,
    UnknownModel,
)
from fairserve.views import KeyView, NewKey

PREFIX = "/admin/v1"
NOT_OVER_HTTP = "all counters at once are too large for the admin API: reach the service over Ray, by its address"


class Door(Protocol):
    """Calls of the counter actor's methods for people, which answer with plain values.

    Raises:
        CounterUnreachable: nobody answered in time.
    """

    def ask(self, method: str, **arguments: Any) -> Any: ...
    def change(self, method: str, **arguments: Any) -> Any: ...
    def create_key(self, wanted: KeyWanted) -> NewKey: ...
    def close(self) -> None: ...


class RayDoor:
    """The counter actor itself. Connects this process to Ray unless it is; then it also disconnects it.

    Raises:
        CounterUnreachable: no such cluster, or no counter actor in it.
    """

    def __init__(self, address: str | None, name: str, namespace: str, timeout_s: float, who: str) -> None:
        import ray

        self._name, self._namespace = name, namespace
        self._timeout_s = timeout_s
        self._who = who
        self._is_mine = not ray.is_initialized()
        if self._is_mine:
            try:
                join_on_loopback(address or "auto")
                ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                where = f"at {address!r}" if address else "on this machine"
                said = " ".join(str(error).split())
                raise CounterUnreachable(f"no Ray cluster found {where}; Ray says: {said}") from None
        try:
            self._actor = found_actor(name, namespace)
        except CounterUnreachable:
            self.close()
            raise

    def ask(self, method: str, **arguments: Any) -> Any:
        try:
            return self._call(method, arguments)
        except CounterUnreachable as error:
            if not has_ended(error):
                raise
        self._actor = found_actor(self._name, self._namespace)
        return self._call(method, arguments)

    def change(self, method: str, **arguments: Any) -> Any:
        return self._call(method, arguments | {"who": self._who})

    def create_key(self, wanted: KeyWanted) -> NewKey:
        secret, entry = new_key(wanted)
        key = self.change("add_key", entry=entry.model_dump(mode="json", exclude={"key"}))
        return NewKey(secret=secret, key=typed(KeyView, key))

    def close(self) -> None:
        import ray

        if self._is_mine:
            self._is_mine = False
            ray.shutdown()

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(**arguments), timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise CounterUnreachable(silent(method, self._timeout_s)) from None
        except Exception as error:
            raise_plainly(error)


def join_on_loopback(address: str) -> None:
    """A Ray that listens on loopback only, as `fairserve serve` starts it, is joined by those alone who take 127.0.0.1
    for this machine's address; Ray would replace it by another one, and wait there for ever.

    Raises:
        ConnectionError: there is no Ray at ``auto``.
    """
    from ray._private import ray_constants, services

    if address.startswith("ray://"):
        return
    found = services.get_ray_address_from_environment(address, None) or ""
    if found.startswith("127.0.0.1:") and found in services.find_gcs_addresses():
        ray_constants.ENABLE_RAY_CLUSTER = False


class HttpDoor:
    """The admin API of a service at ``url``; ``transport`` is for tests."""

    def __init__(
        self, url: str, admin_key: str | None, timeout_s: float, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {"authorization": f"Bearer {_sendable(admin_key)}"} if admin_key else {}
        base = url.rstrip("/") + PREFIX
        self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout_s, transport=transport)
        self._url = _without_user(url.rstrip("/"))

    def ask(self, method: str, **arguments: Any) -> Any:
        if method == "export_counters":
            raise InvalidRequest(NOT_OVER_HTTP)
        which = {"model": arguments["model"]} if "model" in arguments else {}
        if method == "client":
            return self._send("GET", _client_path(arguments["name"]), arguments, params=which)
        if method == "usage":
            query = {"from": date_of(arguments["first_day"]), "to": date_of(arguments["last_day"])}
            return {"views": self._send("GET", "/usage", arguments, params=query | which)}
        if method == "usage_by_hour":
            first, last = (date_of(arguments[name] // HOURS) for name in ("first_hour", "last_hour"))
            query = {"from": first, "to": last, "by": "hour"}
            return {"views": self._send("GET", "/usage", arguments, params=query | which)}
        names = {"clients": "client", "since_s": "since", "resolution_s": "resolution"}
        names |= {"after_seq": "after", "before_seq": "before"}
        query = {names.get(name, name): value for name, value in arguments.items() if value is not None}
        return self._send("GET", f"/{method}", arguments, params=query)

    def change(self, method: str, **arguments: Any) -> Any:
        match method:
            case "set_client":
                return self._send("PATCH", _client_path(arguments["name"]), arguments, json=arguments["change"])
            case "set_settings":
                return self._send("PATCH", "/settings", arguments, json=arguments["change"])
            case "import_counters":
                raise InvalidRequest(NOT_OVER_HTTP)
            case "revoke_key":
                return self._send("DELETE", f"/keys/{quote(arguments['id'], safe='')}", arguments)
        raise AssertionError(method)

    def create_key(self, wanted: KeyWanted) -> NewKey:
        return typed(NewKey, self._send("POST", "/keys", {}, json=wanted.model_dump(mode="json")))

    def close(self) -> None:
        self._http.close()

    def _send(self, verb: str, path: str, arguments: dict[str, Any], **content: Any) -> Any:
        try:
            answer = self._http.request(verb, path, **content)
            if answer.is_success:
                return answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise CounterUnreachable(f"no answer from the admin API at {self._url}: {error}") from None
        raise self._error(answer, arguments)

    def _error(self, answer: httpx.Response, arguments: dict[str, Any]) -> FairServeError:
        """The error that the service answered with, as the one that it was there."""
        try:
            error = answer.json()["error"]
            message, param, code = str(error["message"]), error["param"], error["code"]
        except (ValueError, TypeError, KeyError):
            return CounterUnreachable(f"{self._url} answered {answer.status_code}, and not as fairserve does")
        match answer.status_code, code:
            case 401, _:
                return Unauthenticated(message)
            case 403, _:
                return AdminKeyRequired(message)
            case _, "client_not_found":
                return UnknownClient(arguments["name"])
            case _, "model_not_found":
                return UnknownModel(arguments["model"], message.partition("available: ")[2])
            case _, "key_not_found":
                return UnknownKey(arguments["id"])
            case _, "change_not_kept":
                return ChangeNotKept(message.partition("made: ")[2] or message)
            case status, _ if status >= 500:
                return CounterUnreachable(f"{self._url}: {message}")
        return InvalidRequest(message, param, code)


def _sendable(key: str) -> str:
    """The key without a line break at its end, as many a file has one.

    Raises:
        ConfigError: a header cannot carry it; the HTTP library's own error would show it.
    """
    key = key.strip()
    if not all(" " <= character <= "~" for character in key):
        raise ConfigError("the admin key holds a line break or a character beyond ASCII, which no header can carry")
    return key


def _without_user(url: str) -> str:
    """For messages: a URL may hold a password."""
    scheme, slashes, rest = url.partition("://")
    return scheme + slashes + rest.rpartition("@")[2]


def _client_path(name: str) -> str:
    return f"/clients/{quote(name)}"
