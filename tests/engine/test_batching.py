"""Continuous batching on plain values: no model, every decision visible."""

from __future__ import annotations

import pytest

from fairserve.engine.batching import Batcher, StepPlan
from fairserve.engine.kv_blocks import KVBlocks
from tests.engine.support import FifoQueue, Ledger, prompt_of, request


class Bench:
    """A batcher whose sampled tokens are all 9."""

    def __init__(self, num_blocks: int = 16, counters: dict[str, float] | None = None, **limits: int) -> None:
        self.kv = KVBlocks(num_blocks, 4, num_lanes=4)
        self.queue = FifoQueue(counters)
        self.ledger = Ledger()
        merged = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 40, **limits}
        self.batcher = Batcher(self.kv, self.queue, self.ledger, **merged)

    def add(self, *requests) -> None:
        for r in requests:
            self.ledger.received(r)
            self.queue.push(r)

    def step(self) -> StepPlan:
        plan = self.batcher.plan()
        self.batcher.commit(plan, {c.request_id: 9 for c in plan if c.samples})
        self.batcher.check()
        return plan


def shape(plan: StepPlan) -> tuple[dict[str, int], dict[str, int]]:
    return (
        {c.request_id: len(c.token_ids) for c in plan.decodes},
        {c.request_id: len(c.token_ids) for c in plan.prefills},
    )


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end():
    bench = Bench()
    bench.add(request("r", prompt_of(35)))
    plans = [bench.step() for _ in range(3)]
    assert [[len(c.token_ids) for c in p.prefills] for p in plans] == [[16], [16], [3]]
    assert [[c.samples for c in p.prefills] for p in plans] == [[False], [False], [True]]
    assert sum((p.prefills[0].token_ids for p in plans), ()) == prompt_of(35)


def test_decodes_go_first_and_prompts_share_the_rest_of_the_budget():
    bench = Bench(num_blocks=32)
    bench.add(request("a", prompt_of(3)), request("b", prompt_of(3)))
    bench.step()
    bench.add(request("c", prompt_of(12)), request("d", prompt_of(12)))
    assert shape(bench.step()) == ({"a": 1, "b": 1}, {"c": 12, "d": 2})


def test_no_decode_starves_when_slots_outnumber_the_budget():
    bench = Bench(max_num_batched_tokens=1)
    bench.add(*(request(f"r{i}", prompt_of(1)) for i in range(4)))
    bench.step()
    assert set(shape(bench.step())[0]) == {"r0", "r1", "r2", "r3"}


def test_admission_stops_at_the_first_that_does_not_fit():
    bench = Bench(num_blocks=10)
    bench.add(request("a", prompt_of(20)), request("big", prompt_of(30)), request("small", prompt_of(2)))
    bench.step()
    bench.step()
    assert set(bench.batcher.running) == {"a"}
    bench.batcher.finish("a")
    bench.step()
    assert "big" in bench.batcher.running


def test_no_more_requests_run_than_there_are_slots():
    bench = Bench(num_blocks=64)
    bench.add(*(request(f"r{i}", prompt_of(2)) for i in range(6)))
    bench.step()
    assert len(bench.batcher.running) == 4
    bench.batcher.finish("r0")
    bench.step()
    assert set(bench.batcher.running) == {"r1", "r2", "r3", "r4"}


def test_the_youngest_request_of_the_most_served_client_is_preempted():
    bench = Bench(num_blocks=12, counters={"greedy": 9.0, "modest": 1.0}, max_num_batched_tokens=64)
    bench.add(
        request("g1", prompt_of(11), client="greedy"),
        request("m1", prompt_of(11), client="modest"),
        request("g2", prompt_of(11, 1), client="greedy"),
        request("m2", prompt_of(11), client="modest"),
    )
    while not (plan := bench.step()).num_preempted:
        pass
    assert "g2" not in bench.batcher.running
    assert set(bench.batcher.running) == {"g1", "m1", "m2"}
    assert [r.request_id for r in bench.queue.requests] == ["g2"]
    assert "g2" not in {c.request_id for c in plan}


