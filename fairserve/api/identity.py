"""Who is calling: from an API key to a :class:`Client`.

Keys are kept as SHA-256 digests only, and looked up by digest. That is constant-time enough: the time of the lookup
depends on the digest of what the caller sent, and nobody can choose a secret whose digest shares a prefix with an
unknown key's digest, so timing teaches nothing that helps to guess the key. The digest found is compared once more
with ``hmac.compare_digest``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import TypeAdapter, ValidationError

from fairserve.config import ApiConfig, ApiKey
from fairserve.errors import ConfigError, InvalidRequest, Unauthenticated

logger = logging.getLogger(__name__)

ENV_KEYS = "FAIRSERVE_API_KEYS"
ANONYMOUS = "anonymous"
OPEN_WARNING = (
    "fairserve runs OPEN: no API key is configured, anybody may call, and the unchecked bearer token names the client. "
    f"For anything but development set api.keys, api.keys_file or {ENV_KEYS}."
)
MAX_SHOWN_TOKEN = 32
SECRET_PREFIXES = ("fs-", "sk-")
CLIENT_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,64}")
_KEY_LIST = TypeAdapter(tuple[ApiKey, ...])


@dataclass(frozen=True, slots=True)
class Client:
    """Whom service is counted for."""

    name: str
    weight: float = 1.0
    max_waiting: int | None = None


class Headers(Protocol):
    """The part of starlette's Headers that is used here."""

    def getlist(self, key: str) -> list[str]: ...


class Identities:
    """Names the caller of every request.

    Raises:
        ConfigError: a key occurs twice, keys of one client disagree, or a trusted gateway has no key.
    """

    def __init__(self, keys: Iterable[ApiKey] = (), *, header: str | None = None, gateways: Sequence[str] = ()) -> None:
        self._clients: dict[str, Client] = {}
        self._by_digest: dict[bytes, tuple[bytes, Client]] = {}
        for key in keys:
            client = Client(key.client, key.weight, key.max_waiting)
            if self._clients.setdefault(key.client, client) != client:
                raise ConfigError(f"client {key.client!r}: its keys disagree about weight or max_waiting")
            digest = bytes.fromhex(key.digest)
            if digest in self._by_digest:
                other = self._by_digest[digest][1].name
                raise ConfigError(f"the same API key is given twice, for clients {other!r} and {key.client!r}")
            self._by_digest[digest] = (digest, client)
        self.is_open = not self._by_digest
        self._header = header
        self._gateways = frozenset(gateways)
        unknown = sorted(self._gateways - self._clients.keys())
        if unknown and not self.is_open:
            raise ConfigError(f"api.trusted_gateways names clients without a key: {', '.join(unknown)}")

    @classmethod
    def from_config(cls, config: ApiConfig, environ: Mapping[str, str]) -> Identities:
        """Keys of the configuration, of its keys_file and of the environment together."""
        keys = [*config.keys]
        if config.keys_file is not None:
            keys += _keys_in_file(Path(config.keys_file).expanduser())
        if environ.get(ENV_KEYS, "").strip():
            keys += _keys_in_env(environ[ENV_KEYS])
        identities = cls(keys, header=config.trusted_client_header, gateways=config.trusted_gateways)
        if identities.is_open:
            logger.warning(OPEN_WARNING)
        return identities

    def identify(self, headers: Headers) -> Client:
        """Name the caller.

        Raises:
            Unauthenticated: keys are configured and the caller sent none, or an unknown one.
            InvalidRequest: a trusted gateway named the client wrongly.
        """
        token = _bearer(headers)
        if self.is_open:
            return Client(ANONYMOUS if token is None else _name_for(token))
        if token is None:
            raise Unauthenticated("no API key: send 'Authorization: Bearer <key>'")
        digest = hashlib.sha256(token).digest()
        stored, client = self._by_digest.get(digest, (b"", None))
        if client is None or not hmac.compare_digest(stored, digest):
            raise Unauthenticated("this API key is not known here")
        return self._named_by_gateway(client, headers) if client.name in self._gateways else client

    def _named_by_gateway(self, gateway: Client, headers: Headers) -> Client:
        names = headers.getlist(self._header) if self._header else []
        if not names:
            return gateway
        # Two headers would mean that the gateway adds its own to one that its caller sent: believe neither.
        if len(names) > 1 or not CLIENT_NAME.fullmatch(names[0]):
            raise InvalidRequest(f"header {self._header} must name one client: 1-64 of A-Z a-z 0-9 . _ : @ -")
        return self._clients.get(names[0], Client(names[0]))


def _bearer(headers: Headers) -> bytes | None:
    """The caller's secret as the bytes that were sent, None without one."""
    sent = headers.getlist("authorization")
    if len(sent) != 1:
        return None
    scheme, _, token = sent[0].partition(" ")
    token = token.strip()
    return token.encode("latin-1") if scheme.lower() == "bearer" and token else None


def _name_for(token: bytes) -> str:
    """Open mode: a client name that holds no strange characters. What looks like a real secret (long, or with a key's
    prefix) is never shown as a name: names stand in answers, logs and snapshots."""
    text = token.decode("latin-1")
    is_secret = len(text) > MAX_SHOWN_TOKEN or text.startswith(SECRET_PREFIXES)
    return text if CLIENT_NAME.fullmatch(text) and not is_secret else f"key-{hashlib.sha256(token).hexdigest()[:8]}"


def _keys_in_env(text: str) -> tuple[ApiKey, ...]:
    try:
        data = json.loads(text)
    except ValueError:
        raise ConfigError(f"{ENV_KEYS} is not valid JSON") from None
    return _validated(data, ENV_KEYS)


def _keys_in_file(path: Path) -> tuple[ApiKey, ...]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"api.keys_file {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)  # the error's own text would show the line, and so the key
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(f"api.keys_file {str(path)!r} is neither JSON nor YAML{where}") from None
    return _validated(data, f"api.keys_file {str(path)!r}")


def _validated(data: Any, source: str) -> tuple[ApiKey, ...]:
    if not isinstance(data, list):
        raise ConfigError(f"{source} must hold a list of keys")
    for index, entry in enumerate(data):
        if isinstance(entry, dict) and not entry.keys() <= ApiKey.model_fields.keys():
            # Not named: whoever writes {secret: client} has made the secret a field name.
            raise ConfigError(f"{source}: entry {index} has an unknown field; known: {', '.join(ApiKey.model_fields)}")
    try:
        return _KEY_LIST.validate_python(tuple(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"{source}: entry {where}: {first['msg']}") from None
