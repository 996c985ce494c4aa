"""The commands that look at a running service and change it: ``fairserve top``, ``clients``, ``keys`` and others.

They reach it over HTTP with ``--url`` (or FAIRSERVE_URL), else over Ray. A table in a terminal, JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from rich.live import Live
from rich.text import Text

from fairserve import cli_counters, cli_tables, cli_usage, client
from fairserve.client import ENV_ADMIN_KEY, Connection
from fairserve.config import CounterConfig
from fairserve.errors import ConfigError, CounterUnreachable, InvalidRequest
from fairserve.overrides import setting_of
from fairserve.views import ClientOrder, ClientView

ENV_URL = "FAIRSERVE_URL"
REFRESH_S = 1.0
DEFAULT = "default"
"""Said instead of a number, it takes the live one back."""
MakeCommand = Callable[[Any, str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
Action = Callable[[Connection, argparse.Namespace], None]


# -- what the commands do ---------------------------------------------------------------------------------------------


def top(service: Connection, options: argparse.Namespace) -> None:
    """Anew each second, until Ctrl-C; in a terminal in place."""
    out = cli_tables.console()
    if options.once:
        _print(service.overview(options.top, options.search), options, cli_tables.overview)
        return
    if options.json or not out.is_terminal:
        while True:
            _print(service.overview(options.top, options.search), options, cli_tables.overview, one_line=True)
            sys.stdout.flush()
            _wait()
    with Live(Text("asking"), console=out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown: Any = cli_tables.overview(service.overview(options.top, options.search))
            except CounterUnreachable as error:  # it may come back
                shown = Text(str(error), style="bold red")
            live.update(shown, refresh=True)
            _wait()


def list_clients(service: Connection, options: argparse.Namespace) -> None:
    found = service.clients(order=options.order, search=options.search, limit=options.limit)
    _print(found, options, cli_tables.clients)


def show_client(service: Connection, options: argparse.Namespace) -> None:
    _print_client(service.client(options.name), options)


def set_weight(service: Connection, options: argparse.Namespace) -> None:
    _print_client(service.set_weight(options.name, options.weight), options)


def pause(service: Connection, options: argparse.Namespace) -> None:
    _print_client(service.pause(options.name), options)


def resume(service: Connection, options: argparse.Namespace) -> None:
    _print_client(service.resume(options.name), options)


def set_limits(service: Connection, options: argparse.Namespace) -> None:
    named = {name: getattr(options, name) for name in ("max_waiting", "requests_per_min") if name in options}
    if not named:
        raise ConfigError(f"name a limit: --max-waiting N or --requests-per-min N; {DEFAULT} takes one back")
    _print_client(service.set_limits(options.name, **named), options)


def create_key(service: Connection, options: argparse.Namespace) -> None:
    made = service.create_key(
        options.client, weight=options.weight, max_waiting=options.max_waiting, applications=options.application
    )
    if options.json:
        print(made.model_dump_json(indent=2))
        return
    print(f"the secret of {made.key.client}, shown only now: {made.secret}")
    print(f"its id: {made.key.id}   (fairserve keys revoke {made.key.id})")


def revoke_key(service: Connection, options: argparse.Namespace) -> None:
    _print([service.revoke_key(options.id)], options, cli_tables.keys)


def list_keys(service: Connection, options: argparse.Namespace) -> None:
    _print(service.keys(), options, cli_tables.keys)


def show_replicas(service: Connection, options: argparse.Namespace) -> None:
    _print(service.replicas(), options, cli_tables.replicas)


def show_counters(service: Connection, options: argparse.Namespace) -> None:
    _print(service.counters(), options, cli_tables.counters)


def list_settings(service: Connection, options: argparse.Namespace) -> None:
    _print(service.settings(), options, cli_tables.settings)


def set_settings(service: Connection, options: argparse.Namespace) -> None:
    change = dict(setting_of(word) for word in options.words)
    _print(service.set_settings(change), options, cli_tables.settings)


def reset_settings(service: Connection, options: argparse.Namespace) -> None:
    _print(service.set_settings(dict.fromkeys(options.paths)), options, cli_tables.settings)


def show_audit(service: Connection, options: argparse.Namespace) -> None:
    _print(service.audit(options.before, options.limit), options, cli_tables.audit)


def show_events(service: Connection, options: argparse.Namespace) -> None:
    _print(service.events(options.after, options.limit), options, cli_tables.events)


# -- how they are called ----------------------------------------------------------------------------------------------


def add(commands: Any, keys: Any, command: MakeCommand) -> None:
    """Put the commands below ``fairserve`` and ``fairserve keys``; ``command`` makes one."""

    def group(name: str, text: str) -> Any:
        return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")

    def live(under: Any, name: str, action: Action, text: str) -> argparse.ArgumentParser:
        made = command(under, name, lambda options: _connected(action, options), text)
        _add_connection(made)
        return made

    made = live(commands, "top", top, "the running service at a glance, anew each second")
    made.add_argument("--once", action="store_true", help="print it once")
    made.add_argument("--top", type=int, default=20, metavar="N", help="the N busiest clients (default 20)")
    made.add_argument("--search", metavar="TEXT", help="only clients with TEXT in their names")

    under = group("clients", "the clients of the running service: look, weigh, pause, limit")
    made = live(under, "list", list_clients, "list clients")
    made.add_argument("--order", choices=get_args(ClientOrder), default="service", help="default: service, most first")
    made.add_argument("--search", metavar="TEXT", help="only those with TEXT in their names")
    made.add_argument("--limit", type=int, metavar="N", help="the first N")
    for name, action, text in (
        ("show", show_client, "show one client"),
        ("set-weight", set_weight, "change a client's share, from the next pick on"),
        ("pause", pause, "let a client's requests wait; what runs goes on"),
        ("resume", resume, "grant a paused client's requests again"),
        ("limits", set_limits, "limit a client's waiting requests, or its requests per minute"),
    ):
        made = live(under, name, action, text)
        made.add_argument("name", metavar="CLIENT", help="its name, such as alice or acme/research/ann")
        if name == "set-weight":
            made.add_argument("weight", type=_or_default(float), help=f"above 0; {DEFAULT}: as its key says")
        elif name == "limits":
            for limit in ("--max-waiting", "--requests-per-min"):
                number = _or_default(int)
                made.add_argument(limit, type=number, metavar="N", default=argparse.SUPPRESS, help=f"or {DEFAULT}")

    cli_usage.add(group("usage", "what each client used"), under, live, _print_client)

    made = live(keys, "create", create_key, "make a key in the running service; `keys new` is for the configuration")
    made.add_argument("client", metavar="CLIENT", help="a name, or a path such as organisation/team/user")
    made.add_argument("--weight", type=float, default=1.0, help="share relative to other clients (default 1)")
    made.add_argument("--max-waiting", type=int, metavar="N", help="requests of the client that may wait")
    made.add_argument("--application", action="append", default=[], metavar="LABEL", help="that callers may send")
    made = live(keys, "revoke", revoke_key, "revoke a key that was made with `keys create`")
    made.add_argument("id", metavar="ID", help="as `keys list` shows it, or its beginning")
    live(keys, "list", list_keys, "list the keys made with `keys create`, with --url those of the configuration too")

    live(commands, "replicas", show_replicas, "the model replicas of the running service")
    made = live(commands, "counters", show_counters, "the counter of every client of the running service")
    cli_counters.add(made.add_subparsers(metavar="COMMAND"), live)
    under = group("settings", "the settings that can be changed while the service runs")
    live(under, "list", list_settings, "list them: in force, and as deployed")
    made = live(under, "set", set_settings, "change some, from the next pick on; all or none")
    made.add_argument("words", nargs="+", metavar="PATH=VALUE", help="such as fairness.quantum=500")
    made = live(under, "reset", reset_settings, "take live values back: as deployed")
    made.add_argument("paths", nargs="+", metavar="PATH", help="such as fairness.quantum")
    made = live(commands, "audit", show_audit, "who changed what while the service runs, newest first")
    made.add_argument("--limit", type=int, default=50, metavar="N", help="default 50")
    made.add_argument("--before", type=int, metavar="SEQ", help="those before this one, for the next page")
    made = live(commands, "events", show_events, "what happened of late, oldest first")
    made.add_argument("--limit", type=int, default=200, metavar="N", help="default 200")
    made.add_argument("--after", type=int, default=0, metavar="SEQ", help="only those after this one")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    counter = CounterConfig()
    group = parser.add_argument_group("which service", f"by its URL, or by its Ray cluster without --url and {ENV_URL}")
    group.add_argument("--url", help=f"over HTTP: http://HOST:PORT and the route prefix (default: {ENV_URL})")
    group.add_argument(
        "--admin-key", metavar="KEY", help=f"for --url; better in {ENV_ADMIN_KEY}, where `ps` shows none"
    )
    group.add_argument("--address", help="over Ray: auto, or HOST:PORT or ray://HOST:PORT (default: auto)")
    group.add_argument("--name", dest="actor", default=counter.name, help=f"counter.name (default: {counter.name})")
    group.add_argument("--namespace", default=counter.namespace, help=f"counter.namespace ({counter.namespace})")
    group.add_argument("--model", default="", metavar="NAME", help="of several models, the one to look at (the first)")
    group.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait for an answer (5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _connected(action: Action, options: argparse.Namespace) -> None:
    url = options.url or ("" if options.address else os.environ.get(ENV_URL, ""))
    if url and options.address:
        raise ConfigError("give --url or --address, not both")
    if url and not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} must begin with http:// or https://")
    who = f"cli:{getpass.getuser()}"
    try:
        with client.connect(
            url or options.address,
            name=options.actor,
            namespace=options.namespace,
            admin_key=options.admin_key,
            timeout_s=options.timeout,
            who=who,
            model=options.model,
        ) as service:
            action(service, options)
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
    except BrokenPipeError:  # `fairserve clients list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_client(view: ClientView, options: argparse.Namespace) -> None:
    if options.json:
        print(view.model_dump_json(indent=2))
    else:
        cli_tables.console().print(cli_tables.clients([view]))


def _print(
    shown: BaseModel | Sequence[BaseModel],
    options: argparse.Namespace,
    table: Callable[[Any], Any],
    one_line: bool = False,
) -> None:
    if not options.json:
        cli_tables.console().print(table(shown))
        return
    plain = (
        shown.model_dump(mode="json") if isinstance(shown, BaseModel) else [v.model_dump(mode="json") for v in shown]
    )
    print(json.dumps(plain, indent=None if one_line else 2))


def _or_default(kind: type[float]) -> Callable[[str], float | None]:
    def read(word: str) -> float | None:
        return None if word == DEFAULT else kind(word)

    read.__name__ = f"number or {DEFAULT!r}"  # argparse's message names it
    return read


def _wait() -> None:
    time.sleep(REFRESH_S)
