"""A :class:`~fairserve.dispatch.store.Store` in Redis, which several clusters may share.

Each cluster writes keys of its own, ``fairserve:NAMESPACE.NAME:CLUSTER:...``, and reads what the others have published
there; live changes and their audit log are common to all. A snapshot is written in one transaction, so that whoever
reads it, reads one moment.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

from fairserve.dispatch.cut import BookKey, Cut
from fairserve.dispatch.messages import Totals
from fairserve.dispatch.periods import DAY_S
from fairserve.dispatch.store import Head, HistoryRow, Overtaken, Published, Snapshot, snapshot_of
from fairserve.dispatch.usage import HOURS
from fairserve.dispatch.usage_rows import UsageKey, UsageRow
from fairserve.errors import ConfigError

ENV_PASSWORD = "FAIRSERVE_REDIS_PASSWORD"
ENV_PASSWORD_FILE = "FAIRSERVE_REDIS_PASSWORD_FILE"
CONNECT_S, ANSWER_S = 1.0, 2.0
"""Longest wait for a connection, and for any part of an answer."""
FORGET_S = 7 * 24 * 3600.0
"""Snapshots of clusters that have been silent for so long are dropped when another begins."""
BY_HOUR = "usage-hours"
_BATCH = 500
_TRIES = 5
_KINDS = ("nodes", "served", "changed", "books")


@dataclass(frozen=True)
class Credentials(CredentialProvider):
    """Asked for at every connection, so that a password may be changed in its file. Shows itself to nobody."""

    username: str | None
    environ: Mapping[str, str]

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """
        Raises:
            ConfigError: both are given, or the file cannot be read.
        """
        password, file = self.environ.get(ENV_PASSWORD), self.environ.get(ENV_PASSWORD_FILE)
        if password and file:
            raise ConfigError(f"give {ENV_PASSWORD} or {ENV_PASSWORD_FILE}, not both")
        if file:
            try:
                password = Path(file).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not text"
                raise ConfigError(f"{ENV_PASSWORD_FILE}: {file} cannot be read: {reason}") from None
            if not password:
                raise ConfigError(f"{ENV_PASSWORD_FILE}: {file} is empty")
        password = password or ""
        return (self.username, password) if self.username else (password,)

    def __repr__(self) -> str:
        return "Credentials()"


def connected(url: str, environ: Mapping[str, str] = os.environ) -> Any:
    """A client of the Redis at ``url``; nothing is sent yet. Every call has its time-out, and none is repeated."""
    parts = urlsplit(url)
    has_password = bool(environ.get(ENV_PASSWORD) or environ.get(ENV_PASSWORD_FILE))
    more: dict[str, Any] = {"credential_provider": Credentials(parts.username, environ)} if has_password else {}
    if parts.scheme == "rediss":
        more |= {"ssl": True, "ssl_ca_certs": next(iter(parse_qs(parts.query).get("ssl_ca_certs", [])), None)}
    return redis.Redis(
        host=parts.hostname or "localhost",
        port=parts.port or 6379,
        db=int(parts.path.strip("/") or 0),
        decode_responses=True,
        socket_connect_timeout=CONNECT_S,
        socket_timeout=ANSWER_S,
        retry=Retry(NoBackoff(), 0),
        **more,
    )


class RedisStore:
    """``cluster`` answers with the id of this Ray cluster; it is asked once, when first needed. ``client``: an open
    one, for tests."""

    def __init__(
        self, url: str, name: str, cluster: Callable[[], str], unix_s: Callable[[], float], client: Any = None
    ) -> None:
        self._redis = client if client is not None else connected(url)
        parts = urlsplit(url)
        self._at = f"{parts.scheme}://{parts.hostname or 'localhost'}:{parts.port or 6379}/{parts.path.strip('/') or 0}"
        self._prefix = f"fairserve:{name}"
        self._find_cluster = cluster
        self._cluster = ""
        self._unix_s = unix_s
        self._history_of: str | None = None

    @property
    def place(self) -> str:
        return f"{self._at} ({self._prefix})"

    @property
    def cluster(self) -> str:
        self._cluster = self._cluster or self._find_cluster()
        return self._cluster

    # -- the authority's snapshot -----------------------------------------------------------------------------------

    def save(self, cut: Cut, head: Head) -> None:
        with self._asking("written") as db:
            mine = self.cluster
            if cut.is_whole:
                written = self._write_beside(cut, head)
            with db.pipeline(transaction=True) as pipe:
                pipe.watch(self._key(mine, "head"))
                text = pipe.get(self._key(mine, "head"))
                head.check_follows(Head.load(text) if text else None, is_whole=cut.is_whole)
                old = set(pipe.hkeys(self._key(mine, "books"))) if cut.is_whole else set()
                pipe.multi()
                if cut.is_whole:
                    self._delete(pipe, mine, old)
                    for kind in written:
                        pipe.rename(self._key(mine, "new", kind), self._key(mine, kind))
                else:
                    for key in cut.gone:
                        pipe.hdel(self._key(mine, "books"), _field(key))
                        pipe.delete(self._key(mine, "book", _field(key)))
                    for kind, rows in self._rows(cut, head):
                        _put(pipe, self._key(mine, kind), kind, rows)
                self._put_usage(pipe, cut)
                pipe.set(self._key(mine, "head"), head.dump())
                pipe.sadd(f"{self._prefix}:clusters", mine)
                pipe.execute()
            if cut.is_whole:
                self._forget_silent()

    def load(self) -> tuple[Head, Snapshot] | None:
        with self._asking("read"):
            heads = {head.cluster: head for head in self._heads() if head is not None}
            mine = self._redis.get(self._key(self.cluster, "head"))
            if mine is not None:
                head = Head.load(mine)
            elif heads:
                head = max(heads.values(), key=lambda head: head.saved_s)
            else:
                return None
            self._history_of = head.cluster
            return self._load(head.cluster)

    def _put_usage(self, pipe: Any, cut: Cut) -> None:
        """One key for each day, which goes by itself; and another one for its hours."""
        days: dict[tuple[str, int], dict[str, str]] = {}
        for (day, client), row in cut.usage.items():
            days.setdefault(("usage", day), {})[client] = _json(row)
        for (hour, client), row in cut.usage_hours.items():
            days.setdefault((BY_HOUR, hour // HOURS), {})[f"{hour}:{client}"] = _json(row)
        first = {"usage": cut.first_day, BY_HOUR: cut.first_hour // HOURS}
        for (kind, day), rows in days.items():
            key = self._key(self.cluster, kind, str(day))
            for part in _parts([*rows]):
                pipe.hset(key, mapping={field: rows[field] for field in part})
            pipe.expire(key, max(1, day - first[kind] + 1) * DAY_S)
        if cut.usage_hours:  # a day's hours may have to go before their time
            pipe.delete(self._key(self.cluster, BY_HOUR, str(first[BY_HOUR] - 1)))

    def load_usage(self, days: range) -> dict[UsageKey, UsageRow]:
        found = self._load_usage("usage", days)
        return {(day, client): row for day, rows in found.items() for client, row in rows.items()}

    def load_usage_hours(self, hours: range) -> dict[UsageKey, UsageRow]:
        found = self._load_usage(BY_HOUR, range(hours.start // HOURS, -(-hours.stop // HOURS)))
        fields = [(*field.partition(":")[::2], row) for rows in found.values() for field, row in rows.items()]
        return {(int(hour), client): row for hour, client, row in fields if int(hour) in hours}

    def _load_usage(self, kind: str, days: range) -> dict[int, dict[str, UsageRow]]:
        cluster = self._history_of or self.cluster
        with self._asking("read") as db, db.pipeline(transaction=False) as pipe:
            for day in days:
                pipe.hgetall(self._key(cluster, kind, str(day)))
            found = zip(days, pipe.execute(), strict=True)
            return {day: {field: tuple(json.loads(row)) for field, row in rows.items()} for day, rows in found}

    def set_aside(self) -> str:
        with self._asking("written") as db:
            mine = self.cluster
            books = db.hkeys(self._key(mine, "books")) if db.type(self._key(mine, "books")) == "hash" else []
            kinds = ["head", *_KINDS, *(f"book:{field}" for field in books)]
            there = [kind for kind in kinds if db.exists(self._key(mine, kind))]
            with db.pipeline(transaction=True) as pipe:
                for kind in there:
                    pipe.rename(self._key(mine, kind), self._key(mine, "unreadable", kind))
                pipe.execute()
            return self._key(mine, "unreadable")

    def heads(self) -> list[Head]:
        with self._asking("read"):
            return [head for head in self._heads() if head is not None]

    def others(self, known: Mapping[tuple[str, int], int]) -> list[Published]:
        with self._asking("read") as db:
            found = []
            for head in self._heads():
                if head is None or head.cluster == self.cluster:
                    continue
                since = known.get((head.cluster, head.incarnation), 0)
                if head.seq <= since:
                    continue
                changed = f"({since}"
                accounts = db.zrangebyscore(self._key(head.cluster, "changed"), changed, "+inf")
                totals: dict[str, Totals] = {}
                weights: dict[str, float] = {}
                for part in _parts(accounts):
                    rows = db.hmget(self._key(head.cluster, "served"), part)
                    for account, text in zip(part, rows, strict=True):
                        if text is not None:
                            *row, weights[account] = json.loads(text)
                            totals[account] = Totals(*row)
                # What was written meanwhile may be in the rows, and will come again: totals are cumulative.
                found.append(Published(head.cluster, head.incarnation, head.seq, totals, weights))
            return found

    def _heads(self) -> list[Head | None]:
        """Those that this fairserve cannot read as None."""
        clusters = sorted(self._redis.smembers(f"{self._prefix}:clusters"))
        texts = self._redis.mget([self._key(cluster, "head") for cluster in clusters]) if clusters else []
        heads: list[Head | None] = []
        for text in texts:
            try:
                heads.append(Head.load(text) if text else None)
            except ValueError:
                heads.append(None)
        return heads

    def _load(self, cluster: str) -> tuple[Head, Snapshot]:
        for _ in range(_TRIES):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.watch(self._key(cluster, "head"))
                head = Head.load(pipe.get(self._key(cluster, "head")) or "{}")
                seqs = pipe.hgetall(self._key(cluster, "books"))
                pipe.multi()
                pipe.hgetall(self._key(cluster, "nodes"))
                pipe.hgetall(self._key(cluster, "served"))
                for book in seqs:
                    pipe.hgetall(self._key(cluster, "book", book))
                try:
                    nodes, served, *rows = pipe.execute()
                except redis.WatchError:
                    continue  # its owner saves once a second
            try:
                books = [
                    [*_book(book), int(seqs[book]), {account: json.loads(row) for account, row in found.items()}]
                    for book, found in zip(seqs, rows, strict=True)
                ]
                return head, snapshot_of(
                    {node: json.loads(row) for node, row in nodes.items()},
                    {account: json.loads(row)[:4] for account, row in served.items()},
                    books,
                )
            except (TypeError, IndexError, KeyError) as error:
                raise ValueError(f"no readable snapshot: {error!r}") from error
        raise OSError(f"{self.place} cannot be read: it changes all the time")

    def _rows(self, cut: Cut, head: Head) -> Iterator[tuple[str, Iterator[tuple[str, Any]]]]:
        """Kind of key, and its fields; None for one that goes."""
        yield "nodes", ((node, row and _json(row)) for node, row in cut.nodes.items())
        yield "served", ((account, row and _json(row)) for account, row in cut.served.items())
        yield "changed", ((account, row and head.seq) for account, row in cut.served.items())
        yield "books", ((_field(key), seq) for key, (seq, _) in cut.books.items())
        for key, (_, totals) in cut.books.items():
            yield f"book:{_field(key)}", ((account, total and _json(total.row())) for account, total in totals.items())

    def _write_beside(self, cut: Cut, head: Head) -> list[str]:
        """A whole cut under names of its own, in parts that block nobody for long. Returns the kinds."""
        mine, written = self.cluster, []
        beside = self._redis.hkeys(self._key(mine, "new", "books"))  # of one that was given up
        self._redis.delete(
            *(self._key(mine, "new", kind) for kind in (*_KINDS, *(f"book:{field}" for field in beside)))
        )
        for kind, rows in self._rows(cut, head):
            with self._redis.pipeline(transaction=False) as pipe:
                if _put(pipe, self._key(mine, "new", kind), kind, rows):
                    written.append(kind)
                pipe.execute()
        return written

    def _delete(self, pipe: Any, cluster: str, books: Iterable[str]) -> None:
        kinds = ("head", *_KINDS, *(f"book:{field}" for field in books))
        pipe.delete(*(self._key(cluster, kind) for kind in kinds))

    def _forget_silent(self) -> None:
        """What those served is in the snapshots of all that go on."""
        for head in self._heads():
            if head is not None and head.saved_s < self._unix_s() - FORGET_S and head.cluster != self.cluster:
                self._delete(self._redis, head.cluster, self._redis.hkeys(self._key(head.cluster, "books")))
                self._redis.delete(self._key(head.cluster, "history", "60"))
                self._redis.srem(f"{self._prefix}:clusters", head.cluster)

    # -- what was set live, and by whom -------------------------------------------------------------------------------

    def save_document(
        self, name: str, data: str, audit: Sequence[tuple[int, str]] = (), max_audit: int = 10_000, version: int = 0
    ) -> None:
        key, log = f"{self._prefix}:document:{name}", f"{self._prefix}:audit"
        with self._asking("written") as db:
            for _ in range(_TRIES):
                with db.pipeline(transaction=True) as pipe:
                    pipe.watch(key)
                    before = pipe.hgetall(key)
                    if before and before["data"] != data and int(before["version"]) >= version > 0:
                        raise Overtaken(f"version {before['version']} of {name!r} is there already")
                    pipe.multi()
                    pipe.hset(key, mapping={"version": version, "data": data})
                    for seq, entry in audit:
                        pipe.zremrangebyscore(log, seq, seq)
                        pipe.zadd(log, {entry: seq})
                    if audit:
                        pipe.zremrangebyscore(log, "-inf", max(seq for seq, _ in audit) - max_audit)
                    try:
                        pipe.execute()
                        return
                    except redis.WatchError:
                        continue
            raise Overtaken(f"{name!r} changes all the time")

    def load_document(self, name: str) -> str | None:
        with self._asking("read") as db:
            text: str | None = db.hget(f"{self._prefix}:document:{name}", "data")
            return text

    def load_audit(self, limit: int) -> list[str]:
        with self._asking("read") as db:
            return list(reversed(db.zrange(f"{self._prefix}:audit", 0, limit - 1, desc=True)))

    # -- history ------------------------------------------------------------------------------------------------------

    def save_history(self, rows: Iterable[HistoryRow], keep_since: dict[int, float] | None = None) -> None:
        """One packed member for each resolution and time."""
        moments: dict[tuple[int, float], list[Any]] = {}
        for resolution_s, time_s, *values in rows:
            moments.setdefault((resolution_s, time_s), []).append(values)
        with self._asking("written") as db, db.pipeline(transaction=True) as pipe:
            for (resolution_s, time_s), values in moments.items():
                key = self._key(self.cluster, "history", str(resolution_s))
                packed = base64.b64encode(zlib.compress(_json([time_s, values]).encode())).decode()
                pipe.zremrangebyscore(key, time_s, time_s)
                pipe.zadd(key, {packed: time_s})
            for resolution_s, since_s in (keep_since or {}).items():
                pipe.zremrangebyscore(self._key(self.cluster, "history", str(resolution_s)), "-inf", f"({since_s}")
            pipe.execute()

    def load_history(self, resolution_s: int, since_s: float = 0.0, max_rows: int = -1) -> list[HistoryRow]:
        key = self._key(self._history_of or self.cluster, "history", str(resolution_s))
        with self._asking("read") as db:
            members = db.zrangebyscore(key, since_s, "+inf")
        found: list[HistoryRow] = []
        for member in members:
            time_s, values = json.loads(zlib.decompress(base64.b64decode(member)))
            found += sorted((resolution_s, time_s, *row) for row in values)
        return found if max_rows < 0 else found[max(0, len(found) - max_rows) :]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _key(self, cluster: str, *kind: str) -> str:
        return ":".join((self._prefix, cluster, *kind))

    @contextmanager
    def _asking(self, done: str) -> Iterator[Any]:
        """
        Raises:
            OSError: Redis is away, slow, or refuses.
            ValueError: what is there is not what this fairserve writes.
        """
        try:
            yield self._redis
        except redis.WatchError:
            raise OSError(f"{self.place} cannot be {done}: somebody else writes there") from None
        except (redis.RedisError, ConfigError) as error:
            if isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error):
                raise ValueError(f"{self.place} cannot be read: a key of another kind is there") from None
            said = " ".join(str(error).split())
            raise OSError(f"{self.place} cannot be {done}: {type(error).__name__}: {said}") from None
        except (zlib.error, ValueError) as error:
            raise ValueError(f"{self.place} cannot be read: {error}") from None


def _put(pipe: Any, key: str, kind: str, rows: Iterator[tuple[str, Any]]) -> bool:
    """Whether there was any row."""
    had_any = False
    while part := dict(islice(rows, _BATCH)):
        put = {field: value for field, value in part.items() if value is not None}
        gone = part.keys() - put.keys()
        had_any = had_any or bool(put)
        if put:
            pipe.zadd(key, put) if kind == "changed" else pipe.hset(key, mapping=put)
        if gone:
            pipe.zrem(key, *gone) if kind == "changed" else pipe.hdel(key, *gone)
    return had_any


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _BATCH):
        yield names[start : start + _BATCH]


def _json(row: Any) -> str:
    return json.dumps(row, separators=(",", ":"))


def _field(key: BookKey) -> str:
    return f"{key[1]}:{key[0]}"


def _book(text: str) -> BookKey:
    incarnation, _, name = text.partition(":")
    return name, int(incarnation)
