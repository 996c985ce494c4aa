"""Faults for ``make chaos``: which processes there are, and what is done to them. Found by pid through Ray's tables."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from benchmarks.chaos_load import Record
from benchmarks.chaos_net import Cable
from fairserve.config import CounterConfig

KILL, STOP, SLOW, RAY_KILL, CUT = "SIGKILL", "SIGSTOP", "slow", "ray.kill", "cut off"
CUT_S = 15.0
"""How long after the death of an ingress or the proxy a broken connection is put down to it."""
DOOR_S = 1.0
"""How exactly the moment of such a death is known."""
PARTITION_S = 30.0

DECK = (
    ("actor", KILL),
    ("actor", RAY_KILL),
    ("actor", STOP),
    ("actor", SLOW),
    ("replica", KILL),
    ("replica", KILL),
    ("replica", STOP),
    ("ingress", KILL),
    ("ingress", STOP),
    ("controller", KILL),
    ("proxy", KILL),
    ("replica", CUT),
)
"""Every fault there is; a run goes through shuffled decks, so that none is left out by chance."""
PAUSE_S = {"actor": (9.0, 10.0), "replica": (4.0, 9.0), "ingress": (2.0, 6.0)}
"""How long each kind is stopped."""


@dataclass(frozen=True, slots=True)
class Process:
    """One actor's process. ``address`` of its node."""

    name: str
    pid: int
    address: str


@dataclass(slots=True)
class Fault:
    """``at_s`` when it was injected, ``over_s`` when it was taken back (at once for a kill), both Unix seconds."""

    kind: str
    how: str
    victim: str
    at_s: float
    over_s: float = 0.0
    degraded_s: float | None = None
    """Actor only: until a replica had a first request without a grant."""
    back_s: float | None = None
    """Actor only: until its status was there again. Proxy only: until a request sent after it brought a byte."""
    merged_s: float | None = None
    """Replica stopped or cut off only: from the end of it to its next report; None when it did not live to send one."""
    num_alone: int = 0
    """Replica cut off only: output tokens that it made meanwhile."""
    fair_s: float | None = None
    """Until the service gap was (known to be) below the bound of the time before any fault again, and stayed there."""
    is_censored: bool = False
    """The next fault, or the end, came before that: it is at least so much."""


class Processes:
    """Of one application on this Ray."""

    def __init__(self, app: str, counter: CounterConfig) -> None:
        self._prefixes = {
            "actor": counter.name,
            "replica": f"SERVE_REPLICA::{app}#Model#",
            "ingress": f"SERVE_REPLICA::{app}#Ingress#",
            "controller": "SERVE_CONTROLLER_ACTOR",
            "proxy": "SERVE_PROXY_ACTOR",
        }
        self._counter = counter

    def of(self, kind: str) -> list[Process]:
        """Those alive, by name."""
        from ray._private.state import actors

        found = [
            Process(one["Name"], one["Pid"], one["Address"]["IPAddress"])
            for one in actors().values()
            if one["State"] == "ALIVE" and one["Name"].startswith(self._prefixes[kind])
        ]
        return sorted(found, key=lambda process: process.name)

    def counter_actor(self) -> Any:
        return ray.get_actor(self._counter.name, namespace=self._counter.namespace)


class Injector:
    """Does what the deck says, and remembers it."""

    def __init__(
        self, processes: Processes, rng: random.Random, cable: tuple[Cable, str] | None = None, only: str = ""
    ) -> None:
        cards = [card for card in DECK if card[1] != CUT or cable is not None]
        self._cards = [card for card in cards if not only or set(card) & set(only.split(","))]
        self._processes = processes
        self._rng = rng
        self._cable = cable
        self.faults: list[Fault] = []
        self.door_deaths_s: list[float] = []
        """Unix times."""

    def deck(self) -> Iterator[tuple[str, str]]:
        """Without an end."""
        while True:
            cards = list(self._cards)
            self._rng.shuffle(cards)
            yield from cards

    async def inject(self, kind: str, how: str) -> Fault | None:
        """Returns when it is over; None when there was nobody to do it to, or one who must not be the last."""
        victim = await asyncio.to_thread(self._victim, kind, how)
        if victim is None:
            return None
        fault = Fault(kind, how, victim.name, time.time())
        self.faults.append(fault)
        await self._do(fault, victim)
        fault.over_s = time.time()
        return fault

    async def watch_doors(self) -> None:
        """Notes when a process of an ingress or a proxy ends: by the storm, or by Serve's hand after it."""
        known: set[int] = set()
        while True:
            doors = [*await asyncio.to_thread(self._processes.of, "ingress"), *self._processes.of("proxy")]
            known |= {process.pid for process in doors}
            for _ in range(5):
                ended = {pid for pid in known if not _is_running(pid)}
                self.door_deaths_s += [time.time()] * len(ended)
                known -= ended
                await asyncio.sleep(0.1)

    def was_cut(self, record: Record) -> bool:
        """The connection broke soon after an ingress or a proxy ended that may have carried it."""
        return any(
            record.sent_s - DOOR_S <= at_s <= record.end_s + DOOR_S and record.end_s <= at_s + CUT_S
            for at_s in self.door_deaths_s
        )

    def _victim(self, kind: str, how: str) -> Process | None:
        there = self._processes.of(kind)
        if how == CUT:
            assert self._cable is not None
            far = [process for process in there if process.address == self._cable[1]]
            return far[0] if far and len(far) < len(there) else None
        if kind in ("replica", "ingress") and len(there) < 2:
            return None
        if kind == "proxy" and self._cable is not None:  # nobody comes in through the far one
            there = [process for process in there if process.address != self._cable[1]]
        return self._rng.choice(there) if there else None

    async def _do(self, fault: Fault, victim: Process) -> None:
        if fault.how == KILL:
            os.kill(victim.pid, signal.SIGKILL)
        elif fault.how == RAY_KILL:
            await asyncio.to_thread(lambda: ray.kill(self._processes.counter_actor(), no_restart=False))
        elif fault.how == STOP:
            await _stopped(victim.pid, self._rng.uniform(*PAUSE_S[fault.kind]))
        elif fault.how == SLOW:
            for _ in range(8):
                await _stopped(victim.pid, 0.9)
                await asyncio.sleep(0.1)
        elif fault.how == CUT:
            assert self._cable is not None
            self._cable[0].pull()
            try:
                await asyncio.sleep(PARTITION_S)
            finally:
                self._cable[0].plug()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def _stopped(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
