"""Clients for ``make chaos``: of several tempers, patient when refused, and exact about how each request ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

HANG_S = 150.0
"""A request that has not ended by then is lost; the longest partition is 30 s."""
RECONNECT_S = 0.2

SENT, FINISHED, REFUSED, FAILED, LEFT = "sent", "finished", "refused", "failed", "left"
CUT, LOST = "connection lost with its ingress or proxy", "lost"
OUTCOMES = (FINISHED, REFUSED, FAILED, LEFT, CUT, LOST)


NO_ROUTES = "/-/routes"
"""In Serve's own 404: a proxy that has just started knows no application yet. A load balancer would not ask it."""


class DoorNotReady(Exception):
    """Nobody took the request."""


@dataclass(frozen=True, slots=True)
class Temper:
    """How a client asks. ``max_waiting``: of its key."""

    name: str
    parallel: int
    streams: float
    """Part of its requests that stream."""
    tokens: tuple[int, int]
    weight: float = 1.0
    max_waiting: int | None = None
    rests: bool = False
    leaves: bool = False
    """It hangs up in the middle, now and then."""


HUNGRY = Temper("hungry", 4, 1.0, (20, 160))
TEMPERS = (
    *[HUNGRY] * 4,
    *[Temper("hungry-double", 4, 1.0, (20, 160), weight=2.0)] * 2,
    *[Temper("flooder", 6, 0.0, (10, 60), max_waiting=2)] * 2,
    *[Temper("steady", 1, 0.5, (5, 100))] * 6,
    *[Temper("sleeper", 2, 0.7, (10, 80), rests=True)] * 4,
    *[Temper("leaver", 1, 1.0, (50, 200), leaves=True)] * 2,
)


@dataclass(frozen=True, slots=True)
class Client:
    name: str
    key: str
    temper: Temper


def crowd(num: int) -> list[Client]:
    """The first ``num`` of an endless row of clients of all tempers, thoroughly mixed."""
    order = sorted(range(len(TEMPERS)), key=lambda i: (i * 7) % len(TEMPERS))
    tempers = [TEMPERS[order[i % len(order)]] for i in range(num)]
    return [Client(f"{t.name}-{i:02}", f"chaos-secret-{i:02}", t) for i, t in enumerate(tempers)]


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are Unix seconds; ``num_streamed`` counts tokens that arrived."""

    client: str
    sent_s: float
    id: str = ""
    first_s: float | None = None
    end_s: float = 0.0
    outcome: str = ""
    detail: str = ""
    is_broken: bool = False
    """The connection ended without an answer, or with one that is Serve's own."""
    usage: tuple[int, int] | None = None
    num_streamed: int = 0


