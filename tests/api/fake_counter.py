"""A counter actor to look at: the methods for people, with plausible data that moves with the clock handed in.

Plain asyncio, no Ray. A fluid model: clients that wait share the cluster's service by weight, the others get what they
ask for; the dicts have the shapes of :mod:`fairserve.views`. ``calls`` counts the calls of each method; ``failure`` is
raised by every method while it is set; while ``gate`` is set to an event that has not come, calls hang.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fairserve.errors import InvalidRequest, UnknownClient, UnknownKey

Dict = dict[str, Any]
CAPACITY = 2400.0
"""Service of the whole cluster in a second."""
NAMES = ("greedy", "modest", "acme/research/ann", "acme/research/bob", "acme/sales/eve", "zoe", "batch-jobs", "idle")
LIVE_FIELDS = ("weight", "is_paused", "max_waiting", "requests_per_min", "budgets")
SETTINGS: Dict = {
    "fairness.policy": "vtc",
    "fairness.quantum": 500.0,
    "fairness.rpm_limit": 60,
    "fairness.prediction": "moving_mean",
    "dispatch.lookahead": 1,
    "dispatch.max_waiting": 10_000,
    "dispatch.max_waiting_per_client": 2_000,
}


@dataclass
class Row:
    """One client. ``bends`` are the moments at which its rate changed: time, service by then, service/s from then."""

    name: str
    weight: float
    waits: bool
    demand: float
    live: Dict = field(default_factory=dict)
    bends: list[tuple[float, float, float]] = field(default_factory=list)

    def live_weight(self) -> float:
        return float(self.live.get("weight") or self.weight)

    def is_backlogged(self) -> bool:
        return self.waits and not self.live.get("is_paused")

    def service(self, time_s: float) -> float:
        past = [bend for bend in self.bends if bend[0] <= time_s]
        if not past:
            return 0.0
        since_s, base, rate = past[-1]
        return base + rate * (time_s - since_s)


class FakeCounter:
    """``num_clients`` clients: the first is greedy, every second one of the others waits too, the last is idle."""

    def __init__(
        self, num_clients: int = 8, *, unix_s: Callable[[], float] = time.time, uptime_s: float = 900.0
    ) -> None:
        self._unix_s = unix_s
        self._started_s = unix_s() - uptime_s
        self._live_settings: Dict = {}
        self._keys: list[Dict] = []
        self._version = 1
        self._audit: list[Dict] = []
        self._changes: list[Dict] = []
        self.calls: Counter[str] = Counter()
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.rows = {name: self._row(i, name, num_clients) for i, name in enumerate(_names(num_clients))}
        self._bend(self._started_s)

    # -- reads --------------------------------------------------------------------------------------------------------

    async def models(self) -> list[Dict]:
        await self._called("models")
        return [{"name": "fake", "slot": "", "price": 1.0}]

    async def overview(self, top: int = 50, search: str | None = None) -> Dict:
        await self._called("overview")
        now_s = self._unix_s()
        views = self._views(search)
        views.sort(key=lambda view: (-view["service_per_s"], -view["waiting"], view["name"]))
        rest = views[top:]
        return {
            "time_s": now_s,
            "built_in_s": 0.0004,
            "epoch": 1_763_700_000_000_000_000,
            "started_s": self._started_s,
            "policy": self._setting("fairness.policy"),
            "prediction": self._setting("fairness.prediction"),
            "model": "tiny",
            "is_overloaded": math.sin(now_s / 45) > 0.6,
            "verdict": self._verdict(),
            "waiting": sum(view["waiting"] for view in self._views()),
            "running": sum(view["running"] for view in self._views()),
            "routers": [{"name": f"router-{i}", "requests": 6 + i, "call_age_s": 0.2 * (i + 1)} for i in range(2)],
            "replicas": self._replicas(),
            "tokens_per_s": CAPACITY / 1.7,
            "service_per_s": CAPACITY,
            "num_clients": len(self.rows),
            "num_granted": int(3 * (now_s - self._started_s)),
            "num_refused": 7,
            "num_throttled": 3,
            "num_lifts": int((now_s - self._started_s) / 40),
            "num_preempted": 2,
            "num_lapsed": 1,
            "clients": views[:top],
            "others": _summed(rest) if rest else None,
            "events": self._events()[::-1][:50],
        }

    async def clients(
        self, offset: int = 0, limit: int = 100, order: str = "service", search: str | None = None
    ) -> Dict:
        await self._called("clients")
        views = sorted(self._views(search), key=lambda view: view["name"])
        if order != "name":
            views.sort(key=lambda view: -view[order])
        return {"total": len(views), "offset": offset, "clients": views[offset : offset + limit]}

    async def client(self, name: str) -> Dict:
        await self._called("client")
        return self._view(self._known(name))

    async def history(self, clients: list[str], since_s: float = 0, resolution_s: int = 1) -> Dict:
        await self._called("history")
        now_s = self._unix_s()
        reach_s = 3600 if resolution_s == 1 else 7 * 86400
        first = math.ceil(max(since_s, self._started_s, now_s - reach_s) / resolution_s)
        times = [float(i * resolution_s) for i in range(first, int(now_s / resolution_s) + 1)]
        return {
            "resolution_s": resolution_s,
            "times_s": times,
            "clients": {name: self._series(self.rows[name], times) for name in clients if name in self.rows},
        }

    async def usage(self, first_day: int, last_day: int) -> Dict:
        """Each client's same row on each day, two days at a time."""
        await self._called("usage")
        days = list(range(first_day, min(last_day, first_day + 2) + 1))
        rows = [(day, name, 3, 100, 40, 50, 200.0, "fake") for day in days[:2] for name in sorted(self.rows)]
        return {"rows": rows, "next_day": days[2] if len(days) > 2 else None}

    async def usage_by_hour(self, first_hour: int, last_hour: int) -> Dict:
        """Each client's same row in each hour, ten hours at a time."""
        await self._called("usage_by_hour")
        hours = list(range(first_hour, min(last_hour, first_hour + 10) + 1))
        rows = [(hour, name, 3, 100, 40, 50, 200.0, "fake") for hour in hours[:10] for name in sorted(self.rows)]
        return {"rows": rows, "next_hour": hours[10] if len(hours) > 10 else None}

    async def events(self, after_seq: int = 0, limit: int = 200) -> list[Dict]:
        await self._called("events")
        return [event for event in self._events() if event["seq"] > after_seq][:limit]

    async def audit(self, before_seq: int | None = None, limit: int = 200) -> list[Dict]:
        await self._called("audit")
        past = [entry for entry in self._audit if before_seq is None or entry["seq"] < before_seq]
        return past[::-1][:limit]

    async def keys(self) -> list[Dict]:
        await self._called("keys")
        return [_key_view(entry) for entry in self._keys]

    async def settings(self) -> list[Dict]:
        await self._called("settings")
        return [self._setting_view(path) for path in SETTINGS]

    async def key_directory(self, version: int) -> Dict | None:
        await self._called("key_directory")
        if version == self._version:
            return None
        entries = [{name: value for name, value in key.items() if name != "created_s"} for key in self._keys]
        return {"version": self._version, "keys": entries}

    async def ping(self) -> int:
        return 1_763_700_000_000_000_000

    # -- writes -------------------------------------------------------------------------------------------------------

    async def set_client(self, name: str, change: Dict, who: str) -> Dict:
        await self._called("set_client")
        if name not in self.rows:
            self.rows[name] = Row(name, 1.0, waits=False, demand=0.0)
        row = self.rows[name]
        before = {key: row.live.get(key) for key in change}
        row.live = {key: value for key, value in (row.live | change).items() if value not in (None, False)}
        self._bend(self._unix_s())
        self._note(who, "client", name, before, change)
        return self._view(row)

    async def set_settings(self, change: Dict, who: str) -> list[Dict]:
        await self._called("set_settings")
        for path in change:
            if path not in SETTINGS:
                raise InvalidRequest(f"{path!r} cannot be changed live; these can: {', '.join(SETTINGS)}", param=path)
        before = {path: self._setting(path) for path in change}
        live = self._live_settings | change
        self._live_settings = {path: value for path, value in live.items() if value is not None}
        self._note(who, "settings", ", ".join(change), before, change)
        return [self._setting_view(path) for path in change]

    async def add_key(self, entry: Dict, who: str) -> Dict:
        await self._called("add_key")
        assert not entry.get("key"), "the actor sees digests only"
        self._keys.append(entry | {"created_s": self._unix_s()})
        self._version += 1
        view = _key_view(self._keys[-1])
        self._note(who, "key.create", view["id"], {}, {"client": entry["client"], "weight": entry.get("weight", 1.0)})
        return view

    async def revoke_key(self, id: str, who: str) -> Dict:  # noqa: A002 (the contract's word)
        await self._called("revoke_key")
        found = [key for key in self._keys if key["key_sha256"].startswith(id)]
        if not found:
            raise UnknownKey(id)
        if len(found) > 1:
            raise InvalidRequest(f"the id {id!r} fits {len(found)} keys: give more digits", param="id")
        self._keys.remove(found[0])
        self._version += 1
        view = _key_view(found[0])
        self._note(who, "key.revoke", view["id"], {"client": view["client"]}, {})
        return view

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _called(self, method: str) -> None:
        self.calls[method] += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    def _row(self, i: int, name: str, num_clients: int) -> Row:
        is_idle = i == num_clients - 1 and i > 0
        waits = not is_idle and i % 2 == 0
        return Row(name, float((1, 2, 1, 4)[i % 4]), waits, 0.0 if is_idle else 1.0 + i % 5)

    def _bend(self, time_s: float) -> None:
        """Rates anew, from now on: those that wait share by weight what the others leave."""
        waiting = [row for row in self.rows.values() if row.is_backlogged()]
        asked = sum(row.demand for row in self.rows.values() if not row.waits)
        scale = min(1.0, 0.3 * CAPACITY / asked) if asked else 0.0
        left = CAPACITY - asked * scale
        weights = sum(row.live_weight() for row in waiting) or 1.0
        for row in self.rows.values():
            rate = 0.0 if row.live.get("is_paused") else row.demand * scale
            if row.is_backlogged():
                rate = left * row.live_weight() / weights
            row.bends.append((time_s, row.service(time_s), rate))

    def _known(self, name: str) -> Row:
        if name not in self.rows:
            raise UnknownClient(name)
        return self.rows[name]

    def _views(self, search: str | None = None) -> list[Dict]:
        return [self._view(row) for row in self.rows.values() if not search or search in row.name]

    def _view(self, row: Row) -> Dict:
        now_s = self._unix_s()
        service = row.service(now_s)
        waits = row.waits or bool(row.live.get("is_paused"))
        beat = math.sin(now_s / 7 + len(row.name))
        num_waiting = int((120 if row.name == "greedy" else 9) * (1 + 0.3 * beat)) if waits else 0
        return {
            "name": row.name,
            "weight": row.live_weight(),
            "is_paused": bool(row.live.get("is_paused")),
            "max_waiting": row.live.get("max_waiting"),
            "requests_per_min": row.live.get("requests_per_min"),
            "counter": service / row.live_weight(),
            "lead": 40.0 * (1 + beat) if row.demand else 0.0,
            "waiting": num_waiting,
            "running": 2 if row.bends[-1][2] else 0,
            "oldest_wait_s": num_waiting / 4 if waits else 0.0,
            "mean_wait_s": num_waiting / 8 if waits else 0.05,
            "service": service,
            "service_per_s": row.bends[-1][2] * (1 + 0.05 * beat),
            "num_input": int(service / 3),
            "num_cached": 0,
            "num_output": int(service / 3),
            "num_refused": 4 if row.name == "greedy" else 0,
            "last_active_s": now_s if row.demand else None,
            "budgets": [
                {"of": row.name, "window": window, "used": 5, "promised": 1, "resets_s": now_s + 60} | one
                for window, one in (row.live.get("budgets") or {}).items()
            ],
        }

    def _verdict(self) -> Dict:
        now_s = self._unix_s()
        gap, bound = 310.0 + 120.0 * math.sin(now_s / 5), 4096.0
        waiting = [row.name for row in self.rows.values() if row.is_backlogged()]
        return {
            "is_fair": True,
            "text": f"fair: the widest gap is {gap:.0f}, the bound {bound:.0f}",
            "gap": gap,
            "gap_pair": (waiting[0], waiting[-1]) if len(waiting) > 1 else None,
            "worst_gap": 870.0,
            "bound": bound,
            "jain": 0.99 + 0.008 * math.sin(now_s / 11),
            "num_backlogged": len(waiting),
        }

    def _replicas(self) -> list[Dict]:
        now_s = self._unix_s()
        rows: list[Dict] = []
        for i, state in enumerate(("live", "live", "stale")):
            free = int(1024 * (1 + 0.8 * math.sin(now_s / 9 + i)))
            rows.append(
                {
                    "name": f"fairserve#Model#replica{i}",
                    "state": state,
                    "report_age_s": 6.5 if state == "stale" else 0.1 + 0.1 * i,
                    "running": 4 - i,
                    "waiting": i,
                    "max_slots": 4,
                    "free_kv_tokens": free,
                    "kv_capacity_tokens": 2048,
                    "granted_unconfirmed": 1 - i % 2,
                    "tokens_per_s": 0.0 if state == "stale" else CAPACITY / 3.4,
                }
            )
        return rows

    def _series(self, row: Row, times: list[float]) -> Dict:
        beats = [math.sin(at / 7 + len(row.name)) for at in times]
        level = 120 if row.name == "greedy" else 9
        return {
            "service": [row.service(at) for at in times],
            "waiting": [float(int(level * (1 + 0.3 * beat))) if row.waits else 0.0 for beat in beats],
            "lead": [40.0 * (1 + beat) if row.demand else None for beat in beats],
        }

    def _events(self) -> list[Dict]:
        """Oldest first: one lift in 40 s, a throttle in 90 s, and what was changed."""
        now_s = self._unix_s()
        told: list[Dict] = [_event(self._started_s, "started", "the counter actor began, counters are level")]
        told += [
            _event(self._started_s + 1 + i, "joined", f"replica{i} joined", replica=f"fairserve#Model#replica{i}")
            for i in range(3)
        ]
        first = max(1, int((now_s - self._started_s) / 40) - 150)
        for i in range(first, int((now_s - self._started_s) / 40) + 1):
            at = self._started_s + 40.0 * i
            told.append(_event(at, "lifted", "zoe came back and was raised to the level", client="zoe"))
            if i % 3 == 0:
                told.append(_event(at + 5, "throttled", "greedy began an interaction too many", client="greedy"))
        told += self._changes
        told.sort(key=lambda event: event["time_s"])
        told = [event for event in told if event["time_s"] <= now_s]
        return [event | {"seq": seq} for seq, event in enumerate(told, start=1)]

    def _note(self, who: str, action: str, target: str, before: Dict, after: Dict) -> None:
        now_s = self._unix_s()
        entry = {"seq": len(self._audit) + 1, "time_s": now_s, "who": who, "action": action, "target": target}
        self._audit.append(entry | {"before": before, "after": after})
        self._changes.append(_event(now_s, "changed", f"{who} changed {target}"))

    def _setting(self, path: str) -> Any:
        return self._live_settings.get(path, SETTINGS[path])

    def _setting_view(self, path: str) -> Dict:
        return {
            "path": path,
            "value": self._setting(path),
            "deployed": SETTINGS[path],
            "is_live": path in self._live_settings,
        }


