"""A caller who leaves takes all of its generations along, at any stage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.api.conftest import MODEL, ServiceMaker, app_of
from tests.api.scripted import Call, ScriptedBackend, settled, words

GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_in_the_queue_cancels_every_choice(app: Any, backend: ScriptedBackend, stream: bool) -> None:
    backend.script = lambda _: [asyncio.Event()]
    call = Call(app, GOOD | {"stream": stream, "n": 3})
    await backend.until(lambda: len(backend.requests) == 3)
    call.hang_up()
    await backend.until(lambda: len(backend.cancelled) == 3)
    await call.task
    assert call.sent.empty()


async def test_hanging_up_in_a_stream_cancels_every_choice(app: Any, backend: ScriptedBackend) -> None:
    backend.script = lambda request: ["one", asyncio.Event()] if request.sampling.seed == 0 else [asyncio.Event()]
    call = Call(app, GOOD | {"stream": True, "n": 2, "seed": 0})
    assert await call.status() == 200
    await call.events()
    call.hang_up()
    await backend.until(lambda: len(backend.cancelled) == 2)
    await call.task


async def test_hanging_up_while_a_whole_answer_is_being_made_cancels_it(app: Any, backend: ScriptedBackend) -> None:
    backend.script = lambda _: ["one", "two", asyncio.Event()]
    call = Call(app, GOOD)
    await backend.until(lambda: len(backend.requests) == 1)
    await settled()
    call.hang_up()
    await backend.until(lambda: len(backend.cancelled) == 1)
    await call.task
    assert call.sent.empty()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_cancels_the_handler_cancels_the_generations(
    app: Any, backend: ScriptedBackend, stream: bool
) -> None:
    """Ray Serve does so when its proxy loses the caller."""
    backend.script = lambda _: ["one", asyncio.Event()]
    call = Call(app, GOOD | {"stream": stream, "n": 2})
    await backend.until(lambda: len(backend.requests) == 2)
    await settled()
    call.task.cancel()
    await backend.until(lambda: len(backend.cancelled) == 2)
    with pytest.raises(asyncio.CancelledError):
        await call.task


async def test_a_connection_that_breaks_while_writing_cancels_the_generation(
    app: Any, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    gate = asyncio.Event()
    backend.script = lambda request: ["one", gate, "two", asyncio.Event()]
    call = Call(app, GOOD | {"stream": True})
    assert await call.status() == 200
    call.send_raises = BrokenPipeError()
    gate.set()
    await backend.until(lambda: len(backend.cancelled) == 1)
    await call.task
    assert not caplog.records


async def test_a_caller_who_reads_slowly_does_not_hold_up_the_engine(app: Any, backend: ScriptedBackend) -> None:
    """The output is read ahead; the slow caller gets it in one piece."""
    backend.script = lambda request: [*"abcdefgh", *words("i")(request)]
    call = Call(app, GOOD | {"stream": True})
    call.may_send.clear()
    await backend.until(lambda: len(backend.finished) == 1)
    assert call.sent.empty()
    call.may_send.set()
    assert await call.status() == 200
    texts = [event["choices"][0]["delta"]["content"] for event in await call.events()]
    assert texts == ["abcdefghi"]
    await call.task


async def test_hanging_up_before_the_body_is_complete_generates_nothing(
    make_service: ServiceMaker, backend: ScriptedBackend
) -> None:
    app = app_of(make_service())
    call = Call(app, GOOD)
    call._incoming.get_nowait()
    call._incoming.put_nowait({"type": "http.request", "body": b'{"model":', "more_body": True})
    call.hang_up()
    await call.task
    assert backend.requests == []
    assert call.sent.empty()
