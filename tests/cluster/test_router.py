"""FairRouter and HandleBackend with a scripted client and handle: replicas that vanish, cancellation, errors. Ray's
classes, but no Ray cluster."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.cluster.tracing import NO_TRACING
from fairserve.dispatch.messages import Grant, Standing, Submit
from fairserve.engine.request import GenerateRequest, RequestOutput, Usage
from fairserve.errors import ClientQueueFull, FairServeError, ReplicaFailed


@dataclass
class ScriptedClient:
    """Grants in the order of the script; None: the counter actor cannot be reached."""

    script: list[str | None]
    asked: list[Submit] = field(default_factory=list)
    declined: list[tuple[str, bool]] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    """What was said of replicas and requests, in order."""
    never_accepted: set[str] = field(default_factory=set)

    async def acquire(self, submit: Submit) -> Grant | None:
        self.asked.append(submit)
        replica = self.script.pop(0)
        return None if replica is None else Grant(submit.request_id, replica, 0.25, len(self.asked))

    def decline(self, grant: Grant, *, is_unreachable: bool = True) -> None:
        self.declined.append((grant.replica, is_unreachable))

    def forget(self, request_id: str) -> None:
        self.told.append(("forget", request_id))

    def was_accepted(self, request_id: str) -> bool:
        return request_id not in self.never_accepted

    def replica_gone(self, replica: str) -> None:
        self.told.append(("gone", replica))

    def replica_draining(self, replica: str) -> None:
        self.told.append(("draining", replica))


def replica(name: str) -> Any:
    from ray.serve._private.common import DeploymentID
    from ray.serve.request_router import ReplicaID

    return SimpleNamespace(replica_id=ReplicaID(unique_id=name, deployment_id=DeploymentID(name="Model")))


def router_of(client: ScriptedClient, *names: str) -> Any:
    """A FairRouter without Serve's own machinery (metrics, long polls)."""
    from fairserve.cluster.router import FairRouter

    router = FairRouter.__new__(FairRouter)
    router._replicas = {}
    router._client, router._random, router._by_name = client, random.Random(0), {}
    router._prefix_block_tokens = 0
    router._tracer = NO_TRACING
    router._lazily_constructed_replicas_updated_event = None
    router._replica_queue_len_cache = SimpleNamespace(get=lambda _: None)
    set_replicas(router, *names)
    return router


def set_replicas(router: Any, *names: str) -> None:
    """Serve's news: FairRouter's own update, round what of Serve's it reads."""
    from ray.serve.request_router import RequestRouter

    def theirs(self: Any, replicas: list[Any]) -> None:
        self._replicas = {one.replica_id: one for one in replicas}
        self._replicas_list = replicas
        self._replicas_updated_event.set()

    with mock.patch.object(RequestRouter, "update_replicas", theirs):
        router.update_replicas([replica(name) for name in names])


def pending(request: Any = None) -> Any:
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    request = request or GenerateRequest("r1", "ann", (1, 2, 3))
    return PendingRequest(args=[request], kwargs={}, metadata=RequestMetadata(request_id="h", internal_request_id="i"))


async def test_the_granted_replica_is_chosen_and_told_the_wait() -> None:
    client = ScriptedClient(["b"])
    request = pending()
    chosen = await router_of(client, "a", "b")._choose_replica_for_request(request)
    assert chosen.replica_id.unique_id == "b"
    assert request.kwargs == {"waited_s": 0.25}
    assert client.asked[0] == Submit("r1", "ann", 3, 16)


async def test_the_backend_is_told_of_the_grant_and_the_replica_is_not_sent_what_it_was_told() -> None:
    request = pending()
    told = request.kwargs["told"] = []
    await router_of(ScriptedClient(["b", "b"]), "b")._choose_replica_for_request(request)
    await router_of(ScriptedClient(["b"]), "b")._choose_replica_for_request(request, is_retry=True)
    assert [grant.replica for grant in told] == ["b", "b"]
    assert request.kwargs == {"waited_s": 0.25}