class Crowd:
    """Sends until it is told to stop, then lets what is under way end. ``was_cut``: whether an ingress or the proxy
    that was killed lately explains that this connection broke."""

    def __init__(
        self, url: str, model: str, clients: Sequence[Client], seed: int, was_cut: Callable[[Record], bool]
    ) -> None:
        self._url = url
        self._model = model
        self._clients = clients
        self._random = random.Random(seed)
        self._was_cut = was_cut
        self._stopping = False
        self.records: list[Record] = []
        self.num_unconnected = 0
        """Connections that nobody took, tried again: no request was sent."""
        self._unstarted: Counter[str] = Counter()
        """By client: requests that were sent and have not brought a byte."""

    def is_waiting(self, client: str) -> bool:
        return self._unstarted[client] > 0

    async def run(self, work: Awaitable[None]) -> None:
        """Until ``work`` ends."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(HANG_S, connect=5.0)) as http:
            tasks = [
                asyncio.create_task(self._ask(http, client, random.Random(f"{self._random.random()}")))
                for client in self._clients
                for _ in range(client.temper.parallel)
            ]
            try:
                await work
            finally:
                self._stopping = True
                done = await asyncio.gather(*tasks, return_exceptions=True)
        for error in done:
            if isinstance(error, BaseException):
                raise error

    async def _ask(self, http: httpx.AsyncClient, client: Client, rng: random.Random) -> None:
        awake_until_s = time.time() + rng.uniform(2, 8)
        await asyncio.sleep(rng.uniform(0, 1))
        while not self._stopping:
            if client.temper.rests and time.time() > awake_until_s:
                await asyncio.sleep(rng.uniform(3, 8))
                awake_until_s = time.time() + rng.uniform(3, 8)
            body = self._body(client.temper, rng)
            leave_after = rng.randrange(1, 30) if client.temper.leaves and rng.random() < 0.5 else None
            wait_s = await self._one(http, client, body, leave_after)
            await asyncio.sleep(wait_s)

    def _body(self, temper: Temper, rng: random.Random) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": "p" * rng.randrange(1, 200),
            "max_tokens": rng.randint(*temper.tokens),
            "ignore_eos": True,
            "logprobs": 0,  # so that a stream that breaks off tells how many tokens came
        }
        if rng.random() < temper.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    async def _one(
        self, http: httpx.AsyncClient, client: Client, body: dict[str, Any], leave_after: int | None
    ) -> float:
        """Seconds to wait before the next one."""
        record = Record(client.name, time.time())
        self._unstarted[client.name] += 1
        wait_s = 0.0
        try:
            async with asyncio.timeout(HANG_S):
                wait_s = await self._send(http, client, body, leave_after, record)
        except (httpx.ConnectError, httpx.ConnectTimeout, DoorNotReady):
            self.num_unconnected += 1
            return RECONNECT_S
        except (httpx.HTTPError, ValueError) as error:
            self._broke(record, repr(error))
        except TimeoutError:
            record.outcome, record.detail = LOST, f"no end after {HANG_S:g} s"
        finally:
            if record.first_s is None:
                self._unstarted[client.name] -= 1
        record.end_s = time.time()
        if record.outcome == "":
            self._broke(record, record.detail or "the stream ended without [DONE]")
        self.records.append(record)
        return wait_s

    def _broke(self, record: Record, detail: str) -> None:
        record.end_s = time.time()
        record.outcome, record.detail, record.is_broken = LOST, detail, True

    def blame_doors(self) -> None:
        """Put broken connections down to the ingress or the proxy that ended, where one did; call it at the end, when
        all deaths are known."""
        for record in self.records:
            if record.is_broken and self._was_cut(record):
                record.outcome = CUT

    async def _send(
        self,
        http: httpx.AsyncClient,
        client: Client,
        body: dict[str, Any],
        leave_after: int | None,
        record: Record,
    ) -> float:
        headers = {"Authorization": f"Bearer {client.key}"}
        async with http.stream("POST", f"{self._url}/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code == 200 and not body.get("stream"):
                self._began(record)
                whole = json.loads(await answer.aread())
                record.id, record.outcome = whole["id"], FINISHED
                self._take_usage(record, whole["usage"])
            elif answer.status_code == 200:
                await self._read(answer, leave_after, record)
            else:
                return await self._refused(answer, record)
        return 0.0

    def _began(self, record: Record) -> None:
        if record.first_s is None:
            record.first_s = time.time()
            self._unstarted[record.client] -= 1

    async def _read(self, answer: httpx.Response, leave_after: int | None, record: Record) -> None:
        num_chunks, error = 0, None
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                record.outcome = FINISHED if error is None else FAILED
                record.detail = error or ""
            elif line.startswith("data: "):
                self._began(record)
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = str(chunk["error"]["code"])
                    continue
                record.id = chunk["id"]
                if chunk.get("usage"):
                    self._take_usage(record, chunk["usage"])
                for choice in chunk["choices"]:
                    record.num_streamed += len((choice.get("logprobs") or {}).get("tokens") or ())
                num_chunks += 1
                if leave_after is not None and num_chunks >= leave_after:
                    record.outcome = LEFT
                    return

    async def _refused(self, answer: httpx.Response, record: Record) -> float:
        text = (await answer.aread()).decode(errors="replace")
        if answer.status_code == 404 and NO_ROUTES in text:
            raise DoorNotReady
        retry_after = answer.headers.get("retry-after")
        is_ours = '"error"' in text
        if answer.status_code in (429, 503) and retry_after is not None and is_ours:
            record.outcome, record.detail = REFUSED, f"{answer.status_code}"
            return float(retry_after)
        self._broke(record, f"HTTP {answer.status_code}: {text[:200]}")
        return 0.5

    def _take_usage(self, record: Record, usage: dict[str, int]) -> None:
        record.usage = usage["prompt_tokens"], usage["completion_tokens"]
