"""``fairserve usage export``: what each client used, by day or hour; ``fairserve clients budgets``: what it may use."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from fairserve.client import Connection
from fairserve.errors import ConfigError
from fairserve.overrides import lay_over
from fairserve.usage_export import as_csv
from fairserve.views import ClientView

DEFAULT, NONE = "default", "none"
MakeLive = Callable[[Any, str, Callable[[Connection, argparse.Namespace], None], str], argparse.ArgumentParser]


def add(usage: Any, clients: Any, live: MakeLive, show: Callable[[ClientView, argparse.Namespace], None]) -> None:
    """Put the one below ``fairserve usage``, the other below ``fairserve clients``; ``live`` makes a command."""
    made = live(usage, "export", export, "write what each client used, by day of UTC or by hour")
    made.add_argument(
        "file", metavar="FILE", nargs="?", default="-", help="a new file, or one to replace; -: to stdout"
    )
    made.add_argument("--format", choices=("csv", "json"), default="csv", help="default: csv")
    text = "default: day; hour: of the last days (counter.usage_hour_days)"
    made.add_argument("--by", choices=("day", "hour"), default="day", help=text)
    made.add_argument("--from", dest="first", type=_day, metavar="YYYY-MM-DD", help="default: the first of its month")
    made.add_argument("--to", dest="last", type=_day, metavar="YYYY-MM-DD", help="this day included; default: today")

    def budgets(service: Connection, options: argparse.Namespace) -> None:
        show(service.set_budgets(options.name, asked(options.words)), options)

    made = live(clients, "budgets", budgets, "set a client's token budgets, in place of those of its key")
    made.add_argument("name", metavar="CLIENT", help="its name, such as alice or acme/research/ann")
    text = f"WINDOW.KIND=TOKENS, such as day.soft=800000 month.hard=20000000; {NONE}, or {DEFAULT}: as its key says"
    made.add_argument("words", nargs="+", metavar="BUDGET", help=text)


def export(service: Connection, options: argparse.Namespace) -> None:
    last = options.last or datetime.now(UTC).date()
    first = options.first or last.replace(day=1)
    if last < first:
        raise ConfigError(f"--to {last} lies before --from {first}")
    found = service.usage(first, last, options.by)
    if options.format == "csv":
        text = as_csv(found)
    else:
        text = json.dumps([view.model_dump(mode="json") for view in found], indent=2) + "\n"
    if options.file == "-":
        sys.stdout.write(text)
        return
    Path(options.file).write_text(text, newline="")
    print(f"{options.file}: {len(found):,} rows, {first} to {last}", file=sys.stderr)


def asked(words: Sequence[str]) -> dict[str, Any] | None:
    """
    Raises:
        ConfigError: a word is not WINDOW.KIND=TOKENS.
    """
    if list(words) == [DEFAULT]:
        return None
    budgets: dict[str, Any] = {}
    for word in words if list(words) != [NONE] else ():
        lay_over(budgets, word)
    return budgets


def _day(word: str) -> date:
    try:
        return date.fromisoformat(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no date such as 2026-11-21") from None
