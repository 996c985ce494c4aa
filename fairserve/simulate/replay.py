"""From a live decision log back to a workload: what would another policy have done with the same requests?

The log (``counter.decision_log_path``, written by ``dispatch/decision_log.py``) says when each request came, from whom,
how long its prompt and its answer were, and when it was granted. Replayed through the simulated cluster, the same
arrivals meet another policy. Requests that came are taken as they came: callers that would have reacted to a faster
answer do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairserve.dispatch.decision_log import LOG_VERSION
from fairserve.errors import ConfigError
from fairserve.simulate.records import Arrival, RequestRecord, RunRecord


@dataclass(frozen=True, slots=True)
class Recorded:
    """``live``: what really happened, as far as the log tells (no token times). ``num_without_end``: requests that were
    granted and whose end the log does not hold; they are taken to have made all of their ``max_output``."""

    arrivals: tuple[Arrival, ...]
    live: RunRecord
    num_without_end: int


def read_decisions(path: Path) -> Recorded:
    """Read a log; several epochs in one file are one run.

    Raises:
        ConfigError: the file cannot be read, or a line is not of a decision log; names the line.
    """
    submits: dict[str, dict[str, Any]] = {}
    records: dict[str, RequestRecord] = {}
    outputs: dict[str, int] = {}
    policy = ""
    first_s: float | None = None
    for number, line in _lines(path):
        try:
            t, event = float(line["t"]), line["event"]
            if event == "began":
                if line["version"] != LOG_VERSION:
                    raise ConfigError(f"{path}: log version {line['version']}, this fairserve reads {LOG_VERSION}")
                policy = line["policy"]
            elif event in ("submit", "refuse"):
                if line["request"] not in submits:
                    first_s = t - line["waited_s"] if first_s is None else min(first_s, t - line["waited_s"])
                    submits[line["request"]] = line
            elif event == "grant":
                outputs.setdefault(line["request"], -1)
            elif event == "finish":
                outputs[line["request"]] = line["output"] if line["started"] else 0
            else:
                raise KeyError(event)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: not a decision ({type(error).__name__}: {error})") from None
    if first_s is None:
        raise ConfigError(f"{path} holds no request")
    num_without_end = 0
    for request_id, line in submits.items():
        made = outputs.get(request_id, -1)
        num_without_end += made < 0 and request_id in outputs
        records[request_id] = RequestRecord(_arrival(line, first_s, made))
    last_s = first_s
    for _, line in _lines(path):
        record = records.get(line.get("request", ""))
        if record is None:
            continue
        at_s = line["t"] - first_s
        last_s = max(last_s, line["t"])
        if line["event"] == "grant":
            record.granted_s, record.replica = at_s, line["replica"]
        elif line["event"] == "finish" and line["started"]:
            record.outcome, record.finished_s = "finished", at_s
            record.num_input, record.num_output = record.arrival.num_input, line["output"]
        elif line["event"] == "refuse" and record.granted_s is None:
            record.outcome, record.finished_s, record.reason = "refused", at_s, line["reason"]
    requests = sorted(records.values(), key=lambda record: (record.arrival.arrival_s, record.arrival.request_id))
    live = RunRecord(str(path.name), f"{policy} (live)", 0, max(last_s - first_s, 1e-3), requests=requests)
    live.num_replicas = max(1, len({record.replica for record in requests if record.replica}))
    return Recorded(tuple(record.arrival for record in requests), live, num_without_end)


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


def _arrival(line: dict[str, Any], first_s: float, made: int) -> Arrival:
    max_output = int(line["max_output"])
    return Arrival(
        line["request"],
        line["t"] - line["waited_s"] - first_s,
        line["client"],
        int(line["input"]),
        max(1, made if made >= 0 else max_output),
        max_output,
        weight=float(line["weight"]),
        application=line.get("application", ""),
        interaction=line.get("interaction", ""),
        call_index=line.get("call_index", 0),
        prefix=tuple(line.get("prefix", ())),
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open() as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(line, dict):
                    raise ConfigError(f"{path}, line {number} is no decision: expected a JSON object")
                yield number, line
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
