"""Who is calling: from an API key to a :class:`Client`.

A client is flat (``ann``) or a path (``acme/research/ann``), and only leaves are clients: where ``acme/ann`` is one,
``acme`` is not, else ``acme`` would have a share beside the one of its own organisation.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fairserve.config import CLIENT_PATH, CLIENT_RULE, CLIENT_SEGMENT, OF_CLIENT, ApiConfig, ApiKey
from fairserve.errors import ConfigError, InvalidRequest, Unauthenticated
from fairserve.overrides import told_place

logger = logging.getLogger(__name__)

ENV_KEYS = "FAIRSERVE_API_KEYS"
ANONYMOUS = "anonymous"
OPEN_WARNING = (
    "fairserve runs OPEN: no API key is configured, anybody may call, and the unchecked bearer token names the client. "
    f"For anything but development set api.keys, api.keys_file or {ENV_KEYS}."
)
MAX_SHOWN_TOKEN = 24
"""Characters of a token that may be a name; the keys of many services are 32 hex digits."""
SECRET_PREFIXES = ("fs-", "sk-")
CLIENT_NAME = re.compile(CLIENT_PATH)
FLAT_NAME = re.compile(CLIENT_SEGMENT)
AGREED = ("weight", "max_waiting", "budgets", "has_users")
"""What the keys of a client must say alike, as :class:`Client` has it."""
USER_NAME = re.compile("[A-Za-z0-9._@-]{1,48}")
"""Users that are shown as they are; no ":", which joins a client and a tier."""
NO_USER = "no-user"
KeyKind = TypeVar("KeyKind", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Client:
    """Whom service is counted for."""

    name: str
    weight: float = 1.0
    max_waiting: int | None = None
    applications: tuple[str, ...] = ()
    """What its key registers; :mod:`fairserve.api.labels` says what that allows."""
    is_gateway: bool = False
    """A trusted gateway sends the request, for this client or for itself: its application label is believed."""
    budgets: tuple[tuple[str, int | None, int | None], ...] = ()
    """Of tokens: window, soft, hard."""
    service_tiers: tuple[str, ...] = ()
    """What its key may ask for."""
    has_users: bool = False
    """Its users are the clients: see :meth:`of_user`."""

    def of_user(self, user: str | None) -> Client:
        """Whom a request of this ``user`` counts for: the user, where the key says so, and else this client. A user
        whose name does not fit into a client's is shown by a digest of it."""
        if not self.has_users:
            return self
        name = user or NO_USER
        if not USER_NAME.fullmatch(name):
            name = f"user-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return replace(self, name=f"{self.name}/{name}", has_users=False)

    def at_tier(self, tier: str | None, weights: Mapping[Any, float]) -> tuple[Client, str]:
        """The client that a request of this ``tier`` counts for, and the tier that it gets. A tier has a name of its
        own because weight is a client's, not a request's."""
        if tier not in self.service_tiers or tier not in weights:
            return self, "default"
        return replace(self, name=f"{self.name}+{tier}", weight=self.weight * weights[tier]), tier


class Headers(Protocol):
    """The part of starlette's Headers that is used here."""

    def getlist(self, key: str) -> list[str]: ...


