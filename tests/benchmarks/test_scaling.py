"""The figures of scaling, from answers that were written down here; and the replica without a model."""

from __future__ import annotations

import threading
from typing import Any

from benchmarks.scaling import row, table
from benchmarks.stub_engine import StubLoop
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.events import StepEvents
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.catalog import make_policy
from fairserve.fairness.cost import WeightedTokens


def answer(at_s: float, ann: int, bob: int, gap: float = 100.0) -> dict[str, Any]:
    clients = {name: {"num_output": num, "service": 2.0 * num} for name, num in (("ann", ann), ("bob", bob))}
    return {"at_s": at_s, "clients": clients, "worst_gap": gap, "bound": 500.0}


def test_tokens_are_counted_between_the_first_and_the_last_answer_and_for_each_stretch() -> None:
    made = row("paced", 2, [answer(10.0, 100, 50), answer(12.0, 500, 150), answer(14.0, 900, 250, gap=120.0)], 0.5)
    assert made.tokens_per_s == 250.0 and made.stretches == [250.0, 250.0]
    assert made.possible == 480.0 and made.ratio == 4.0 and (made.worst_gap, made.bound) == (120.0, 500.0)
    alone = row("paced", 1, [answer(0.0, 0, 0), answer(2.0, 200, 50)], 0.5)
    assert table([alone, made]).splitlines()[2].split() == [
        "paced", "2", "250.0", "(250.0-250.0)", "2.00", "52.1%", "120", "500", "4.00"
    ]  # fmt: skip
    assert row("cpu", 1, [answer(0.0, 0, 0), answer(2.0, 200, 50)], 0.5).possible is None


def test_a_stub_runs_as_many_requests_as_it_has_slots_and_what_waits_can_be_taken_back() -> None:
    seen: list[StepEvents] = []
    is_over = threading.Event()

    def on_step(events: StepEvents) -> None:
        seen.append(events)
        if events.num_running == events.num_waiting == 0:
            is_over.set()

    book: LocalBook[GenerateRequest] = LocalBook(make_policy("vtc"), WeightedTokens())
    loop = StubLoop(book, on_step, slots=2)
    for i in range(4):
        loop.submit(GenerateRequest(f"r{i}", "ann", (5,) * 3, SamplingParams(max_tokens=2)))
    loop.call(lambda: loop._fill())
    loop.abort("r3")
    loop.abort("unknown")
    loop.start()
    assert is_over.wait(30) and loop.stop(30)
    assert (seen[0].num_running, seen[0].num_waiting, seen[0].free_slots) == (2, 1, -1)
    ended = {output.request_id: output for one in seen for output in one.outputs if output.finish_reason}
    assert {name: output.finish_reason for name, output in ended.items()} == {
        "r0": "length", "r1": "length", "r2": "length", "r3": "abort"
    }  # fmt: skip
    assert ended["r3"].usage.num_input == 0
    totals = book.take_events().totals["ann"]
    assert (totals.num_input, totals.num_output) == (9, 6)
