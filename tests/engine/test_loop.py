"""The engine thread: everything is delivered, in order, and it stops when told to. Nothing here sleeps."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fairserve.clock import VirtualClock
from fairserve.engine.events import StepEvents
from fairserve.engine.loop import EngineLoop
from fairserve.errors import ReplicaDied, ReplicaFailed
from tests.engine.support import Driver, drive, prompt_of, request

WAIT_S = 30.0


class Running:
    """A loop and the events it sent."""

    def __init__(self, driver: Driver, **settings: Any) -> None:
        self.driver = driver
        self.events: queue.Queue[StepEvents] = queue.Queue()
        self.thread_names: set[str] = set()
        self.loop = EngineLoop(driver.engine, self._on_step, **settings)

    def _on_step(self, events: StepEvents) -> None:
        self.thread_names.add(threading.current_thread().name)
        self.events.put(events)

    def until_finished(self, *request_ids: str) -> dict[str, Any]:
        """Outputs per request until all of them have ended."""
        tokens: dict[str, list[int]] = {}
        last: dict[str, Any] = {}
        missing = set(request_ids)
        while missing:
            for output in self.events.get(timeout=WAIT_S).outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    last[output.request_id] = (output, tokens[output.request_id])
                    missing.discard(output.request_id)
        return last


@pytest.fixture
def running(llama) -> Iterator[Running]:
    running = Running(drive(llama))
    running.loop.start()
    yield running
    assert running.loop.stop(WAIT_S)
    running.driver.engine.check()


def test_every_request_of_many_threads_is_delivered(running, llama):
    names = [f"t{t}-{i}" for t in range(4) for i in range(5)]

    def submit(thread: int) -> None:
        for i in range(5):
            running.loop.submit(request(f"t{thread}-{i}", prompt_of(4 + i, thread), ignore_eos=True))

    threads = [threading.Thread(target=submit, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    finished = running.until_finished(*names)
    for thread in threads:
        thread.join()
    alone = drive(llama)
    alone.add(*(request(name, prompt_of(4 + int(name[-1]), int(name[1])), ignore_eos=True) for name in names))
    alone.run()
    assert {name: tokens for name, (_, tokens) in finished.items()} == {name: alone.tokens(name) for name in names}
    assert running.thread_names == {"engine"}


def test_events_of_one_request_arrive_in_order(running):
    running.loop.submit(request("r", prompt_of(5), max_tokens=20, ignore_eos=True))
    counts: list[int] = []
    while not counts or counts[-1] < 20:
        counts += [output.usage.num_output for output in running.events.get(timeout=WAIT_S).outputs]
    assert counts == list(range(1, 21))


def test_an_abort_is_answered_even_when_nothing_is_left_to_run(running):
    started = threading.Event()
    release = threading.Event()
    running.loop.call(lambda: (started.set(), release.wait(WAIT_S)))
    started.wait(WAIT_S)
    running.loop.submit(request("r", prompt_of(5)))
    running.loop.abort("r")
    release.set()
    output, tokens = running.until_finished("r")["r"]
    assert (output.finish_reason, tokens) == ("abort", [])


def test_a_refused_request_comes_back_as_an_error_and_the_loop_lives_on(running):
    running.loop.submit(request("long", prompt_of(500)))
    running.loop.submit(request("fine", prompt_of(5)))
    finished = running.until_finished("long", "fine")
    assert finished["long"][0].finish_reason == "error"
    assert "500" in (finished["long"][0].error or "")
    assert finished["fine"][0].finish_reason != "error"


def test_a_tokenizer_that_fails_on_a_request_leaves_nobody_waiting(running, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ValueError("no such token")

    monkeypatch.setattr("fairserve.engine.engine.TextOutput", broken)
    running.loop.submit(request("r", prompt_of(5)))
    output, _ = running.until_finished("r")["r"]
    assert output.finish_reason == "error"
    assert running.driver.ledger.is_finished == {"r"}
    assert "could not be taken" in caplog.text


def test_a_call_runs_on_the_engine_thread_and_its_failure_harms_nobody(running, caplog):
    where: queue.Queue[str] = queue.Queue()

    def fail() -> None:
        raise ValueError("a bug in what was pushed")

    running.loop.call(fail)
    running.loop.call(lambda: where.put(threading.current_thread().name))
    assert where.get(timeout=WAIT_S) == "engine"
    assert "a call on the engine thread failed" in caplog.text


def test_an_idle_loop_says_its_state_after_each_item_and_then_waits(running):
    running.loop.call(lambda: None)
    events = running.events.get(timeout=WAIT_S)
    assert events.free_slots == 8
    assert (events.num_prefill_tokens, events.num_decode_tokens) == (0, 0)
    assert running.events.empty()


def test_stopping_fails_what_is_left_and_ends_the_thread(llama):
    running = Running(drive(llama))
    running.loop.submit(request("r", prompt_of(5), max_tokens=100, ignore_eos=True))
    running.loop.start()
    running.events.get(timeout=WAIT_S)
    assert running.loop.stop(WAIT_S)
    assert not running.loop.is_alive()
    output, _ = running.until_finished("r")["r"]
    assert (output.finish_reason, output.error) == ("error", "the engine was stopped")
    assert running.driver.ledger.is_finished == {"r"}
    assert running.driver.ledger.num_output["r"] == output.usage.num_output
    with pytest.raises(ReplicaFailed):
        running.loop.submit(request("late", prompt_of(5)))


def test_a_loop_that_never_started_stops_at_once(llama):
    assert Running(drive(llama)).loop.stop(WAIT_S)


@pytest.mark.parametrize("part", ["forward", "step"], ids=["the model", "the engine itself"])
def test_a_broken_engine_fails_everybody_and_ends_its_thread_and_takes_nobody(running, monkeypatch, part):
    def broken(*_: object) -> None:
        raise KeyError("lost")

    def break_in_company() -> None:
        engine = running.driver.engine
        monkeypatch.setattr(engine if part == "step" else engine._runner, part, broken)
        running.loop.submit(request("too late", prompt_of(5)))

    running.loop.call(break_in_company)
    running.loop.submit(request("r", prompt_of(5)))
    finished = running.until_finished("r", "too late")
    assert {output.finish_reason for output, _ in finished.values()} == {"error"}
    assert {output.error_code for output, _ in finished.values()} == {"replica_failed"}
    running.loop._thread.join(WAIT_S)
    assert not running.loop.is_alive()
    assert "KeyError" in (running.loop.ended or "")
    with pytest.raises(ReplicaFailed, match="KeyError"):
        running.loop.submit(request("later still", prompt_of(5)))


def test_a_step_without_memory_is_followed_by_another(running, monkeypatch):
    """It computed nothing, and yet there is something to do."""
    forward = running.driver.engine._runner.forward
    errors = iter([MemoryError()] * 3)

    def short(*args: Any) -> Any:
        for error in errors:
            raise error
        return forward(*args)

    monkeypatch.setattr(running.driver.engine._runner, "forward", short)
    running.loop.submit(request("r", prompt_of(50), max_tokens=3, ignore_eos=True))
    assert running.until_finished("r")["r"][0].finish_reason == "length"


def test_a_queue_that_holds_everybody_back_does_not_spin(llama):
    driver = drive(llama)
    running = Running(driver)
    held = True
    peek = driver.queue.peek
    driver.queue.peek = lambda: None if held else peek()  # type: ignore[method-assign]
    running.loop.submit(request("r", prompt_of(5)))
    running.loop.start()
    told: queue.Queue[None] = queue.Queue()
    for _ in range(20):
        running.loop.call(lambda: told.put(None))
        told.get(timeout=WAIT_S)
    assert running.events.qsize() <= 21, "one for the submit, one for each call"

    def let_go() -> None:
        nonlocal held
        held = False

    running.loop.call(let_go)
    assert running.until_finished("r")["r"][0].finish_reason != "error"
    assert running.loop.stop(WAIT_S)


def test_a_step_that_hangs_does_not_look_healthy_for_ever(llama, monkeypatch):
    driver, clock = drive(llama), VirtualClock()
    running = Running(driver, clock=clock, step_timeout_s=300.0)
    inside, release = threading.Event(), threading.Event()
    run = driver.engine._runner.run

    def hang(plan: Any) -> Any:
        inside.set()
        release.wait(WAIT_S)
        return run(plan)

    monkeypatch.setattr(driver.engine._runner, "run", hang)
    running.loop.submit(request("r", prompt_of(5), max_tokens=3, ignore_eos=True))
    running.loop.start()
    assert inside.wait(WAIT_S)
    clock.advance(300.0)
    assert running.loop.is_alive(), "it may take as long as that"
    clock.advance(1.0)
    assert not running.loop.is_alive()
    assert "301 s, 300 s are allowed" in (running.loop.ended or "")
    with pytest.raises(ReplicaDied, match="has been running for"):
        running.loop.submit(request("late", prompt_of(5)))
    release.set()
    output, _ = running.until_finished("r")["r"]
    assert output.finish_reason == "error", "it was given up already: nothing goes on behind everybody's back"
    running.loop._thread.join(WAIT_S)
    assert not running.loop.is_alive()
    assert "has been running for" in (running.loop.ended or "")


def test_an_idle_loop_is_never_stuck(llama):
    clock = VirtualClock()
    running = Running(drive(llama), clock=clock, step_timeout_s=300.0)
    running.loop.submit(request("r", prompt_of(5), max_tokens=2, ignore_eos=True))
    running.loop.start()
    running.until_finished("r")
    running.loop.call(lambda: None)  # after it the step's end is known
    running.events.get(timeout=WAIT_S)
    clock.advance(1e6)
    assert running.loop.is_alive()
    assert running.loop.stop(WAIT_S)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of threads is Linux's")
def test_the_engine_thread_is_as_nice_as_it_was_told_and_others_stay_as_they_are(llama):
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    running = Running(drive(llama), nice=1)
    running.loop.start()
    said: queue.Queue[int] = queue.Queue()
    running.loop.call(lambda: said.put(niceness()))
    assert said.get(timeout=WAIT_S) == min(before + 1, 19)
    assert niceness() == before
    assert running.loop.stop(WAIT_S)