class FakeTransport:
    """Stands in for Ray between a CounterQuery and a FakeCounter."""

    def __init__(self, counter: FakeCounter) -> None:
        self._counter = counter

    async def call(self, method: str, **arguments: Any) -> Any:
        return await getattr(self._counter, method)(**arguments)


def _names(num_clients: int) -> list[str]:
    return [NAMES[i] if i < len(NAMES) else f"client-{i:04d}" for i in range(num_clients)]


def _event(time_s: float, kind: str, text: str, *, client: str | None = None, replica: str | None = None) -> Dict:
    return {"time_s": time_s, "kind": kind, "text": text, "client": client, "replica": replica, "count": 1}


def _key_view(entry: Dict) -> Dict:
    return {
        "id": entry["key_sha256"][:12],
        "client": entry["client"],
        "weight": entry.get("weight", 1.0),
        "max_waiting": entry.get("max_waiting"),
        "applications": list(entry.get("applications", ())),
        "source": "live",
        "created_s": entry["created_s"],
    }


def _summed(views: list[Dict]) -> Dict:
    most = ("oldest_wait_s", "mean_wait_s", "lead", "counter")
    plain = {"name": "other", "is_paused": False, "max_waiting": None, "requests_per_min": None, "last_active_s": None}
    plain["budgets"] = []
    summed = {name: sum(view[name] for view in views) for name in views[0].keys() - plain.keys()}
    return summed | {name: max(view[name] for view in views) for name in most} | plain
