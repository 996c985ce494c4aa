"""Outlets and trunks of one replica, without the other side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fairserve.cluster import multiplex
from fairserve.cluster.multiplex import Message, NoTrunk, Own, Part, Trunks
from fairserve.engine.request import FinishReason, RequestOutput, Usage


@pytest.fixture
async def trunks() -> AsyncIterator[Trunks]:
    trunks = Trunks("replica")
    yield trunks
    assert trunks.num_lines == 0, "something of an ingress is kept for ever"


def made(name: str, number: int, reason: FinishReason | None = None) -> RequestOutput:
    """Output ``number``, from 0, of a request: one token."""
    return RequestOutput(name, f"<{number}>", (number,), Usage(3, 0, number + 1), (), reason)


def part(name: str, first: int, num: int = 1) -> Part:
    ids = tuple(range(first, first + num))
    return Part(name, first, num, "".join(f"<{i}>" for i in ids), ids, (3, 0, first + num), (), None)


async def attached(trunks: Trunks, ingress: str = "a") -> tuple[Any, int]:
    """A trunk that is up, and its number."""
    trunk = trunks.attach(ingress)
    hello = await anext(trunk)
    assert (hello.number, hello.parts) == (0, ())
    return trunk, hello.trunk


async def test_what_a_step_made_for_one_ingress_is_one_message(trunks: Trunks) -> None:
    outlets = {name: trunks.open("a", name) for name in ("r1", "r2")} | {"r3": trunks.open("b", "r3")}
    trunk, number = await attached(trunks)
    for step in range(2):
        for name, outlet in outlets.items():
            outlet.put(made(name, step))
        assert await anext(trunk) == Message(number, 1 + step, (part("r1", step), part("r2", step)))
    for name in outlets:
        trunks.close("b" if name == "r3" else "a", name)
    await trunk.aclose()


async def test_a_request_alone_goes_over_its_own_call(trunks: Trunks) -> None:
    outlet = trunks.open("a", "r1", waited_s=0.5)
    outlet.put(made("r1", 0))
    first = await anext(outlet)
    assert (first.first, first.num, first.no_trunk) == (0, 1, None)
    assert first.output is not None and first.output.waited_s == 0.5
    outlet.put(made("r1", 1))
    outlet.put(made("r1", 2, "stop"))
    rest = [item async for item in outlet]
    assert [(item.first, item.num, item.earlier) for item in rest] == [(1, 2, ())], "what piled up comes as one"
    assert rest[0].output is not None and rest[0].output.waited_s is None
    trunks.close("a", "r1")


async def test_the_second_request_of_an_ingress_asks_for_a_trunk_and_says_how_many_there_were(trunks: Trunks) -> None:
    trunks.open("a", "r1")
    trunks.open("b", "r2")
    second = trunks.open("a", "r3")
    assert (await anext(second)).no_trunk == NoTrunk("replica", 0)
    trunk, number = await attached(trunks)
    assert number == 1
    third = trunks.open("a", "r4")
    third.put(made("r4", 0, "stop"))
    assert [item.no_trunk async for item in third] == [None], "there is one now"
    for ingress, name in (("a", "r1"), ("b", "r2"), ("a", "r3"), ("a", "r4")):
        trunks.close(ingress, name)
    await trunk.aclose()


async def test_the_own_call_ends_with_all_that_went_over_the_trunk(trunks: Trunks) -> None:
    outlet = trunks.open("a", "r1")
    outlet.put(made("r1", 0))
    trunk, _ = await attached(trunks)
    outlet.put(made("r1", 1))
    outlet.put(made("r1", 2))
    outlet.put(made("r1", 3, "length"))
    first, last = [item async for item in outlet]
    assert (first.first, first.num) == (0, 1)
    assert last == Own(3, 1, made("r1", 3, "length"), (("<1>", (1,), ()), ("<2>", (2,), ())))
    assert (await anext(trunk)).parts == (part("r1", 1, 2),), "the end does not go over the trunk"
    trunks.close("a", "r1")
    await trunk.aclose()


async def test_a_trunk_that_breaks_is_made_good_over_the_own_calls_which_ask_for_another(trunks: Trunks) -> None:
    outlets = [trunks.open("a", name) for name in ("r1", "r2")]
    assert (await anext(outlets[1])).no_trunk is not None
    trunk, number = await attached(trunks)
    for step in range(3):
        outlets[0].put(made("r1", step))
    await anext(trunk)
    await trunk.aclose()
    again, ask = await anext(outlets[0]), await anext(outlets[0])
    assert again == Own(2, 1, made("r1", 2), (("<0>", (0,), ()), ("<1>", (1,), ())))
    assert ask == Own(3, 0, None, no_trunk=NoTrunk("replica", number))
    outlets[0].put(made("r1", 3, "stop"))
    assert [(item.first, item.earlier) async for item in outlets[0]] == [(3, ())], "what was made good is not kept"
    for name in ("r1", "r2"):
        trunks.close("a", name)


async def test_a_new_trunk_takes_the_place_of_the_one_before(trunks: Trunks) -> None:
    outlet = trunks.open("a", "r1")
    before, first = await attached(trunks)
    outlet.put(made("r1", 0))
    trunk, second = await attached(trunks)
    assert second > first
    assert [message async for message in before] == [], "what it had not sent comes over the own call"
    assert (await anext(outlet)).first == 0
    outlet.put(made("r1", 1))
    assert (await anext(trunk)).parts == (part("r1", 1),)
    trunks.close("a", "r1")
    await trunk.aclose()


async def test_a_trunk_that_nobody_needs_ends_and_one_that_is_needed_does_not(
    trunks: Trunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplex, "IDLE_S", 0.0)
    outlet = trunks.open("a", "r1")
    trunk, _ = await attached(trunks)
    reading = asyncio.ensure_future(anext(trunk, None))
    for _ in range(5):
        await asyncio.sleep(0)
    outlet.put(made("r1", 0))
    assert (await reading) is not None
    reading = asyncio.ensure_future(anext(trunk, None))
    await asyncio.sleep(0)
    trunks.close("a", "r1")
    assert await reading is None


async def test_a_draining_replica_ends_its_trunks_with_the_last_request_and_asks_for_none(trunks: Trunks) -> None:
    outlet = trunks.open("a", "r1")
    trunk, _ = await attached(trunks)
    idle, _ = await attached(trunks, "b")
    reading = asyncio.ensure_future(anext(trunk))
    trunks.drain()
    assert [message async for message in idle] == []
    outlet.put(made("r1", 0))
    assert (await reading).parts == (part("r1", 0),)
    for name in ("r2", "r3"):
        late = trunks.open("c", name)
        late.put(made(name, 0, "stop"))
        assert [item.no_trunk async for item in late] == [None]
        trunks.close("c", name)
    trunks.close("a", "r1")
    assert [message async for message in trunk] == []


async def test_what_a_request_that_left_had_made_is_not_sent(trunks: Trunks) -> None:
    outlets = {name: trunks.open("a", name) for name in ("r1", "r2")}
    trunk, _ = await attached(trunks)
    for name, outlet in outlets.items():
        outlet.put(made(name, 0))
    trunks.close("a", "r1")
    assert (await anext(trunk)).parts == (part("r2", 0),)
    trunks.close("a", "r2")
    await trunk.aclose()


async def test_what_is_told_of_each_output_does_not_depend_on_its_way(trunks: Trunks) -> None:
    seen: list[RequestOutput] = []
    outlet = trunks.open("a", "r1", saw=seen.append)
    outlet.put(made("r1", 0))
    trunk, _ = await attached(trunks)
    outlet.put(made("r1", 1))
    outlet.put(made("r1", 2, "stop"))
    assert [one.token_ids for one in seen] == [(0,), (1,), (2,)]
    trunks.close("a", "r1")
    await trunk.aclose()