async def test_what_a_request_says_of_itself_travels_to_the_counter_actor_and_again_with_a_retry() -> None:
    client = ScriptedClient(["gone", "a"])
    router = router_of(client, "a", "gone")
    set_replicas(router, "a")
    labels = {"application": "chat", "interaction": "task-7", "call_index": 3}
    await router._choose_replica_for_request(pending(GenerateRequest("r1", "ann", (1, 2, 3), **labels)))
    assert client.asked[0] == Submit("r1", "ann", 3, 16, **labels)
    again = client.asked[1]
    assert (again.application, again.interaction, again.call_index) == ("chat", "task-7", 3)


async def test_without_the_counter_actor_a_living_replica_is_chosen() -> None:
    client = ScriptedClient([None])
    chosen = await router_of(client, "a")._choose_replica_for_request(pending())
    assert chosen.replica_id.unique_id == "a"


async def test_a_call_that_names_its_replica_goes_there_without_a_grant_or_fails_if_it_left() -> None:
    client = ScriptedClient([])
    router = router_of(client, "a", "b")
    call = pending("ingress-1")
    call.kwargs["replica"] = "b"
    assert (await router._choose_replica_for_request(call)).replica_id.unique_id == "b"
    for others in (("a",), ()):
        set_replicas(router, *others)
        async with asyncio.timeout(0.5):
            with pytest.raises(ReplicaFailed, match="takes no more calls"):
                await router._choose_replica_for_request(call)
    assert client.asked == []


async def test_a_grant_for_a_replica_that_left_is_declined_at_once() -> None:
    client = ScriptedClient(["gone", "a"])
    router = router_of(client, "a", "gone")
    set_replicas(router, "a")
    async with asyncio.timeout(0.5):  # no waiting for what will not come back
        chosen = await router._choose_replica_for_request(pending())
    assert chosen.replica_id.unique_id == "a"
    assert client.declined == [("gone", True)]
    assert client.asked[1].is_retry and client.asked[1].waited_s >= 0


async def test_a_grant_for_a_replica_that_is_just_starting_waits_for_it() -> None:
    client = ScriptedClient(["new"])
    router = router_of(client, "a")
    choosing = asyncio.create_task(router._choose_replica_for_request(pending()))
    await asyncio.sleep(0.01)
    set_replicas(router, "a")  # news, but not the one
    await asyncio.sleep(0.01)
    set_replicas(router, "a", "new")
    assert (await choosing).replica_id.unique_id == "new"
    assert client.declined == []


async def test_a_replica_that_never_comes_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairserve.cluster import router as module

    monkeypatch.setattr(module, "REPLICA_WAIT_S", 0.02)
    client = ScriptedClient(["never", "a"])
    chosen = await router_of(client, "a")._choose_replica_for_request(pending())
    assert chosen.replica_id.unique_id == "a"
    assert client.declined == [("never", True)]


async def test_a_caller_that_leaves_while_its_replica_is_starting_gives_the_grant_back() -> None:
    client = ScriptedClient(["new"])
    router = router_of(client, "a")
    choosing = asyncio.create_task(router._choose_replica_for_request(pending()))
    await asyncio.sleep(0.01)
    choosing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await choosing
    assert client.declined == [("new", False)]


async def test_a_retry_gives_the_void_grant_back_once_and_keeps_the_place() -> None:
    client = ScriptedClient(["a", None, "b"])
    router = router_of(client, "a", "b")
    request = pending()
    request.created_at -= 5
    await router._choose_replica_for_request(request)
    await router._choose_replica_for_request(request, is_retry=True)
    await router._choose_replica_for_request(request, is_retry=True)
    assert client.declined == [("a", True)]
    assert [submit.is_retry for submit in client.asked] == [False, True, True]
    assert client.asked[1].waited_s == pytest.approx(5, abs=1)


async def test_what_comes_back_and_was_never_accepted_meets_the_queue_limits_in_its_place() -> None:
    client = ScriptedClient(["a"])
    client.never_accepted = {"r1"}
    request = pending(GenerateRequest("r1~1", "ann", (1, 2, 3)))
    request.kwargs |= {"replaces": "r1", "first_sent_s": time.time() - 5}
    await router_of(client, "a")._choose_replica_for_request(request)
    assert not client.asked[0].is_retry
    assert client.asked[0].waited_s == pytest.approx(5, abs=1)


