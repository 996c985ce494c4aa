"""``fairserve grafana``: write the dashboards as files, or put them into a running Grafana."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairserve import __version__
from fairserve.errors import ConfigError, GrafanaFailed
from fairserve.observe.grafana import FOLDER, differences, documents, write
from fairserve.observe.grafana_push import SOURCE_NAME, Address, open_grafana

ENV_TOKEN = "GRAFANA_TOKEN"
Command = Callable[[Any, str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""``cli._parser``'s maker of a command: under which commands, its name, what it runs, its help."""


def add_commands(commands: Any, command: Command) -> None:
    grafana = commands.add_parser("grafana", help="dashboards for Grafana").add_subparsers(
        required=True, metavar="COMMAND"
    )
    made = command(grafana, "build", build, "write the dashboards, made from the table of metrics")
    made.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=f"default {FOLDER}")
    made.add_argument("--check", action="store_true", help="write nothing; fail when a file there is not the newest")

    push_ = command(grafana, "push", push, f"put them into a running Grafana; ${ENV_TOKEN} is its token")
    push_.add_argument("--url", required=True, metavar="URL", help="such as http://localhost:3000")
    push_.add_argument("--token", metavar="TOKEN", help=f"others on this machine can see it; better ${ENV_TOKEN}")
    push_.add_argument("--folder", default="fairserve", metavar="TITLE", help="default fairserve")
    push_.add_argument("--prometheus-url", metavar="URL", help="make a data source too, as Grafana reaches Prometheus")
    push_.add_argument("--annotate", metavar="TEXT", help="mark this moment on the dashboards, such as an upgrade")


def build(options: argparse.Namespace) -> None:
    if not options.check:
        for path in write(options.out):
            print(path)
    elif found := differences(options.out):
        raise GrafanaFailed("\n".join([*found, f"run: fairserve grafana build --out {options.out}"]))
    else:
        print(f"the dashboards in {options.out} are the newest")


def push(options: argparse.Namespace) -> None:
    token = options.token or os.environ.get(ENV_TOKEN, "").strip()
    if not token:
        raise ConfigError(f"no token: set {ENV_TOKEN} to that of a Grafana service account")
    if options.prometheus_url is not None and not options.prometheus_url.startswith(("http://", "https://")):
        raise ConfigError(
            f"--prometheus-url {options.prometheus_url!r} is not an address such as http://prometheus:9090"
        )
    grafana = open_grafana(Address.parsed(options.url), token)
    print(f"Grafana {grafana.version()}")
    source_uid = None
    if options.prometheus_url is not None:
        source_uid, state = grafana.data_source(options.prometheus_url)
        print(f"data source {SOURCE_NAME}: {state}")
    folder_uid = grafana.folder(options.folder)
    for document in documents(source_uid).values():
        state = grafana.dashboard(document, folder_uid, message=f"fairserve {__version__}")
        print(f"{document['title']}: {state}")
    if options.annotate:
        print(f"annotation: {grafana.annotate(options.annotate, int(time.time() * 1000))}")
