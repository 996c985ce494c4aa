"""The audit of a storm: what it accepts, and what it must not let pass."""

from __future__ import annotations

from benchmarks.chaos_audit import Audit, audit
from benchmarks.chaos_load import FINISHED, LEFT, Record
from benchmarks.chaos_witness import Made


def finished(name: str, usage: tuple[int, int]) -> Record:
    return Record("ann", 0.0, id=name, outcome=FINISHED, usage=usage)


def audited(made: dict[str, dict[str, tuple[int, int]]], *records: Record, alive: tuple[str, ...] = ("r1",)) -> Audit:
    """Everything that was made was charged."""
    witnesses = {replica: Made(requests=requests) for replica, requests in made.items()}
    books = {replica: one.num_tokens for replica, one in witnesses.items()}
    charged = sum(i for i, _ in books.values()), sum(o for _, o in books.values())
    return audit(witnesses, books, charged, alive, records)


def test_what_is_told_is_what_was_made() -> None:
    result = audited({"r1": {"a-0": (10, 5)}}, finished("a", (10, 5)))
    assert result.is_exact and result.told == (10, 5) and result.made_for_others == (0, 0)


def test_one_token_more_or_less_is_a_problem() -> None:
    for usage in ((10, 4), (10, 6), (11, 5)):
        assert not audited({"r1": {"a-0": (10, 5)}}, finished("a", usage)).is_exact


def test_what_a_killed_replica_made_in_vain_is_told_apart() -> None:
    result = audited({"r0": {"a-0": (10, 2)}, "r1": {"a-0~1": (10, 5)}}, finished("a", (10, 5)))
    assert result.is_exact
    assert (result.num_in_vain, result.made_in_vain, result.made_for_others) == (1, (10, 2), (0, 0))


def test_a_living_replica_makes_nothing_in_vain() -> None:
    made = {"r0": {"a-0": (10, 2)}, "r1": {"a-0~1": (10, 5)}}
    assert not audited(made, finished("a", (10, 5)), alive=("r0", "r1")).is_exact


def test_a_request_that_was_given_back_unserved_was_not_made_there() -> None:
    made = {"r0": {"a-0": (0, 0)}, "r1": {"a-0~1": (10, 5)}}
    result = audited(made, finished("a", (10, 5)), alive=("r0", "r1"))
    assert result.is_exact and result.num_in_vain == 0


def test_a_caller_who_left_saw_no_more_than_was_made() -> None:
    made = {"r1": {"a-0": (10, 5)}}
    assert audited(made, Record("ann", 0.0, id="a", outcome=LEFT, num_streamed=5)).is_exact
    assert not audited(made, Record("ann", 0.0, id="a", outcome=LEFT, num_streamed=6)).is_exact
