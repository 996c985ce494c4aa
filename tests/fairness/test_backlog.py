"""Backlog: first in first out per client, by place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fairserve.fairness.backlog import Backlog


@pytest.fixture
def backlog() -> Iterator[Backlog[str]]:
    backlog: Backlog[str] = Backlog()
    yield backlog
    backlog.check()


def test_requests_of_one_client_leave_in_the_order_they_came(backlog: Backlog[str]) -> None:
    for place, request_id in enumerate(["a", "b", "c"]):
        backlog.push("ann", request_id, request_id.upper(), place)
    assert [backlog.pop("ann") for _ in range(3)] == ["A", "B", "C"]


def test_equal_places_leave_in_the_order_they_were_pushed(backlog: Backlog[str]) -> None:
    for request_id in ["b", "a"]:
        backlog.push("ann", request_id, request_id, 1.0)
    assert backlog.pop("ann") == "b"


def test_a_request_that_comes_back_takes_its_old_place(backlog: Backlog[str]) -> None:
    for place, request_id in enumerate(["a", "b"]):
        backlog.push("ann", request_id, request_id, place)
    backlog.pop("ann")
    backlog.push("ann", "a", "a again", 0)
    assert backlog.head("ann") == (0, "a again")


def test_a_request_may_be_removed_wherever_it_stands(backlog: Backlog[str]) -> None:
    for place, request_id in enumerate("abc"):
        backlog.push("ann", request_id, request_id, place)
    assert backlog.remove("b") == "b"
    assert backlog.remove("b") is None
    assert "b" not in backlog
    assert [backlog.pop("ann") for _ in range(2)] == ["a", "c"]


def test_a_removed_request_may_come_back_at_another_place(backlog: Backlog[str]) -> None:
    backlog.push("ann", "a", "first", 1.0)
    backlog.push("ann", "b", "b", 2.0)
    backlog.remove("a")
    backlog.push("ann", "a", "second", 3.0)
    assert [backlog.pop("ann") for _ in range(2)] == ["b", "second"]


def test_clients_wait_only_while_they_have_requests(backlog: Backlog[str]) -> None:
    backlog.push("ann", "a", "a", 0)
    assert (list(backlog.clients()), backlog.num_clients, backlog.num_waiting("ann")) == (["ann"], 1, 1)
    assert (backlog.client_of("a"), list(backlog)) == ("ann", ["a"])
    backlog.pop("ann")
    assert (list(backlog.clients()), backlog.num_clients, backlog.num_waiting("ann")) == ([], 0, 0)
    assert (backlog.client_of("a"), len(backlog)) == (None, 0)


def test_a_client_that_submits_and_cancels_for_ever_takes_no_more_memory(backlog: Backlog[str]) -> None:
    backlog.push("ann", "head", "head", 0)
    for i in range(5_000):
        backlog.push("ann", f"r{i}", "x", i + 1)
        backlog.remove(f"r{i}")
    assert sum(len(line.heap) for line in backlog._lines.values()) < 100
    assert backlog.head("ann") == (0, "head")


class AnyHistory(RuleBasedStateMachine):
    """Any sequence of pushes, pops and removals, against a sorted list."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog: Backlog[int] = Backlog()
        self.model: list[tuple[float, int, str]] = []
        self.num = 0

    @rule(client=st.sampled_from("ab"), place=st.integers(0, 3))
    def push(self, client: str, place: int) -> None:
        self.num += 1
        self.backlog.push(client, str(self.num), self.num, place)
        self.model.append((place, self.num, client))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pop(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted({row[2] for row in self.model})))
        first = min(row for row in self.model if row[2] == client)
        assert self.backlog.pop(client) == first[1]
        self.model.remove(first)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.model))
        assert self.backlog.remove(str(row[1])) == row[1]
        self.model.remove(row)

    @invariant()
    def agrees(self) -> None:
        self.backlog.check()
        assert len(self.backlog) == len(self.model)
        for client in self.backlog.clients():
            assert self.backlog.head(client)[1] == min(row for row in self.model if row[2] == client)[1]


TestBacklogAgainstAList = AnyHistory.TestCase
TestBacklogAgainstAList.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
