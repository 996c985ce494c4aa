"""Who may look at a running service, and who may change it.

::

    admin keys   API keys    read /admin             change
    some         any         with an admin key       with an admin key
    none         none        everybody               nobody (403)
    none         some        nobody (403)            nobody (403)

A client's API key never opens /admin. Keys are kept and compared as SHA-256 digests, for the reason that
:mod:`fairserve.api.identity` gives.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Collection, Iterable, Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairserve.api.http_errors import describe
from fairserve.api.identity import bearer_of, keys_in_env
from fairserve.config import AdminKey, ApiConfig
from fairserve.errors import AdminKeyRequired, BodyTooLarge, BodyTooSlow, ConfigError, Unauthenticated

ENV_ADMIN_KEYS = "FAIRSERVE_ADMIN_KEYS"
ANYBODY = "anybody"
HOW_TO = f"configure one in api.admin_keys or {ENV_ADMIN_KEYS} and send 'Authorization: Bearer <admin key>'"
READING = frozenset({"GET", "HEAD"})
MAX_BODY_BYTES = 100_000
"""Of a change; the longest, a client with many applications, is a few thousand."""
READ_TIMEOUT_S = 30.0
"""For a change to come whole."""


class Admins:
    """The admin keys.

    Args:
        keys: of the configuration.
        is_open: whether there is no API key either, now: the first live one closes the service.
        client_digests: the SHA-256 of every API key of the deployment, in hex.

    Raises:
        ConfigError: two admins share a secret, or an API key is also an admin key.
    """

    def __init__(
        self, keys: Iterable[AdminKey], is_open: Callable[[], bool], client_digests: Collection[str] = ()
    ) -> None:
        self._is_open = is_open
        self._by_digest: dict[str, str] = {}
        for key in keys:
            other = self._by_digest.setdefault(key.digest, key.name)
            if other != key.name:
                raise ConfigError(f"the same admin key is given twice, for {other!r} and {key.name!r}")
            if key.digest in client_digests:
                raise ConfigError(f"the admin key of {key.name!r} is also an API key, which must not open /admin")

    @classmethod
    def from_config(
        cls,
        config: ApiConfig,
        environ: Mapping[str, str],
        is_open: Callable[[], bool],
        client_digests: Collection[str],
    ) -> Admins:
        """The admin keys of the configuration and of the environment together."""
        keys = [*config.admin_keys]
        if environ.get(ENV_ADMIN_KEYS, "").strip():
            keys += keys_in_env(environ[ENV_ADMIN_KEYS], ENV_ADMIN_KEYS, AdminKey)
        return cls(keys, is_open, client_digests)

    def admit(self, headers: Headers, *, to_read: bool) -> str:
        """The name of the admin key that was sent: who it is, for the audit log.

        Raises:
            Unauthenticated: admin keys are configured, and none of them was sent.
            AdminKeyRequired: none is configured, and without one this is closed.
        """
        if not self._by_digest:
            if to_read and self._is_open():
                return ANYBODY
            aim = "looking" if to_read else "changing anything"
            raise AdminKeyRequired(f"{aim} needs an admin key, and this service has none: {HOW_TO}")
        token = bearer_of(headers)
        if token is None:
            raise Unauthenticated("no admin key: send 'Authorization: Bearer <admin key>'")
        digest = hashlib.sha256(token).hexdigest()
        for stored, name in self._by_digest.items():
            if hmac.compare_digest(stored, digest):
                return name
        raise Unauthenticated("this is not an admin key of this service; a client's API key is none")


class AdminDoor:
    """ASGI layer round the admin API: admits before anything of a request is read, and answers every exception.

    Who it is stands in ``scope["state"]["who"]``.
    """

    def __init__(
        self,
        app: ASGIApp,
        admins: Callable[[], Admins],
        max_body_bytes: int = MAX_BODY_BYTES,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._app = app
        self._admins = admins
        self._max_body_bytes = max_body_bytes
        self._read_timeout_s = read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        num_bytes = 0
        reading_until_s: float | None = asyncio.get_running_loop().time() + self._read_timeout_s

        async def limited() -> Message:
            nonlocal num_bytes, reading_until_s
            try:
                async with asyncio.timeout_at(reading_until_s):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(self._read_timeout_s) from None
            if not message.get("more_body"):
                reading_until_s = None  # whoever asks now waits for the caller to leave
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            scope["state"]["who"] = self._admins().admit(Headers(scope=scope), to_read=scope["method"] in READING)
            await self._app(scope, limited, noted)
        except ClientDisconnect:
            raise
        except Exception as error:
            problem = describe(error, scope["state"]["request_id"])
            if not started:
                await problem.response()(scope, receive, send)


def who_of(request: Request) -> str:
    return str(request.scope["state"]["who"])
