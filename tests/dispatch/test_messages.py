"""What travels is small and quick to read, and arrives as it was sent."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest

from fairserve.dispatch.messages import (
    Grant,
    Refusal,
    ReportReply,
    RouterCall,
    RouterReply,
    StepReport,
    Submit,
    Totals,
)
from fairserve.errors import ClientQueueFull

CLIENTS = [f"client-{i}" for i in range(32)]
SUBMITS = tuple(
    Submit(f"request-{i}", client, 100, 20, 2.0, prefix=(1, 2), trace="00-1") for i, client in enumerate(CLIENTS)
)
MESSAGES: dict[str, Any] = {
    "a report": StepReport(
        "r0", 1, 2, 3, 100, -1, 200, 8, {c: Totals(10, 5, 3, 11.0) for c in CLIENTS}, ("a",), held=("b",), closed=("x",)
    ),
    "its reply": ReportReply(3, 2, dict.fromkeys(CLIENTS, 1.5), need_full=True, is_draining=True, saved=1),
    "a call": RouterCall("east", 1, 2, 3, SUBMITS, ("c",), ("d",), ("r1",), is_full=True, grants_ack=9),
    "grants": RouterReply(3, tuple(Grant(c, "r0", 0.5, i) for i, c in enumerate(CLIENTS)), resubmit=True),
    "a refusal": RouterReply(3, refusals=(Refusal("a", ClientQueueFull("ann", 3, 2, 1.0)),)),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_arrives_as_it_was_sent(name: str, protocol: int) -> None:
    message = MESSAGES[name]
    arrived = pickle.loads(pickle.dumps(message, protocol))
    if name == "a refusal":
        (refusal,) = arrived.refusals
        assert str(refusal.error) == str(message.refusals[0].error)
    else:
        assert arrived == message
        parts = [*getattr(arrived, "submits", ()), *getattr(arrived, "grants", ())]
        parts += list(arrived.totals.values()) if isinstance(arrived, StepReport) else []
        assert all(type(part) in (Submit, Grant, Totals) for part in parts)


@pytest.mark.parametrize("name", [name for name in MESSAGES if name != "a refusal"])
def test_a_pickler_asks_python_once_for_a_message_whatever_it_holds(name: str) -> None:
    asked: list[type] = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, one: Any) -> Any:
            asked.append(type(one))
            return NotImplemented

    Pickler(io.BytesIO(), 5).dump(MESSAGES[name])
    assert asked.count(type(MESSAGES[name])) == 1
    assert not set(asked) & {Totals, Submit, Grant}


def test_totals_add_and_subtract_field_by_field() -> None:
    one, other = Totals(1, 2, 3, 4.0), Totals(10, 20, 30, 40.0)
    assert one + other == Totals(11, 22, 33, 44.0)
    assert other - one == Totals(9, 18, 27, 36.0)
    assert type(one + other) is type(other - one) is Totals