async def test_a_replica_that_leaves_serves_list_is_told_once_as_draining() -> None:
    client = ScriptedClient([])
    router = router_of(client, "a", "b")
    set_replicas(router, "b", "c")
    set_replicas(router, "b", "c")
    assert client.told == [("draining", "a")]


async def test_a_replica_that_died_is_told_once_however_many_requests_notice() -> None:
    from ray.serve.request_router import RequestRouter

    client = ScriptedClient([])
    router = router_of(client, "a", "b")
    (died,) = (one for one in router._replicas if one.unique_id == "a")

    def theirs(self: Any, replica_id: Any) -> None:
        self._replicas.pop(replica_id, None)

    with mock.patch.object(RequestRouter, "on_replica_actor_died", theirs):
        for _ in range(3):
            router.on_replica_actor_died(died)
        set_replicas(router, "b")
        assert client.told == [("gone", "a")]
        set_replicas(router, "a", "b")  # the controller had not noticed
        router.on_replica_actor_died(died)
    assert client.told == [("gone", "a"), ("gone", "a")]


async def test_a_request_that_an_earlier_replica_had_replaces_it_and_keeps_its_place() -> None:
    client = ScriptedClient(["a", "a"])
    request = pending(GenerateRequest("r1~1", "ann", (1, 2, 3)))
    request.kwargs |= {"replaces": "r1", "first_sent_s": time.time() - 5}
    router = router_of(client, "a")
    await router._choose_replica_for_request(request)
    await router._choose_replica_for_request(request, is_retry=True)
    assert client.told == [("forget", "r1")]
    assert client.asked[0].is_retry
    assert client.asked[0].waited_s == pytest.approx(5, abs=1)


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_caller_that_leaves_before_its_replica_has_the_request_gives_the_grant_back(leaves: bool) -> None:
    client = ScriptedClient(["a"])
    router = router_of(client, "a")
    has_grant, accepted = asyncio.Event(), asyncio.Event()

    async def assign() -> None:
        """Serve's own: choose, send, wait for the replica to accept."""
        await router._choose_replica_for_request(pending())
        has_grant.set()
        await accepted.wait()

    task = asyncio.create_task(assign())
    await has_grant.wait()
    if leaves:
        task.cancel()
    accepted.set()
    await asyncio.gather(task, return_exceptions=True)
    assert client.declined == ([("a", False)] if leaves else [])


async def test_with_no_replica_at_all_requests_wait_for_one() -> None:
    client = ScriptedClient(["a"])
    router = router_of(client)
    choosing = [asyncio.create_task(router._choose_replica_for_request(pending("limits?"))) for _ in range(2)]
    choosing.append(asyncio.create_task(router._choose_replica_for_request(pending())))
    await asyncio.sleep(0.01)
    assert client.asked == [], "nothing to be granted yet"
    set_replicas(router, "a")
    assert {one.replica_id.unique_id for one in await asyncio.gather(*choosing)} == {"a"}


# -- the API's side of the handle -----------------------------------------------------------------------------------


class Response:
    """A DeploymentResponseGenerator that yields, then raises or waits for ever."""

    def __init__(self, *outputs: Any, ending: BaseException | None = None) -> None:
        self._outputs = list(outputs)
        self._ending = ending
        self.num_cancels = 0
        self.cancel_error: Exception | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._outputs:
            return self._outputs.pop(0)
        if self._ending is None:
            return await asyncio.Event().wait()
        raise self._ending

    def cancel(self) -> None:
        self.num_cancels += 1
        if self.cancel_error is not None:
            raise self.cancel_error


class Handle:
    def __init__(self, response: Response) -> None:
        self.response = response
        self.sent: list[Any] = []

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, *args: Any, **_: Any) -> Response:
        self.sent.append(args)
        return self.response


def output(finish_reason: Any = None) -> RequestOutput:
    return RequestOutput("r1", "x", (1,), Usage(3, 0, 1), finish_reason=finish_reason)


def generating(response: Response) -> tuple[Handle, Any]:
    from fairserve.cluster.backend import HandleBackend

    handle = Handle(response)
    return handle, HandleBackend(handle).generate(GenerateRequest("r1", "ann", (1, 2, 3)))