def test_a_preempted_request_recomputes_prompt_and_output_and_is_charged_once():
    bench = Bench(num_blocks=12, counters={"b": 1.0}, max_num_batched_tokens=64)
    bench.add(request("a", prompt_of(20), max_tokens=20), request("b", prompt_of(20, 5), client="b", max_tokens=20))
    while not bench.step().num_preempted:
        pass
    output = list(bench.batcher.preempted["b"].output)
    assert len(output) == 5
    bench.batcher.finish("a")
    plan = bench.step()
    assert shape(plan) == ({}, {"b": 25})
    assert plan.prefills[0].token_ids == (*prompt_of(20, 5), *output)
    assert bench.batcher.running["b"].output == [*output, 9]
    assert bench.ledger.num_input["b"] == 20
    assert bench.ledger.num_output["b"] == 6


def test_blocks_taken_from_a_victim_go_to_no_newcomer_in_the_same_step():
    bench = Bench(num_blocks=12, counters={"b": 1.0}, max_num_seqs=2)
    bench.add(request("a", prompt_of(20), max_tokens=20), request("b", prompt_of(20), client="b", max_tokens=20))
    bench.add(request("small", prompt_of(2)))
    bench.queue.push_front = bench.queue.push  # the newcomer stands before the victim
    while not (plan := bench.step()).num_preempted:
        pass
    assert {c.request_id for c in plan} == {"a"}
    assert {c.request_id for c in bench.step()} == {"a", "small"}


def test_an_abort_in_the_middle_of_a_prompt_refunds_what_was_not_computed():
    bench = Bench()
    bench.add(request("r", prompt_of(35)))
    bench.step()
    sequence = bench.batcher.finish("r")
    assert sequence.usage.num_input == 16
    assert bench.ledger.num_input["r"] == 16
    assert bench.kv.num_free == 16


def test_an_abort_while_a_preempted_prompt_is_recomputed_refunds_nothing():
    bench = Bench(num_blocks=12, counters={"b": 1.0})
    bench.add(request("a", prompt_of(20), max_tokens=20), request("b", prompt_of(20), client="b", max_tokens=20))
    while not bench.step().num_preempted:
        pass
    bench.batcher.finish("a")
    bench.step()
    assert bench.batcher.running["b"].num_computed == 16
    bench.batcher.finish("b")
    assert bench.ledger.num_input["b"] == 20


def test_a_request_that_never_started_leaves_without_a_charge():
    bench = Bench()
    bench.add(request("r", prompt_of(5)))
    assert bench.batcher.finish("r") is None
    assert bench.ledger.is_finished == {"r"}
    assert bench.ledger.num_input["r"] == 0
    assert not bench.batcher.plan()


def test_a_request_that_left_between_plan_and_commit_is_passed_over():
    bench = Bench()
    bench.add(request("a", prompt_of(3)), request("b", prompt_of(3)))
    plan = bench.batcher.plan()
    bench.batcher.finish("a")
    grown = bench.batcher.commit(plan, {"a": 9, "b": 9})
    assert [s.request.request_id for s in grown] == ["b"]
    bench.batcher.check()


@pytest.mark.parametrize("num_blocks", [10, 11, 13, 20])
def test_every_request_ends_however_small_the_cache(num_blocks):
    bench = Bench(num_blocks=num_blocks, counters={"a": 3.0, "b": 2.0, "c": 1.0}, max_num_seqs=4)
    requests = [request(f"r{i}", prompt_of(1 + 7 * i % 30), client="abc"[i % 3], max_tokens=10) for i in range(12)]
    bench.add(*requests)
    for _ in range(600):
        bench.step()
        for request_id, sequence in list(bench.batcher.running.items()):
            if sequence.num_tokens >= bench.batcher.max_tokens(sequence.request) or len(sequence.output) == 10:
                bench.batcher.finish(request_id)
    assert bench.ledger.is_finished == {r.request_id for r in requests}
    assert {i: bench.ledger.num_input[i] for i in bench.ledger.num_input} == {
        r.request_id: r.num_input for r in requests
    }
    assert bench.kv.num_free == num_blocks