class Identities:
    """Names the caller of every request. Never changes: :meth:`with_live` makes another one.

    ``is_closed``: without any key, nobody is let in, instead of everybody.

    Raises:
        ConfigError: a key occurs twice, keys of one client disagree, a client stands above another one, or a trusted
            gateway has no key.
    """

    def __init__(
        self,
        keys: Iterable[ApiKey] = (),
        *,
        header: str | None = None,
        gateways: Sequence[str] = (),
        is_closed: bool = False,
    ) -> None:
        self._deployed = tuple(key.model_copy(update={"key": None, "key_sha256": key.digest}) for key in keys)
        self._clients: dict[str, Client] = {}
        self._by_digest: dict[bytes, tuple[bytes, Client]] = {}
        for key in self._deployed:
            client = Client(
                key.client,
                key.weight,
                key.max_waiting,
                key.applications,
                budgets=key.budgets.rows,
                service_tiers=key.service_tiers,
                has_users=key.sub_clients,
            )
            known = self._clients.setdefault(key.client, client)
            if any(getattr(known, name) != getattr(client, name) for name in AGREED):
                raise ConfigError(f"client {key.client!r}: its keys disagree about {', '.join(OF_CLIENT)}")
            # Each key has its own applications; a gateway speaks for the client, and so for all of its keys.
            together = dict.fromkeys(known.applications + client.applications)
            self._clients[key.client] = replace(known, applications=tuple(together))
            digest = bytes.fromhex(key.digest)
            if digest in self._by_digest:
                other = self._by_digest[digest][1].name
                raise ConfigError(f"the same API key is given twice, for clients {other!r} and {key.client!r}")
            self._by_digest[digest] = (digest, client)
        self.is_open = not self._by_digest and not is_closed
        self._below = {group: name for name in sorted(self._clients) for group in _groups(name)}
        """Every path above a client -> one client below it."""
        for name in sorted(self._clients):
            if name in self._below:
                raise ConfigError(f"{self._clash(name)}: give {name!r} a path of its own, such as '{name}/all'")
        self._header = header
        self._gateways = frozenset(gateways)
        unknown = sorted(self._gateways - self._clients.keys())
        if unknown and self._by_digest:
            raise ConfigError(f"api.trusted_gateways names clients without a key: {', '.join(unknown)}")

    @classmethod
    def from_config(cls, config: ApiConfig, environ: Mapping[str, str]) -> Identities:
        """Keys of the configuration, of its keys_file and of the environment together."""
        keys = deployed_keys(config, environ)
        identities = cls(keys, header=config.trusted_client_header, gateways=config.trusted_gateways)
        if identities.is_open:
            logger.warning(OPEN_WARNING)
        return identities

    def with_live(self, live: Iterable[ApiKey]) -> Identities:
        """Those of the deployment, which these are, with the keys that were created while the service ran. No longer
        open, and not open again when they are all revoked.

        What is deployed wins: of a client with a deployed key the weight and limit stay, a deployed secret names whom
        it named, and a key whose client cannot stand beside a deployed one lets nobody in. The latter two are logged.
        """
        keys = list(self._deployed)
        deployed = {key.client: {name: getattr(key, name) for name in OF_CLIENT} for key in self._deployed}
        for key in live:
            known = deployed.get(key.client)
            if bytes.fromhex(key.digest) in self._by_digest:
                logger.warning("live key %s is a key of the deployment, too, which holds", key.digest[:12])
            elif known is None and (clash := self._clash(key.client)):
                logger.error("live key %s lets nobody in: %s", key.digest[:12], clash)
            elif known is None:
                keys.append(key)
            else:
                keys.append(key.model_copy(update=known))
        gateways = sorted(self._gateways & {key.client for key in keys})
        return Identities(keys, header=self._header, gateways=gateways, is_closed=True)

    def identify(self, headers: Headers) -> Client:
        """Name the caller.

        Raises:
            Unauthenticated: keys are configured and the caller sent none, or an unknown one.
            InvalidRequest: a trusted gateway named the client wrongly.
        """
        token = bearer_of(headers)
        if self.is_open:
            return Client(ANONYMOUS if token is None else _name_for(token))
        if token is None:
            raise Unauthenticated("no API key: send 'Authorization: Bearer <key>'")
        digest = hashlib.sha256(token).digest()
        stored, client = self._by_digest.get(digest, (b"", None))
        if client is None or not hmac.compare_digest(stored, digest):
            raise Unauthenticated("this API key is not known here")
        if client.name not in self._gateways:
            return client
        return replace(self._named_by_gateway(client, headers), is_gateway=True)

    def _named_by_gateway(self, gateway: Client, headers: Headers) -> Client:
        names = headers.getlist(self._header) if self._header else []
        if not names:
            return gateway
        # Two headers would mean that the gateway adds its own to one that its caller sent: believe neither.
        if len(names) > 1 or not CLIENT_NAME.fullmatch(names[0]):
            raise InvalidRequest(f"header {self._header} must name one client: {CLIENT_RULE}")
        if clash := self._clash(names[0]):
            raise InvalidRequest(f"header {self._header}: {clash}")
        return self._clients.get(names[0], Client(names[0]))

    def _clash(self, name: str) -> str | None:
        """Why ``name`` and a client with a key cannot both be clients, None if they can."""
        if name in self._below:
            above, below = name, self._below[name]
        else:
            above, below = next((group for group in _groups(name) if group in self._clients), ""), name
        return f"client {above!r} stands above client {below!r}, and only one of the two can be" if above else None


