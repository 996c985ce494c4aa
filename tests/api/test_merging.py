"""The merger on its own: one stream out of many, and nothing left running."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from fairserve.api.merging import merged
from fairserve.engine.request import GenerateRequest, RequestOutput, TokenLogprob, Usage, joined
from fairserve.errors import ReplicaFailed
from tests.api.scripted import ScriptedBackend, output, settled, words


def requests(count: int) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{i}", "alice", (1, 2)) for i in range(count)]


async def test_every_output_of_every_stream_arrives_in_order() -> None:
    backend = ScriptedBackend(words(*"abc"))
    texts = {0: "", 1: "", 2: ""}
    async for batch in merged([backend.generate(request) for request in requests(3)]):
        for index, one in batch.items():
            texts[index] += one.text
    assert texts == dict.fromkeys(range(3), "abc")


async def test_a_slow_stream_does_not_hold_back_a_fast_one() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(lambda r: [gate, *words("slow")(r)] if r.request_id == "r0" else words("fast")(r))
    async with aclosing(merged([backend.generate(request) for request in requests(2)])) as batches:
        assert (await anext(batches)).keys() == {1}
        gate.set()
        assert (await anext(batches)).keys() == {0}
        with pytest.raises(StopAsyncIteration):
            await anext(batches)


async def test_leaving_early_ends_every_stream_before_it_returns() -> None:
    backend = ScriptedBackend(lambda _: ["x", asyncio.Event()])
    async with aclosing(merged([backend.generate(request) for request in requests(3)])) as batches:
        await anext(batches)
    assert sorted(backend.cancelled) == ["r0", "r1", "r2"]


async def test_what_was_made_before_a_failure_is_delivered_before_it() -> None:
    gate = asyncio.Event()
    backend = ScriptedBackend(lambda _: ["a", gate, "b", "c", ReplicaFailed("gone")])
    async with aclosing(merged([backend.generate(request) for request in requests(1)])) as batches:
        assert (await anext(batches))[0].text == "a"
        gate.set()
        assert (await anext(batches))[0].text == "bc"
        with pytest.raises(ReplicaFailed):
            await anext(batches)


async def test_a_failure_before_anything_was_delivered_is_all_there_is() -> None:
    backend = ScriptedBackend(lambda _: ["a", ReplicaFailed("gone")])
    with pytest.raises(ReplicaFailed):
        await anext(merged([backend.generate(request) for request in requests(1)]))


async def test_a_cancellation_that_comes_from_the_cluster_is_a_failed_replica() -> None:
    async def cancelled() -> AsyncIterator[RequestOutput]:
        yield output(requests(1)[0], "x", 1)
        raise asyncio.CancelledError

    with pytest.raises(ReplicaFailed, match="cancelled"):
        await anext(merged([cancelled()]))


async def test_what_waits_for_a_reader_that_does_not_read_stays_small_and_is_whole() -> None:
    """It is bounded by max_tokens, and by far fewer bytes than as many single outputs would take."""
    num = 20_000
    first, *_ = requests(1)
    taken = asyncio.Event()

    async def flood() -> AsyncIterator[RequestOutput]:
        for i in range(num):
            yield RequestOutput(first.request_id, "word ", (1000 + i,), Usage(5, 0, i + 1))
            if not i:
                await taken.wait()
        yield RequestOutput(first.request_id, "", (), Usage(5, 0, num), finish_reason="length")

    async with aclosing(merged([flood()])) as batches:
        assert (await anext(batches))[0].text == "word "
        tracemalloc.start()
        try:
            taken.set()
            await settled()  # nobody reads; everything is there
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        rest = (await anext(batches))[0]
    assert held < 80 * num, f"{held / num:.0f} bytes for each token that nobody reads"
    assert (rest.text, rest.token_ids) == ("word " * (num - 1), tuple(range(1001, 1000 + num)))
    assert (rest.usage.num_output, rest.finish_reason) == (num, "length")


async def test_a_stream_that_reports_an_error_is_closed_and_not_left_to_the_garbage_collector() -> None:
    class Closable:
        is_closed = False

        def __aiter__(self) -> AsyncIterator[RequestOutput]:
            return self

        async def __anext__(self) -> RequestOutput:
            return output(requests(1)[0], "", 1, finish="error")

        async def aclose(self) -> None:
            self.is_closed = True

    stream = Closable()
    with pytest.raises(ReplicaFailed):
        await anext(merged([stream]))
    assert stream.is_closed


async def test_an_iterator_without_aclose_will_do() -> None:
    class Plain:
        def __init__(self) -> None:
            self.left = [output(requests(1)[0], "x", 1, finish="stop")]

        def __aiter__(self) -> AsyncIterator[RequestOutput]:
            return self

        async def __anext__(self) -> RequestOutput:
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop()

    batches = [batch async for batch in merged([Plain()])]
    assert [batch[0].text for batch in batches] == ["x"]


def test_joined_outputs_keep_every_token_the_wait_the_last_usage_and_the_finish() -> None:
    logprobs = tuple(TokenLogprob(i, -1.0) for i in range(3))
    parts = [
        RequestOutput("r", "a", (0, 1), Usage(2, 1, 2), logprobs[:2], waited_s=0.25),
        RequestOutput("r", "b", (2,), Usage(2, 1, 3), logprobs[2:], "stop", "END"),
    ]
    late = RequestOutput("r", "", (), Usage(2, 1, 3))
    assert joined([*parts, late]) == joined(parts)
    assert joined(parts) == RequestOutput("r", "ab", (0, 1, 2), Usage(2, 1, 3), logprobs, "stop", "END", waited_s=0.25)
