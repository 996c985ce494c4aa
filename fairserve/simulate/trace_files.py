"""Trace files, line by line: CSV or JSON lines, plain or gzipped. What they mean: ``traces.py``."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from fairserve.errors import ConfigError
from fairserve.simulate.records import Arrival

logger = logging.getLogger(__name__)

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "request_id": ("request_id", "req_id"),
    "arrival_s": ("arrival_s", "arrival", "req_time", "timestamp"),
    "client": ("client", "tenant", "user"),
    "num_input": ("input_tokens", "input", "num_input", "prompt_len", "input_length"),
    "num_output": ("output_tokens", "output", "num_output", "output_len", "output_length"),
    "max_output": ("max_output", "max_tokens"),
    "weight": ("weight",),
    "application": ("application",),
    "interaction": ("interaction", "session"),
    "call_index": ("call_index",),
    "prefix": ("hash_ids", "prefix"),
    "cancel_after": ("cancel_after",),
    "ingress": ("ingress",),
}
"""Field of :class:`Arrival` -> the columns that may hold it; where a file has several of them the first one counts.
``timestamp`` is milliseconds, the other times are seconds. The first name is the one that is written."""
REQUIRED = ("arrival_s", "num_input", "num_output")
SUFFIXES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")
DEFAULT_CLIENT = "client-0"

_DEFAULTS = {field.name: field.default for field in fields(Arrival)}


class _Kind(NamedTuple):
    """How a value is read from a CSV cell or a JSON value; ``read`` raises ValueError or TypeError."""

    read: Callable[[Any], Any]
    allowed: str


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _at_least(least: int) -> _Kind:
    def read(value: Any) -> int:
        number = value if type(value) is int else _number(value)
        if number != int(number) or number < least:
            raise ValueError(value)
        return int(number)

    return _Kind(read, f"a whole number of at least {least}")


def _at_least_zero(value: Any) -> float:
    if (number := _number(value)) < 0:
        raise ValueError(value)
    return number


def _above_zero(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError(value)
    return number


def _hashes(value: Any) -> tuple[int, ...]:
    parts = value.split() if isinstance(value, str) else value
    if any(isinstance(part, float | bool) for part in parts):
        raise ValueError(value)
    return tuple(int(part) for part in parts)


_WORD = _Kind(str, "text")
_KINDS = {
    "request_id": _WORD,
    "arrival_s": _Kind(_at_least_zero, "a number of seconds of at least 0"),
    "timestamp": _Kind(lambda value: _at_least_zero(value) / 1000, "a number of milliseconds of at least 0"),
    "client": _WORD,
    "num_input": _at_least(1),
    "num_output": _at_least(1),
    "max_output": _at_least(1),
    "weight": _Kind(_above_zero, "a number above 0"),
    "application": _WORD,
    "interaction": _WORD,
    "call_index": _at_least(0),
    "prefix": _Kind(_hashes, "a list of whole numbers (in CSV with spaces between them)"),
    "cancel_after": _at_least(0),
    "ingress": _at_least(0),
}


def read_file(path: Path) -> list[Arrival]:
    """Every request of a file, in the file's order.

    Raises:
        ConfigError: an unreadable file, a missing column, a wrong value, an id that is there twice; it names the line.
    """
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"{path} is no trace by its name: it must end in one of {', '.join(SUFFIXES)}")
    arrivals: list[Arrival] = []
    lines: dict[str, int] = {}
    try:
        with _opened(path, "r") as file:
            for line, row in _rows(path, file):
                arrival = _arrival(path, line, row, default_id=f"{len(arrivals):06d}")
                if arrival.request_id in lines:
                    first = lines[arrival.request_id]
                    raise ConfigError(
                        f"{path}, line {line}: the request id {arrival.request_id!r} is also in line {first}"
                    )
                lines[arrival.request_id] = line
                arrivals.append(arrival)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read the trace {path}: {getattr(error, 'strerror', None) or error}") from error
    if not arrivals:
        raise ConfigError(f"the trace {path} holds no requests")
    return arrivals


def write_trace(arrivals: Sequence[Arrival], path: Path) -> None:
    """Write arrivals so that ``read_trace`` gives back the same ones. Columns that no arrival uses are left out.

    Raises:
        ConfigError: a name that ends in none of SUFFIXES, or a folder that cannot be written to.
    """
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"cannot write {path}: a trace's name must end in one of {', '.join(SUFFIXES)}")
    used = [name for name in COLUMNS if any(getattr(one, name) != _default(name, one) for one in arrivals)]
    rows = ({COLUMNS[name][0]: getattr(one, name) for name in used} for one in arrivals)
    try:
        with _opened(path, "w") as file:
            if ".csv" in path.suffixes[-2:]:
                table = csv.DictWriter(file, [COLUMNS[name][0] for name in used], lineterminator="\n")
                table.writeheader()
                for row in rows:
                    table.writerow(
                        {**row, "hash_ids": " ".join(map(str, row["hash_ids"]))} if "hash_ids" in row else row
                    )
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from error


def _default(name: str, one: Arrival) -> Any:
    """What the field of a read request is when the file has no column for it."""
    return one.num_output if name == "max_output" else _DEFAULTS[name]


def _opened(path: Path, mode: str) -> IO[str]:
    if path.suffix != ".gz":
        return path.open(mode, encoding="utf-8", newline="")
    packed = gzip.GzipFile(path, mode + "b", mtime=0)  # without the time, equal traces are equal files
    return io.TextIOWrapper(packed, encoding="utf-8", newline="")


def _rows(path: Path, file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, column -> value) of each request; empty cells and nulls are left out."""
    if ".csv" in path.suffixes[-2:]:
        table = csv.DictReader(file, strict=True)
        _check_columns(path, table.fieldnames or ())
        for row in table:
            if None in row:
                raise ConfigError(
                    f"{path}, line {table.line_num}: more cells than the {len(table.fieldnames or ())} columns"
                )
            yield table.line_num, {name: cell for name, cell in row.items() if cell not in (None, "")}
        return
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}, line {line}: a {type(row).__name__}, expected an object with a request's columns"
            )
        if line == 1:
            _check_columns(path, row)
        yield line, {name: value for name, value in row.items() if value is not None}


