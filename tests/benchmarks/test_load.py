"""The load generator sends a plan as it stands and notes what each client saw, and it never waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.load import Record, Target, drive
from benchmarks.workload import Planned
from tests.benchmarks.fake_server import NUM_INPUT, FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as running:
        yield running


@pytest.fixture
def target(server: FakeServer) -> Target:
    return Target(server.url, "tiny", {"alice": "alice-key", "bob": "bob-key"})


def plan(*prompts: str, client: str = "alice") -> list[Planned]:
    return [Planned(client, 0.0, prompt, 5) for prompt in prompts]


async def test_a_finished_request_has_its_times_in_order_and_its_usage(target: Target) -> None:
    (record,) = (await drive(target, plan("hello"), 30, stop_after=1)).records
    assert record.error is None
    assert record.first_s is not None and record.finish_s is not None
    assert 0 <= record.submit_s <= record.first_s <= record.finish_s
    assert (record.num_input, record.num_output, record.queue_s) == (NUM_INPUT, 5, 0.25)


async def test_what_is_sent_fixes_the_length_and_asks_for_usage(target: Target, server: FakeServer) -> None:
    await drive(target, plan("hello", client="bob"), 30, stop_after=1)
    (body,) = server.bodies
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (5, True, 0)
    assert body["stream_options"] == {"include_usage": True}
    assert server.keys == ["Bearer bob-key"]


@pytest.mark.parametrize(
    ("prompt", "error"), [("refuse", "HTTP 429"), ("fail", "replica_failed"), ("break", "the stream broke off")]
)
async def test_a_failure_is_noted_not_raised(target: Target, prompt: str, error: str) -> None:
    (record,) = (await drive(target, plan(prompt), 30, stop_after=1)).records
    assert (record.error, record.finish_s) == (error, None)


async def test_nobody_listening_is_a_failure_of_the_request(free_port: int) -> None:
    nowhere = Target(f"http://127.0.0.1:{free_port}", "tiny", {"alice": "k"})
    (record,) = (await drive(nowhere, plan("hello"), 30, stop_after=1)).records
    assert record.error == "ConnectError"


async def test_what_still_runs_at_the_end_is_hung_up_on_and_is_no_failure(target: Target) -> None:
    run = await drive(target, plan("hello", "hang", "hang"), 30, stop_after=1)
    assert sorted((record.finish_s is not None, record.error) for record in run.records) == [
        (False, None),
        (False, None),
        (True, None),
    ]


async def test_without_stop_after_the_run_lasts_its_full_time(target: Target) -> None:
    run = await drive(target, plan("hello"), 0.3)
    assert run.duration_s >= 0.3


async def test_requests_after_the_end_are_not_sent(target: Target) -> None:
    late = [*plan("hello"), Planned("alice", 1e6, "late", 5)]
    assert len((await drive(target, late, 30, stop_after=1)).records) == 1


async def test_the_counter_actor_is_asked_at_the_start_and_at_the_end(target: Target) -> None:
    num_asked = 0

    async def status() -> dict[str, Any] | None:
        nonlocal num_asked
        num_asked += 1
        return {"bound": num_asked, "clients": {}}

    run = await drive(target, plan("hello"), 30, status=status, stop_after=1)
    assert run.samples[0]["bound"] == 1
    assert run.samples[-1]["bound"] == num_asked
    assert run.samples[-1]["t_s"] >= run.duration_s


async def test_an_actor_that_does_not_answer_leaves_no_samples(target: Target) -> None:
    async def silent() -> None:
        return None

    assert (await drive(target, plan("hello"), 30, status=silent, stop_after=1)).samples == []


async def test_events_come_in_the_order_in_which_they_happen(target: Target) -> None:
    events: list[str] = []

    def note(event: str, record: Record) -> None:
        events.append(event)

    await drive(target, plan("hello"), 30, on_event=note, stop_after=1)
    assert events == ["sent", "first", "ended"]


async def test_hundreds_of_requests_at_once_are_all_answered(target: Target) -> None:
    run = await drive(target, plan(*["hello"] * 300), 60, stop_after=300)
    assert [record.error for record in run.records if record.finish_s is None] == []
