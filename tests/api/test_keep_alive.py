"""Comments in a stream that is silent, which clients skip."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest

from fairserve.api import streaming
from fairserve.api.answer_headers import AnswerHeaders
from fairserve.clock import SystemClock
from fairserve.engine.request import RequestOutput, Usage

SAYS = b"data: text\n\n"


class Framing:
    def of(self, batch: Any) -> bytes:
        return SAYS if batch[0].text else b""

    def end(self, last: Any) -> bytes:
        return streaming.DONE

    def failed(self, problem: Any) -> bytes:
        return b"data: failed\n\n"


class Line:
    """A connection that tells how many bodies have gone out."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.news = asyncio.Condition()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            async with self.news:
                self.sent.append(message["body"])
                self.news.notify_all()

    async def until(self, num: int) -> None:
        async with self.news, asyncio.timeout(30):
            await self.news.wait_for(lambda: len(self.sent) >= num)


async def run(line: Line, batches: Any, keep_alive_s: float | None) -> None:
    headers = AnswerHeaders(SystemClock())
    await streaming.stream(
        Framing(), batches, nullcontext(), headers, request_id="r", keep_alive_s=keep_alive_s, send=line.send
    )
    assert len(asyncio.all_tasks()) == 1, "nothing beats on"


def output(text: str) -> dict[int, RequestOutput]:
    return {0: RequestOutput("r", text, (), Usage(1, 0, 0))}


async def test_a_stream_that_has_begun_and_is_silent_gets_comments_between_its_events() -> None:
    line = Line()

    async def batches() -> Any:
        yield output("")  # it has started: a long prompt
        await line.until(2)
        yield output("a")
        await line.until(4)
        yield output("b")

    await run(line, batches(), 0.001)
    assert set(line.sent) == {streaming.COMMENT, SAYS, streaming.DONE}
    assert line.sent[:2] == [streaming.COMMENT] * 2
    assert line.sent.count(SAYS) == 2
    assert line.sent[-1] == streaming.DONE


async def test_nothing_is_sent_before_the_first_output_whatever_the_silence() -> None:
    line = Line()

    async def batches() -> Any:
        for _ in range(20):
            await asyncio.sleep(0)
        assert line.sent == []
        yield output("a")

    await run(line, batches(), 1e-6)
    assert line.sent[0] == SAYS


@pytest.mark.parametrize("keep_alive_s", [None, 3600.0])
async def test_a_stream_that_speaks_in_time_gets_none(keep_alive_s: float | None) -> None:
    line = Line()

    async def batches() -> Any:
        yield output("a")
        yield output("b")

    await run(line, batches(), keep_alive_s)
    assert line.sent == [SAYS, SAYS, streaming.DONE]


async def test_a_stream_that_fails_stops_its_comments() -> None:
    line = Line()

    async def batches() -> Any:
        yield output("a")
        raise RuntimeError("broken")

    await run(line, batches(), 3600.0)
    assert line.sent == [SAYS, b"data: failed\n\n"]
