"""Load for a service that runs already, to look at its dashboard by: a greedy client and two modest ones.

    python -m benchmarks.flood [--url http://127.0.0.1:8000] [--seconds 60] [--greedy 40] [--modest 4]

Closed loop, so that it suits any machine: the greedy client always has 40 requests under way, the steady one 4, the
on-off one 4 for 15 seconds and none for the next 15. Every 5 seconds, per client: output tokens/s, requests finished
and refused, and the median time to the first token. On an open service the bearer token names the client; with keys,
give them as --key CLIENT=KEY. Ends by itself or with Ctrl-C; what is under way is hung up on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import httpx

from benchmarks.load import Record, Target, send
from benchmarks.workload import CLIENTS, GREEDY, OFF_S, ON_OFF, ON_S, burst

REPORT_S = 5.0
NUM_PLANNED = 200
"""Requests of the mix per client; then they come again."""
PAUSE_S = 1.0
"""After a request that failed."""


class Flood:
    """``greedy`` and ``modest``: requests that a client keeps under way."""

    def __init__(self, target: Target, greedy: int, modest: int) -> None:
        self._target = target
        self._num = {client: greedy if client == GREEDY else modest for client in CLIENTS}
        self._started = time.monotonic()
        self.records: list[Record] = []

    def now_s(self) -> float:
        return time.monotonic() - self._started

    async def run(self, seconds: float, say: Callable[[str], None]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=30)) as http:
            tasks = [
                asyncio.create_task(self._ask_again_and_again(http, client, i))
                for client, num in self._num.items()
                for i in range(num)
            ]
            try:
                while (left_s := seconds - self.now_s()) > 0:
                    await asyncio.sleep(min(REPORT_S, left_s))
                    say(self._line(self.now_s() - REPORT_S))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_again_and_again(self, http: httpx.AsyncClient, client: str, i: int) -> None:
        for planned in itertools.cycle(burst(client, NUM_PLANNED, seed=i)):
            if client == ON_OFF and (over_s := self.now_s() % (ON_S + OFF_S)) >= ON_S:
                await asyncio.sleep(ON_S + OFF_S - over_s)
            record = Record(client, submit_s=self.now_s())
            self.records.append(record)
            await send(http, self._target, planned, record, self.now_s, lambda *_: None)
            if record.error is not None:
                await asyncio.sleep(PAUSE_S)

    def _line(self, since_s: float) -> str:
        """What finished since then."""
        parts = []
        for client in CLIENTS:
            mine = [record for record in self.records if record.client == client]
            done = [one for one in mine if one.finish_s is not None and one.finish_s >= since_s]
            first = [one.first_s - one.submit_s for one in done if one.first_s is not None]
            tokens_per_s = sum(one.num_output for one in done) / REPORT_S
            failed = sorted({one.error for one in mine if one.error is not None})
            part = f"{client} {tokens_per_s:5.1f} tok/s, {len(done)} done"
            part += f", first token {statistics.median(first):.1f} s" if first else ""
            parts.append(part + (f", errors: {', '.join(failed)}" if failed else ""))
        return f"{self.now_s():4.0f} s  " + "  |  ".join(parts)


async def model_of(url: str, key: str) -> str:
    """The model that the service serves.

    Raises:
        httpx.HTTPError: it does not answer, or not with 200.
    """
    async with httpx.AsyncClient(timeout=10) as http:
        answer = await http.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flood", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument(
        "--greedy", type=int, default=40, help="requests the greedy client keeps under way (default 40)"
    )
    parser.add_argument("--modest", type=int, default=4, help="the same for each modest client (default 4)")
    parser.add_argument("--key", action="append", default=[], metavar="CLIENT=KEY", help="where the service has keys")
    options = parser.parse_args(argv)
    keys = dict(zip(CLIENTS, CLIENTS, strict=True))
    keys |= {client: key for client, _, key in (word.partition("=") for word in options.key)}
    if unknown := sorted(keys.keys() - set(CLIENTS)):
        print(f"flood: --key is for {', '.join(CLIENTS)}, not for {', '.join(unknown)}", file=sys.stderr)
        return 2
    url = options.url.rstrip("/")
    try:
        model = asyncio.run(model_of(url, keys[GREEDY]))
    except httpx.HTTPError as error:
        print(f"flood: {url} does not serve: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"{options.seconds:g} s of load on {model} at {url}: look at {url}/dashboard", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        flood = Flood(Target(url, model, keys), options.greedy, options.modest)
        asyncio.run(flood.run(options.seconds, lambda line: print(line, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
