"""Asking the counter actor: time-outs, what failed said plainly, and an actor that ended found again. No Ray runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from fairserve.cluster.counter_client import RayTransport
from fairserve.cluster.counter_query import CounterQuery
from fairserve.config import ApiKey, key_digest
from fairserve.errors import ConfigError, CounterUnreachable, FairServeError, InvalidRequest, UnknownClient
from fairserve.views import ClientChange
from tests.api.fake_counter import FakeCounter, FakeTransport


@pytest.fixture
def counter() -> FakeCounter:
    return FakeCounter()


@pytest.fixture
def query(counter: FakeCounter) -> CounterQuery:
    return CounterQuery(FakeTransport(counter), timeout_s=5.0)


async def test_a_silent_actor_is_unreachable_after_the_time_out(counter: FakeCounter) -> None:
    counter.gate = asyncio.Event()
    query = CounterQuery(FakeTransport(counter), timeout_s=0.01)
    with pytest.raises(CounterUnreachable, match=r"did not answer 'overview' within 0\.01 s"):
        await query.overview()


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (UnknownClient("zoe"), UnknownClient, "no client 'zoe'"),
        (RayTaskError("client", "a traceback", UnknownClient("zoe")), UnknownClient, "no client 'zoe'"),
        (
            RayTaskError("set", "a traceback", ConfigError("fairness.quantum: no")),
            InvalidRequest,
            "fairness.quantum: no",
        ),
        (RayTaskError("client", "a traceback", KeyError("bug")), RayTaskError, "a traceback"),
        (ActorUnavailableError("restarting", None), CounterUnreachable, "starting again"),
        (ActorDiedError(), CounterUnreachable, "has ended"),
    ],
    ids=["plain", "wrapped", "config", "bug", "restarting", "ended"],
)
async def test_what_failed_is_said_plainly(
    counter: FakeCounter, query: CounterQuery, raised: Exception, kind: type[Exception], words: str
) -> None:
    counter.failure = raised
    with pytest.raises(kind) as caught:
        await query.client("zoe")
    assert words in str(caught.value)
    assert isinstance(raised, RayTaskError) is False or kind is RayTaskError or "traceback" not in str(caught.value)


class Remote:
    """A handle as Ray's: ``handle.method.remote(...)``."""

    def __init__(self, counter: FakeCounter) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._counter, name)

        class Method:
            def remote(self, *arguments: Any, **named: Any) -> Any:
                return method(*arguments, **named)

        return Method()


def over(*counters: FakeCounter | Exception) -> CounterQuery:
    """A query whose every search finds the next of these."""
    left = list(counters)

    def find() -> Any:
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return Remote(found)

    return CounterQuery(RayTransport(find), timeout_s=5.0)


async def test_a_read_of_an_actor_that_ended_finds_the_next_one(counter: FakeCounter) -> None:
    ended = FakeCounter()
    ended.failure = ActorDiedError()
    query = over(ended, counter)
    assert (await query.overview()).num_clients == 8
    assert (ended.calls["overview"], counter.calls["overview"]) == (1, 1)
    await query.overview()
    assert ended.calls["overview"] == 1


async def test_a_change_is_never_sent_twice(counter: FakeCounter) -> None:
    ended = FakeCounter()
    ended.failure = ActorDiedError()
    query = over(ended, counter)
    with pytest.raises(CounterUnreachable):
        await query.set_client("zoe", ClientChange(weight=2), "me")
    assert not counter.calls
    assert (await query.set_client("zoe", ClientChange(weight=2), "me")).weight == 2


async def test_no_actor_at_all_is_said_and_looked_for_again(counter: FakeCounter) -> None:
    query = over(CounterUnreachable("this Ray cluster has no counter actor"), counter)
    with pytest.raises(CounterUnreachable, match="has no counter actor"):
        await query.settings()
    assert await query.settings()


async def test_only_named_fields_are_sent_and_no_secret_is(counter: FakeCounter, query: CounterQuery) -> None:
    await query.set_client("zoe", ClientChange(weight=None), "me")
    (entry,) = await query.audit()
    assert entry.after == {"weight": None}
    await query.add_key(ApiKey(client="zoe", key_sha256=key_digest("a secret")), "me")
    assert "key" not in counter._keys[0]


async def test_an_answer_that_is_no_view_is_an_error(counter: FakeCounter, query: CounterQuery) -> None:
    counter.client = lambda name: asyncio.sleep(0, {"name": name})  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError) as caught:
        await query.client("zoe")
    assert not isinstance(caught.value, FairServeError)