def _check_columns(path: Path, found: Iterable[str]) -> None:
    found = list(found)
    for name in REQUIRED:
        if not set(COLUMNS[name]) & set(found):
            raise ConfigError(
                f"{path}: no column for {name}: give it as one of {', '.join(COLUMNS[name])}; found {', '.join(found)}"
            )
    known = [column for columns in COLUMNS.values() for column in columns]
    for column in found:
        if column not in known and (near := get_close_matches(column, known, n=1, cutoff=0.8)):
            logger.warning("%s: column %r is passed over; did you mean %r?", path, column, near[0])


@lru_cache(maxsize=64)
def _chosen(found: tuple[str, ...]) -> list[tuple[str, str, _Kind]]:
    """(field, column, kind) of the columns that count."""
    chosen = []
    for name, columns in COLUMNS.items():
        if column := next((column for column in columns if column in found), None):
            chosen.append((name, column, _KINDS.get(column) or _KINDS[name]))
    return chosen


def _arrival(path: Path, line: int, row: Mapping[str, Any], default_id: str) -> Arrival:
    values: dict[str, Any] = {"request_id": default_id, "client": DEFAULT_CLIENT}
    for name, column, kind in _chosen(tuple(row)):
        try:
            values[name] = kind.read(row[column])
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(
                f"{path}, line {line}, column {column!r}: {row[column]!r} is not {kind.allowed}"
            ) from None
    if missing := [name for name in REQUIRED if name not in values]:
        columns = ", ".join(COLUMNS[missing[0]])
        raise ConfigError(f"{path}, line {line}: no value for {missing[0]} (columns: {columns})")
    values.setdefault("max_output", values["num_output"])
    return Arrival(**values)
