"""`make chaos` in short: the counter actor, a replica and an ingress are killed under load, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable

import httpx
import pytest

from benchmarks.chaos import chaos_keys
from benchmarks.chaos_faults import KILL, Injector, Processes
from benchmarks.chaos_load import FINISHED, LOST, crowd
from benchmarks.chaos_storm import storm
from benchmarks.chaos_witness import read_witnesses, witness_folder, witnessed
from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

CLIENTS = crowd(8)
SEED = 5


@pytest.fixture
def served(serve_app: Callable[..., Served]) -> Served:
    """An application of its own, because its processes are killed; its replicas write down what they make."""
    with witnessed():
        return serve_app(
            "chaos",
            num_replicas=2,
            num_ingress_replicas=2,
            api={"keys": chaos_keys(CLIENTS)},
            dispatch={"replica_dead_s": 6.0},
        )


async def test_kills_under_load_lose_no_request_and_no_token(served: Served) -> None:
    processes = Processes(served.name, served.args.counter)
    injector = Injector(processes, random.Random(SEED))
    cards = [("actor", KILL), ("replica", KILL), ("ingress", KILL)]
    random.Random(SEED).shuffle(cards)
    outcome = await storm(
        served.url,
        "tiny",
        CLIENTS,
        injector,
        processes,
        seconds=16.0,
        calm_s=3.0,
        seed=SEED,
        cards=cards,
        pause_s=(3.5, 4.0),
    )
    assert {(fault.kind, fault.how) for fault in outcome.faults} == set(cards)
    assert outcome.counts[LOST] == 0, outcome.lost
    assert outcome.counts[FINISHED] > 20, outcome.counts
    assert outcome.tokens.is_exact, outcome.tokens
    assert min(outcome.tokens.charged) > 0
    assert len(outcome.lives) == 2, "the counter actor came back"


async def test_killed_ingresses_leave_nothing_waiting_and_nothing_charged_that_was_not_made(served: Served) -> None:
    """All of them, and their routers with them: leases lapse, what waits vanishes, charges return."""
    before, made_before = await served.quiet(), await asyncio.to_thread(num_made)
    client = next(client for client in CLIENTS if client.temper.max_waiting is None)
    body = {"model": "tiny", "prompt": "q" * 50, "max_tokens": 150, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {client.key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits) as http:
        asked = [asyncio.create_task(http.post(f"{served.url}/v1/completions", json=body)) for _ in range(60)]
        async with asyncio.timeout(120):
            while (await asyncio.to_thread(served.status))["waiting"] < 30:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        for ingress in Processes(served.name, served.args.counter).of("ingress"):
            os.kill(ingress.pid, signal.SIGKILL)
        answers = await asyncio.gather(*asked, return_exceptions=True)
    num_whole = sum(isinstance(one, httpx.Response) and one.status_code == 200 for one in answers)

    after, made = await served.quiet(), await asyncio.to_thread(num_made)
    row = after["clients"][client.name]
    was = before["clients"].get(client.name, {"num_input": 0, "num_output": 0})
    gained = row["num_input"] - was["num_input"], row["num_output"] - was["num_output"]
    assert gained == (made[0] - made_before[0], made[1] - made_before[1])
    assert row["service"] == row["num_input"] - row["num_cached"] + 2 * row["num_output"]
    num_held = 2 * (served.args.engine.max_num_seqs + served.args.dispatch.lookahead)
    assert num_whole < 30 and gained[1] <= 150 * (num_whole + 2 * num_held), "what waited was served to nobody"


def num_made() -> tuple[int, int]:
    """Input and output tokens that all replicas made."""
    each = [made.num_tokens for made in read_witnesses(witness_folder()).values()]
    return sum(num_input for num_input, _ in each), sum(num_output for _, num_output in each)
