"""Where what the counter actor must not forget is kept: a SQLite file or Redis, and Ray's own memory."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from fairserve.cluster.desk import MAX_AUDIT, Change
from fairserve.cluster.live_state import State, newest
from fairserve.config import CounterConfig
from fairserve.dispatch.store import Overtaken, SqliteStore, Store
from fairserve.errors import ChangeNotKept

logger = logging.getLogger(__name__)

LIVE = "live"
"""Name of the document of live changes."""
SESSION = "session"


class Memory(Protocol):
    """One text that outlives the actor's process. Both methods may block, and raise anything."""

    def recall(self) -> str | None: ...
    def remember(self, text: str) -> None: ...


class ClusterMemory:
    """In Ray's internal key-value store, which lives as long as the cluster, on whatever node the actor is."""

    def __init__(self, key: str | None = None) -> None:
        """``key`` None: one of this actor's own, which a restart keeps and a new actor of the same name does not."""
        self._given = key

    def recall(self) -> str | None:
        from ray.experimental.internal_kv import _internal_kv_get

        value = _internal_kv_get(self._key())
        return None if value is None else value.decode()

    def remember(self, text: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key(), text)

    def _key(self) -> str:
        import ray

        return self._given or f"fairserve:settings:{ray.get_runtime_context().get_actor_id()}"


def live_memory(config: CounterConfig) -> ClusterMemory:
    """For the live changes of the counter actor of this name."""
    return ClusterMemory(f"fairserve:live:{config.namespace}:{config.name}")


def ray_session_folder() -> str:
    """Ray's session directory on this node, inside a process of the cluster."""
    from ray._private.worker import _global_node

    return str(_global_node.get_session_dir_path())


def cluster_id(memory: Memory | None) -> str:
    """What this Ray cluster is called where several keep their counters: made once, and kept in ``memory``."""
    known = memory.recall() if memory is not None else None
    if not known:
        known = secrets.token_hex(6)
        if memory is not None:
            memory.remember(known)
    return known


def id_memory(config: CounterConfig) -> ClusterMemory:
    """For :func:`cluster_id`, of the counter actor of this name."""
    return ClusterMemory(f"fairserve:cluster:{config.namespace}:{config.name}")


def store_of(
    config: CounterConfig,
    session_folder: Callable[[], str] | None = None,
    cluster: Callable[[], str] = lambda: cluster_id(None),
    unix_s: Callable[[], float] = time.time,
) -> Store | None:
    """The one that the configuration names; none for ``session`` where there is no Ray session. ``cluster``: the id of
    this Ray cluster.

    Raises:
        ConfigError: the password of Redis is given wrongly.
    """
    if config.store is None:
        return None
    if config.is_in_redis:
        from fairserve.cluster.redis_store import RedisStore

        return RedisStore(config.store, f"{config.namespace}.{config.name}", cluster, unix_s)
    if config.store != SESSION:
        return SqliteStore(config.store)
    if session_folder is None:
        return None
    name = quote(f"{config.namespace}.{config.name}", safe="")
    return SqliteStore(Path(session_folder()) / "fairserve" / f"{name}.sqlite")


class Keeper:
    """Keeps every live change in the store and in ``memory``, as far as there are any; the newest copy wins. All
    methods block."""

    def __init__(self, store: Store | None, memory: Memory | None) -> None:
        self.store = store
        self._memory = memory

    def begin(self) -> tuple[State, list[dict[str, Any]]]:
        """What was changed live, and the audit log, oldest first. A file that cannot be read is set aside; copies that
        are behind are brought up to date."""
        texts: dict[str, str | None] = {"store": None, "memory": None}
        audit: list[dict[str, Any]] = []
        if self.store is not None:
            try:
                texts["store"] = self.store.load_document(LIVE)
                audit = [json.loads(entry) for entry in self.store.load_audit(MAX_AUDIT)]
            except ValueError as error:
                logger.error("%s; set aside as %s", error, self.store.set_aside())
            except OSError as error:
                logger.error("live changes are not known from there: %s", error)
                del texts["store"]
        if self._memory is not None:
            try:
                texts["memory"] = self._memory.recall()
            except Exception:
                logger.exception("Ray's memory of live changes cannot be read")
        state = newest(text for text in texts.values() if text is not None)
        text = state.dump()
        if state.version:
            behind = [place for place, known in texts.items() if known != text]
            with suppress(ChangeNotKept):  # another cluster was first: share() will tell
                self._write(text, None, where=behind, version=state.version)
        return state, audit

    def keep(self, change: Change) -> None:
        """
        Raises:
            ChangeNotKept: it could be kept nowhere, although there is a store or a memory; or another cluster that
                shares the store made a change at the same moment.
        """
        places = ["store"] * (self.store is not None) + ["memory"] * (self._memory is not None)
        failed = self._write(change.state.dump(), change.entry, where=places, version=change.state.version)
        if places and len(failed) == len(places):
            raise ChangeNotKept("; ".join(failed))

    def move(self, store: Store | None, state: State) -> None:
        """From now on there is another store, or none. What an earlier life changed there is over."""
        self.store = store
        if state.version:
            with suppress(ChangeNotKept):
                self._write(state.dump(), None, where=["store"], version=state.version)

    def share(self, mine: State, seen: str | None) -> tuple[State | None, str | None]:
        """Clusters that share the store: the state that another one made, where it is newer than ``mine``; where it is
        older, ``mine`` is put in its place. ``seen``: the document as of the last call; returns it as of this one."""
        assert self.store is not None
        text = self.store.load_document(LIVE)
        if text is not None and text == seen:
            return None, seen
        try:
            theirs = State() if text is None else State.load(text)
        except ValueError as error:
            logger.error("%s; it is left alone", error)
            return None, text
        if theirs.version > mine.version:
            if self._memory is not None:
                self._memory.remember(theirs.dump())
            return theirs, text
        if theirs.version < mine.version:
            text = mine.dump()
            self.store.save_document(LIVE, text, (), MAX_AUDIT, mine.version)
        return None, text

    def put_back(self, state: State, audit: list[dict[str, Any]]) -> None:
        """The store was set aside: what was changed live is written into the new one."""
        if self.store is not None and state.version:
            entries = [(entry["seq"], json.dumps(entry, separators=(",", ":"))) for entry in audit]
            try:
                self.store.save_document(LIVE, state.dump(), entries, MAX_AUDIT, state.version)
            except (OSError, Overtaken):
                logger.exception("live changes could not be kept in %s", self.store.place)

    def _write(self, text: str, entry: dict[str, Any] | None, where: list[str], version: int) -> list[str]:
        """Returns why it failed, for each place where it did."""
        failed: list[str] = []
        if self.store is not None and "store" in where:
            audit = [(entry["seq"], json.dumps(entry, separators=(",", ":")))] if entry else []
            try:
                self.store.save_document(LIVE, text, audit, MAX_AUDIT, version)
            except Overtaken:
                raise ChangeNotKept("another cluster changed something at the same moment; try again") from None
            except (OSError, ValueError) as error:
                logger.exception("a live change could not be kept in %s", self.store.place)
                failed.append(f"{self.store.place}: {error}")
        if self._memory is not None and "memory" in where:
            try:
                self._memory.remember(text)
            except Exception as error:
                logger.exception("a live change could not be kept in Ray's memory")
                failed.append(f"Ray's memory: {error!r}")
        return failed
