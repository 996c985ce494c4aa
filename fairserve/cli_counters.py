"""``fairserve counters export`` and ``import``: counters go from one cluster to another, as one JSON document.

Of a running service over Ray, or straight from and to a store (a SQLite file or a Redis) that no service uses now.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairserve.client import Connection
from fairserve.config import CounterConfig
from fairserve.errors import ConfigError

IN_USE_S = 10.0
"""A store that was written so recently has a service that writes it."""
MakeLive = Callable[[Any, str, Callable[[Connection, argparse.Namespace], None], str], argparse.ArgumentParser]


def add(under: Any, live: MakeLive) -> None:
    """Put both below ``fairserve counters``; ``live`` makes a command for a running service."""
    export = live(under, "export", export_running, "write counters and totals to a file, as JSON")
    export.add_argument("file", metavar="FILE", help="a new file, or one to replace; -: to stdout")
    bring = live(under, "import", import_running, "lay exported counters over those in force, or into a new store")
    bring.add_argument("file", metavar="FILE", help="from `fairserve counters export`; -: from stdin")
    for made, stored in ((export, export_stored), (bring, import_stored)):
        text = "not a running service: the file or redis:// URL of a counter.store that none uses now"
        made.add_argument("--store", metavar="PATH|URL", help=text)
        _choose(made, stored)


def _choose(made: argparse.ArgumentParser, stored: Callable[[argparse.Namespace], None]) -> None:
    running = made.get_default("run")
    made.set_defaults(run=lambda options: stored(options) if options.store else running(options))


# -- a running service ------------------------------------------------------------------------------------------------


def export_running(service: Connection, options: argparse.Namespace) -> None:
    _write(service.export_counters(), options.file)


def import_running(service: Connection, options: argparse.Namespace) -> None:
    num_clients = service.import_counters(_read(options.file))
    print(f"the counters of {num_clients:,} clients are in force; a new epoch has begun", file=sys.stderr)


# -- a store ----------------------------------------------------------------------------------------------------------


def export_stored(options: argparse.Namespace) -> None:
    from fairserve.dispatch.snapshots import document

    store = _store(options)
    try:
        found = store.load()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if found is None:
        raise ConfigError(f"{store.place} holds no counters")
    _write(document(*found), options.file)


def import_stored(options: argparse.Namespace) -> None:
    from fairserve.dispatch.snapshots import adopted, read_document, whole_cut
    from fairserve.dispatch.store import Head

    try:
        head, snapshot = read_document(_read(options.file))
    except ValueError as error:
        raise ConfigError(f"{_named(options.file)}: {error}") from None
    mine, now_s = f"import-{secrets.token_hex(4)}", time.time()  # the id of a cluster that never serves
    store = _store(options, mine)
    try:
        heads = store.heads()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if any(now_s - one.saved_s < IN_USE_S for one in heads):
        raise ConfigError(f"{store.place} is in use by a running service: import through it, without --store")
    life = max((one.life for one in heads), default=0)
    store.save(whole_cut(adopted(head, snapshot)), Head(mine, life=life, seq=1, saved_s=now_s))
    print(f"{store.place}: the next service that begins there goes on from these counters", file=sys.stderr)


def _store(options: argparse.Namespace, cluster: str = "export") -> Any:
    from fairserve.cluster.keeper import SESSION, store_of

    if options.store == SESSION:
        raise ConfigError("--store takes a path or a redis:// URL")
    try:
        config = CounterConfig(store=options.store, name=options.actor, namespace=options.namespace)
    except ValueError as error:
        raise ConfigError(f"--store: {error.errors()[0]['msg']}" if hasattr(error, "errors") else str(error)) from None
    made = store_of(config, cluster=lambda: cluster)
    if not config.is_in_redis and not Path(options.store).expanduser().parent.is_dir():
        raise ConfigError(f"--store {options.store}: there is no folder {Path(options.store).expanduser().parent}")
    return made


# -- the document -----------------------------------------------------------------------------------------------------


def _write(document: dict[str, Any], file: str) -> None:
    text = json.dumps(document, separators=(",", ":")) + "\n"
    if file == "-":
        sys.stdout.write(text)
        return
    Path(file).write_text(text)
    print(f"{file}: the counters of {len(document['counters']):,} clients and groups", file=sys.stderr)


def _read(file: str) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        document = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{_named(file)} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{_named(file)} is no export of counters: it holds no object")
    return document


def _named(file: str) -> str:
    return "stdin" if file == "-" else file
