"""What arrives at an ingress in any order, with repeats and gaps."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.cluster.arrivals import MAX_READY, Inbox
from fairserve.cluster.multiplex import Own, Part
from fairserve.engine.request import RequestOutput, TokenLogprob, Usage

REASON: Any = "length"


def own(first: int, num: int, num_earlier: int = 0, is_last: bool = False) -> Own:
    ids = tuple(range(first, first + num))
    output = RequestOutput(
        "r",
        "".join(f"<{i}>" for i in ids),
        ids,
        Usage(3, 0, first + num),
        tuple(TokenLogprob(i, -1.0) for i in ids),
        REASON if is_last else None,
    )
    earlier = tuple((f"<{i}>", (i,), (TokenLogprob(i, -1.0),)) for i in range(first - num_earlier, first))
    return Own(first, num, output, earlier)


def part(first: int, num: int) -> Part:
    output = own(first, num).output
    assert output is not None
    return Part("r", first, num, output.text, output.token_ids, (3, 0, first + num), output.logprobs, None)


async def read(inbox: Inbox) -> list[RequestOutput]:
    async with asyncio.timeout(5):
        return [output async for output in inbox]


def check(outputs: list[RequestOutput], num: int) -> None:
    assert [i for output in outputs for i in output.token_ids] == list(range(num))
    assert "".join(output.text for output in outputs) == "".join(f"<{i}>" for i in range(num))
    assert [one.token_id for output in outputs for one in output.logprobs] == list(range(num))
    assert (outputs[-1].finish_reason, outputs[-1].usage) == ("length", Usage(3, 0, num))
    counts = [output.usage.num_output for output in outputs]
    assert counts == sorted(counts)


async def test_parts_that_overtook_wait_for_those_before_them() -> None:
    inbox = Inbox()
    inbox.part(part(2, 1))
    inbox.part(part(1, 1))
    reading = asyncio.ensure_future(anext(inbox))
    await asyncio.sleep(0)
    assert not reading.done()
    inbox.own(own(0, 1))
    assert (await reading).token_ids == (0,)
    inbox.own(own(3, 1, 3, is_last=True))
    assert [one.token_ids for one in await read(inbox)] == [(1,), (2,), (3,)]


@given(
    cuts=st.lists(st.booleans(), min_size=1, max_size=40),
    order=st.randoms(use_true_random=False),
    lost=st.floats(0, 1),
    num_own=st.integers(0, 40),
)
async def test_every_output_comes_once_and_in_order_whatever_a_trunk_does(
    cuts: list[bool], order: Any, lost: float, num_own: int
) -> None:
    """Parts are lost, repeated and shuffled; the last item of the own call has all that the trunk was given."""
    num = len(cuts) + 1
    num_own = min(num_own, num - 1)
    bounds = [num_own, *(i for i in range(num_own + 1, num - 1) if cuts[i]), num - 1]
    parts = [part(a, b - a) for a, b in pairwise(bounds) if b > a]
    arriving = [one for one in parts * 2 if order.random() >= lost]
    order.shuffle(arriving)
    inbox = Inbox()
    items: list[Any] = [*arriving, *(own(i, 1) for i in range(num_own))]
    order.shuffle(items)
    owns = iter(sorted((item for item in items if isinstance(item, Own)), key=lambda item: item.first))
    for item in items:
        if isinstance(item, Own):
            inbox.own(next(owns))  # a call keeps its order
        else:
            inbox.part(item)
    inbox.own(own(num - 1, 1, num - 1 - num_own, is_last=True))
    for item in parts:  # late
        inbox.part(item)
    check(await read(inbox), num)


async def test_a_slow_reader_gets_everything_in_few_outputs() -> None:
    inbox = Inbox()
    for i in range(10 * MAX_READY):
        inbox.part(part(i, 1))
    inbox.own(own(10 * MAX_READY, 1, 10 * MAX_READY, is_last=True))
    outputs = await read(inbox)
    assert len(outputs) <= MAX_READY + 1
    check(outputs, 10 * MAX_READY + 1)


async def test_what_is_ready_comes_before_a_failure_and_nothing_after_the_last_word() -> None:
    inbox = Inbox()
    inbox.own(own(0, 1))
    inbox.fail(ValueError("x"))
    assert (await anext(inbox)).token_ids == (0,)
    with pytest.raises(ValueError, match="x"):
        await anext(inbox)
    inbox = Inbox()
    inbox.own(own(0, 1, is_last=True))
    inbox.fail(ValueError("x"))
    assert len(await read(inbox)) == 1


async def test_plain_outputs_are_taken_as_they_come() -> None:
    inbox = Inbox()
    for item in (own(0, 1), own(1, 1), own(2, 1, is_last=True)):
        assert item.output is not None
        inbox.own(item.output)
    check(await read(inbox), 3)


async def test_an_end_without_a_finish_reason_is_an_end() -> None:
    inbox = Inbox()
    inbox.own(own(0, 1))
    inbox.end()
    assert len(await read(inbox)) == 1
