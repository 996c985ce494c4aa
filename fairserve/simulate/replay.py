"""From a live decision log back to a workload: what would another policy have done with the same requests?

The log (``counter.decision_log_path``, written by ``dispatch/decision_log.py``) says when each request came, from whom,
how long its prompt and its answer were, and when it was granted. Replayed through the simulated cluster, the same
arrivals meet another policy. Requests that came are taken as they came: callers that would have reacted to a faster
answer do not, and calls that were never sent because an earlier one was refused are not made up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairserve.config import DispatchConfig
from fairserve.dispatch.decision_log import LOG_VERSION
from fairserve.errors import ConfigError
from fairserve.simulate.records import PREFIX_BLOCK, Arrival, RequestRecord, RunRecord

UNTOLD = frozenset(
    {
        *("worst_gap", "bound", "gap_to_bound", "idle_share", "utilisation", "cached_share"),
        *("num_preempted", "num_recomputed", "num_lifts", "num_lapsed", "num_wasted_tokens"),
        *("ttft.p50", "ttft.p90", "ttft.p99"),
    }
)
"""Figures (``Measures.figures``) that a log cannot give: it has no token times and no steps."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """``live``: what really happened, as far as the log tells. ``num_unknown``: requests whose answer's length it does
    not tell (refused, given up while they waited, or still open at its end); they are taken to run to ``max_output``.
    """

    arrivals: tuple[Arrival, ...]
    live: RunRecord
    num_unknown: int


def read_decisions(path: Path, prefix_block_tokens: int = DispatchConfig().prefix_block_tokens) -> Recorded:
    """Read a log; several epochs in one file are one run. Requests that came before the file begins are left out.

    Args:
        prefix_block_tokens: what ``dispatch.prefix_block_tokens`` was then.

    Raises:
        ConfigError: the file cannot be read, or a line is not of a decision log; names the line.
    """
    log = _Log()
    for number, line in _lines(path):
        try:
            log.take(line)
        except (KeyError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{path}, line {number} is no decision: {what}") from None
    if not log.requests:
        raise ConfigError(f"{path} holds no request")
    first_s = min(request.arrived_s for request in log.requests.values())
    records = [request.record(first_s, prefix_block_tokens) for request in log.requests.values()]
    records.sort(key=lambda record: (record.arrival.arrival_s, record.arrival.request_id))
    live = RunRecord(
        scenario=path.name.removesuffix(".jsonl"),
        policy=f"{', '.join(log.policies) or 'unknown policy'} (live)",
        seed=0,
        duration_s=log.last_s - first_s + 1e-3,  # so that what came last is within it
        requests=records,
        num_replicas=max(1, len({record.replica for record in records} - {""})),
    )
    num_unknown = sum(request.num_output is None for request in log.requests.values())
    return Recorded(tuple(record.arrival for record in records), live, num_unknown)


def changes(live: RunRecord, other: RunRecord) -> dict[str, dict[str, float]]:
    """Per client: mean seconds from arrival to grant, recorded and simulated, over requests granted in both."""
    granted = {record.arrival.request_id: record for record in other.requests if record.granted_s is not None}
    waits: dict[str, list[tuple[float, float]]] = {}
    for record in live.requests:
        twin = granted.get(record.arrival.request_id)
        if record.granted_s is not None and twin is not None and twin.granted_s is not None:
            arrival = record.arrival
            pair = (record.granted_s - arrival.arrival_s, twin.granted_s - arrival.arrival_s)
            waits.setdefault(arrival.client, []).append(pair)
    return {
        client: {
            "num": len(pairs),
            "wait_live_s": sum(live_s for live_s, _ in pairs) / len(pairs),
            "wait_simulated_s": sum(simulated_s for _, simulated_s in pairs) / len(pairs),
        }
        for client, pairs in sorted(waits.items())
    }


# --------------------------------------------------------------------------------------------------------- the lines


@dataclass(slots=True)
class _Request:
    """What the log says of one. Times are those of the log."""

    arrival: Arrival
    """With what is known when it comes; ``record`` completes it."""
    arrived_s: float
    granted_s: float | None = None
    """Its last grant: one that lapsed did not end its waiting."""
    replica: str = ""
    ended_s: float | None = None
    num_output: int | None = None
    """Tokens that it made by its end; None: unknown."""
    has_started: bool = False
    reason: str = ""
    """Of its refusal."""

    def record(self, first_s: float, prefix_block_tokens: int) -> RequestRecord:
        one = self.arrival
        length = one.max_output if self.num_output is None else self.num_output
        arrival = Arrival(
            one.request_id,
            self.arrived_s - first_s,
            one.client,
            one.num_input,
            max(1, length),
            one.max_output,
            weight=one.weight,
            application=one.application,
            interaction=one.interaction,
            call_index=one.call_index,
            prefix=_in_blocks(one.prefix, prefix_block_tokens),
            cancel_after=0 if length == 0 else None,
        )
        made = RequestRecord(arrival, replica=self.replica, reason=self.reason)
        made.granted_s = None if self.granted_s is None else self.granted_s - first_s
        made.finished_s = None if self.ended_s is None else self.ended_s - first_s
        if self.has_started:
            made.num_input, made.num_output = one.num_input, self.num_output or 0
        if self.reason:
            made.outcome = "refused"
        elif self.ended_s is not None:
            made.outcome = "finished" if made.num_output else "cancelled"
        return made


class _Log:
    """Takes the lines in, in order. Every ``take`` may raise KeyError, TypeError or ValueError: it is no decision."""

    def __init__(self) -> None:
        self.requests: dict[str, _Request] = {}
        self.policies: dict[str, None] = {}
        self.last_s = -math.inf
        self._ahead_s = 0.0
        """By how much the authority's clock went back: another machine or another boot begins at any time."""
        self._takes: dict[str, Callable[[Mapping[str, Any], float], None]] = {
            "began": self._began,
            "submit": self._came,
            "refuse": self._refused,
            "grant": self._granted,
            "finish": self._finished,
            "cancel": self._cancelled,
            "change": self._changed,
        }

    def take(self, line: Mapping[str, Any]) -> None:
        event = _text(line, "event")
        if event not in self._takes:
            raise ValueError(f"unknown event {event!r}, known are {', '.join(self._takes)}")
        at_s = _number(line, "t") + self._ahead_s
        if event == "began" and at_s < self.last_s:
            self._ahead_s += self.last_s - at_s
            at_s = self.last_s
        self._takes[event](line, at_s)
        self.last_s = max(self.last_s, at_s)

    def _began(self, line: Mapping[str, Any], at_s: float) -> None:
        if line["version"] != LOG_VERSION:
            raise ValueError(f"it begins a log of version {line['version']}, this fairserve reads {LOG_VERSION}")
        self.policies[_text(line, "policy")] = None

    def _came(self, line: Mapping[str, Any], at_s: float) -> None:
        """The first time counts: later it comes again after an epoch, or after a replica died."""
        request_id = _text(line, "request")
        if request_id in self.requests:
            return
        arrival = Arrival(
            request_id,
            0.0,
            _text(line, "client"),
            _count(line, "input", 1),
            1,
            _count(line, "max_output", 1),
            weight=_number(line, "weight"),
            application=_text(line, "application", ""),
            interaction=_text(line, "interaction", ""),
            call_index=_count(line, "call_index", 0, 0),
            prefix=tuple(map(int, line.get("prefix", ()))),
        )
        if arrival.weight <= 0:
            raise ValueError(f"weight is {arrival.weight}, not above 0")
        self.requests[request_id] = _Request(arrival, at_s - _number(line, "waited_s"))

    def _refused(self, line: Mapping[str, Any], at_s: float) -> None:
        reason = _text(line, "reason")
        self._came(line, at_s)
        request = self.requests[_text(line, "request")]
        request.ended_s, request.reason = at_s, reason

    def _granted(self, line: Mapping[str, Any], at_s: float) -> None:
        replica = _text(line, "replica")
        request = self.requests.get(_text(line, "request"))
        if request is not None:
            request.granted_s, request.replica = at_s, replica

    def _finished(self, line: Mapping[str, Any], at_s: float) -> None:
        num_output, has_started = _count(line, "output", 0), line["started"]
        request = self.requests.get(_text(line, "request"))
        if request is not None:
            request.ended_s, request.has_started = at_s, bool(has_started)
            request.num_output = num_output if has_started else 0

    def _cancelled(self, line: Mapping[str, Any], at_s: float) -> None:
        """What one made that was granted before is unknown."""
        request = self.requests.get(_text(line, "request"))
        if request is not None:
            request.ended_s = at_s
            if request.granted_s is None:
                request.num_output = 0

    def _changed(self, line: Mapping[str, Any], at_s: float) -> None:
        """A live change is not replayed: the recorded weights are those that the requests carried."""
        _text(line, "client")


def _text(line: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = line[name] if default is None else line.get(name, default)
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not a text")
    return value


def _number(line: Mapping[str, Any], name: str) -> float:
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} is {value!r}, not a number")
    return float(value)


def _count(line: Mapping[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = line[name] if default is None else line.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, not a whole number of at least {least}")
    return value


def _in_blocks(prefix: tuple[int, ...], block_tokens: int) -> tuple[int, ...]:
    """Hashes of blocks of ``block_tokens`` as hashes of the simulation's blocks of ``PREFIX_BLOCK``."""
    num = max(1, block_tokens // PREFIX_BLOCK)
    return prefix if num == 1 else tuple(block * num + part for block in prefix for part in range(num))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered from 1. A last line without its end is still being written: it is left out."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError as error:
                    if not text.endswith("\n"):
                        return
                    raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(line, dict):
                    raise ConfigError(f"{path}, line {number} is no decision: expected a JSON object")
                yield number, line
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: it is not text ({error})") from error