def deployed_keys(config: ApiConfig, environ: Mapping[str, str]) -> list[ApiKey]:
    """The API keys of the configuration, of its keys_file and of the environment together.

    Raises:
        ConfigError: a source of keys cannot be read, or holds something else.
    """
    keys = [*config.keys]
    if config.keys_file is not None:
        keys += _keys_in_file(Path(config.keys_file).expanduser())
    if environ.get(ENV_KEYS, "").strip():
        keys += keys_in_env(environ[ENV_KEYS], ENV_KEYS, ApiKey)
    return keys


def _groups(name: str) -> list[str]:
    """The paths above a client: ``acme/research/ann`` is below ``acme`` and ``acme/research``."""
    segments = name.split("/")
    return ["/".join(segments[:i]) for i in range(1, len(segments))]


def bearer_of(headers: Headers) -> bytes | None:
    """The caller's secret as the bytes that were sent, None without one."""
    sent = headers.getlist("authorization")
    if len(sent) != 1:
        return None
    scheme, _, token = sent[0].partition(" ")
    token = token.strip()
    return token.encode("latin-1") if scheme.lower() == "bearer" and token else None


def _name_for(token: bytes) -> str:
    """Open mode: a client name that is flat and holds no strange characters. What looks like a real secret (long, or
    with a key's prefix) is never shown as a name: names stand in answers, logs and snapshots."""
    text = token.decode("latin-1")
    is_secret = len(text) > MAX_SHOWN_TOKEN or text.startswith(SECRET_PREFIXES)
    return text if FLAT_NAME.fullmatch(text) and not is_secret else f"key-{hashlib.sha256(token).hexdigest()[:8]}"


def keys_in_env(text: str, variable: str, kind: type[KeyKind]) -> tuple[KeyKind, ...]:
    """The keys in the value of an environment variable, a JSON list.

    Raises:
        ConfigError: it is not; no secret is told.
    """
    try:
        data = json.loads(text)
    except ValueError:
        raise ConfigError(f"{variable} is not valid JSON") from None
    return _validated(data, variable, kind)


def _keys_in_file(path: Path) -> tuple[ApiKey, ...]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"api.keys_file {str(path)!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"api.keys_file {str(path)!r} is neither JSON nor YAML{told_place(error)}") from None
    return _validated(data, f"api.keys_file {str(path)!r}", ApiKey)


def _validated(data: Any, source: str, kind: type[KeyKind]) -> tuple[KeyKind, ...]:
    if not isinstance(data, list):
        raise ConfigError(f"{source} must hold a list of keys")
    for index, entry in enumerate(data):
        if isinstance(entry, dict) and not entry.keys() <= kind.model_fields.keys():
            # Not named: whoever writes {secret: client} has made the secret a field name.
            raise ConfigError(f"{source}: entry {index} has an unknown field; known: {', '.join(kind.model_fields)}")
    try:
        return TypeAdapter(tuple[kind, ...]).validate_python(tuple(data))  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"{source}: entry {where}: {first['msg']}") from None