async def test_a_whole_stream_is_passed_on_and_not_cancelled() -> None:
    response = Response(output(), output("stop"), ending=StopAsyncIteration())
    _, stream = generating(response)
    assert [one.finish_reason async for one in stream] == [None, "stop"]
    assert response.num_cancels == 0


async def test_what_a_replica_gives_back_is_sent_again_in_its_old_place_and_nobody_sees_it() -> None:
    from fairserve.cluster.backend import HandleBackend

    over = StopAsyncIteration()
    responses = [Response(output("returned"), ending=over), Response(output("stop"), ending=over)]
    sent: list[dict[str, Any]] = []

    class Again(Handle):
        def remote(self, *args: Any, **values: Any) -> Response:
            sent.append(values)
            return responses[len(sent) - 1]

    metrics = RecordedMetrics()
    stream = HandleBackend(Again(responses[0]), metrics=metrics).generate(GenerateRequest("r1", "ann", (1, 2, 3)))
    assert (await anext(stream)).finish_reason == "stop"
    await stream.aclose()
    assert [values["num_returns"] for values in sent] == [0, 1]
    assert [values["replaces"] for values in sent] == [None, "r1"]
    assert sent[0]["first_sent_s"] == sent[1]["first_sent_s"]
    assert metrics.counters == {("fairserve_resent_requests", "returned"): 1}


async def test_where_the_client_stands_comes_with_the_first_output_only() -> None:
    from fairserve.cluster.backend import HandleBackend

    class Granted(Handle):
        def remote(self, *args: Any, told: list[Grant], **_: Any) -> Response:
            told.append(Grant("r1", "a", 0.25, 1, (2.5, 20, 17, 1.5)))
            return self.response

    handle = Granted(Response(output(), output("stop"), ending=StopAsyncIteration()))
    stream = HandleBackend(handle).generate(GenerateRequest("r1", "ann", (1, 2, 3)))
    assert [one.standing async for one in stream] == [Standing(2.5, 20, 17, 1.5), None]


async def test_closing_cancels_what_runs_and_sends_nothing_that_never_ran() -> None:
    response = Response(output())
    handle, stream = generating(response)
    await anext(stream)
    await stream.aclose()
    assert response.num_cancels == 1
    handle, stream = generating(Response())
    await stream.aclose()
    assert handle.sent == []


async def test_a_cancelled_reader_cancels_the_request_also_when_serve_fails_it_in_the_same_moment() -> None:
    response = Response()
    response.cancel_error = ClientQueueFull("ann", 1, 1, 1.0)  # Serve raises the request's own error from cancel()
    _, stream = generating(response)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert response.num_cancels == 1


def serve_cancelled() -> Exception:
    from ray.serve.exceptions import RequestCancelledError

    return RequestCancelledError("h")


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def user_bug() -> Exception:
    from ray.exceptions import RayTaskError

    return RayTaskError("generate", "Traceback: secret detail", ZeroDivisionError("x")).as_instanceof_cause()


@pytest.mark.parametrize("make", [serve_cancelled, died, user_bug])
async def test_what_serve_and_ray_raise_is_a_failed_replica_without_internals(make: Any) -> None:
    response = Response(output(), ending=make())
    _, stream = generating(response)
    await anext(stream)
    with pytest.raises(ReplicaFailed) as failed:
        await anext(stream)
    assert "secret" not in str(failed.value)
    assert response.num_cancels == 0


@pytest.mark.parametrize("error", [ReplicaFailed("the step failed"), ClientQueueFull("ann", 7, 7, 2.0)])
async def test_our_own_error_comes_out_of_rays_wrapper(error: FairServeError) -> None:
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("generate", "Traceback: secret detail", error).as_instanceof_cause()
    assert "secret" in str(wrapped), "or this test shows nothing"
    _, stream = generating(Response(ending=wrapped))
    with pytest.raises(type(error)) as raised:
        await anext(stream)
    assert raised.value is error


async def test_a_refusal_of_the_router_is_passed_on() -> None:
    error = ClientQueueFull("ann", 7, 7, 2.0)
    response = Response(ending=error)
    _, stream = generating(response)
    with pytest.raises(ClientQueueFull) as raised:
        await anext(stream)
    assert raised.value is error
    assert response.num_cancels == 0
