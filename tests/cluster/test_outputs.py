"""Outputs between the engine and a reader that may be slower."""

from __future__ import annotations

import asyncio

import pytest

from fairserve.cluster.outputs import OutputStream
from fairserve.engine.request import FinishReason, RequestOutput, TokenLogprob, Usage


def output(num_output: int, text: str = "", finish_reason: FinishReason | None = None) -> RequestOutput:
    logprobs = (TokenLogprob(num_output, -1.0),)
    return RequestOutput("r1", text, (num_output,), Usage(4, 0, num_output), logprobs, finish_reason)


async def test_a_reader_gets_what_is_there_as_one_output() -> None:
    stream = OutputStream()
    stream.put(output(1, "a"))
    stream.put(output(2, "b"))
    stream.put(output(3, "c", "stop"))
    outputs = [one async for one in stream]
    assert len(outputs) == 1
    assert (outputs[0].text, outputs[0].token_ids, outputs[0].finish_reason) == ("abc", (1, 2, 3), "stop")
    assert [logprob.token_id for logprob in outputs[0].logprobs] == [1, 2, 3]
    assert outputs[0].usage == Usage(4, 0, 3)


async def test_a_waiting_reader_wakes_with_each_output() -> None:
    stream = OutputStream()
    for i in (1, 2):
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.put(output(i))
        assert (await reading).token_ids == (i,)


async def test_only_the_first_output_carries_the_wait_also_when_merged() -> None:
    stream = OutputStream(waited_s=2.0)
    stream.put(output(1))
    stream.put(output(2))
    assert (await anext(stream)).waited_s == 2.0
    stream.put(output(3))
    assert (await anext(stream)).waited_s is None


async def test_nothing_comes_after_the_finish_reason() -> None:
    stream = OutputStream()
    stream.put(output(1, finish_reason="length"))
    await anext(stream)
    stream.put(output(2))
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_cancelled_read_loses_nothing() -> None:
    stream = OutputStream()
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    stream.put(output(1, "kept"))
    assert (await anext(stream)).text == "kept"
