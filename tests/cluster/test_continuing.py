"""One request on more than one replica, as its caller sees it. A scripted handle; no Ray cluster, no engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fairserve.cluster.continuing import Continuation
from fairserve.cluster.metrics_sink import RecordedMetrics
from fairserve.config import ApiConfig
from fairserve.engine.request import GenerateRequest, RequestOutput, SamplingParams, Usage
from fairserve.errors import ReplicaDied, ReplicaFailed
from tests.cluster.dying import RETURNED, STARTED, Replica, died

REQUEST = GenerateRequest("r", "ann", (1, 2, 3), SamplingParams(max_tokens=6, seed=5, stop=("!",)), application="chat")


@dataclass
class Handle:
    """Every send goes to the next replica."""

    replicas: list[Replica]
    sent: list[dict[str, Any]] = field(default_factory=list)
    metrics: RecordedMetrics = field(default_factory=RecordedMetrics)

    @property
    def resent(self) -> dict[str, float]:
        """By reason."""
        return {reason: num for (_, reason), num in self.metrics.counters.items()}

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: GenerateRequest, **values: Any) -> Any:
        self.sent.append({"request": request, **values})
        return self.replicas[len(self.sent) - 1].outputs(request)


async def through(
    *scripts: list[Any], retry: bool = True, deaths: int = 1
) -> tuple[Handle, list[RequestOutput], Exception | None]:
    """What was sent, what the caller saw, and how it ended."""
    from fairserve.cluster.backend import HandleBackend

    handle = Handle([Replica(list(script)) for script in scripts])
    api = ApiConfig(retry_on_replica_death=retry, max_replica_deaths=deaths)
    seen: list[RequestOutput] = []
    stream = HandleBackend(handle, api, handle.metrics).generate(REQUEST)
    try:
        while (output := await anext(stream, None)) is not None:
            seen.append(output)
    except ReplicaFailed as error:
        return handle, seen, error
    return handle, seen, None


def tokens(seen: list[RequestOutput]) -> list[int]:
    return [token for output in seen for token in output.token_ids]


async def test_a_stream_goes_on_on_another_replica_and_its_caller_sees_no_seam() -> None:
    alone = await through([1, 1, 1, 1, 1, 1])
    _, seen, error = await through([STARTED, 1, 1, died()], [STARTED, 1, 1, 1, 1])
    assert error is None
    assert seen == alone[1]
    assert tokens(seen) == [100, 101, 102, 103, 104, 105]
    assert [output.usage for output in seen] == [Usage(3, 0, n) for n in range(1, 7)], "the prompt counts once"
    assert [output.waited_s for output in seen] == [0.5] + [None] * 5


async def test_what_goes_on_says_what_was_made_asks_for_the_rest_and_keeps_everything_else() -> None:
    handle, _, _ = await through([2, died()], [4])
    first, second = handle.sent
    assert second["request"] == replace(
        REQUEST,
        request_id="r~1",
        prompt_token_ids=(1, 2, 3, 100, 101),
        sampling=replace(REQUEST.sampling, max_tokens=4),
        num_generated=2,
    )
    assert (first["replaces"], second["replaces"]) == (None, "r")
    assert first["first_sent_s"] == second["first_sent_s"]


def test_what_asks_for_no_output_is_computed_anew() -> None:
    first = replace(REQUEST, sampling=SamplingParams(max_tokens=0, prompt_logprobs=1))
    tries = Continuation(first, continues=True)
    assert tries.took(RequestOutput("r", "", (), Usage(0, 0, 0))) is None
    assert tries.died()
    again = tries.request
    assert (again.prompt_token_ids, again.sampling, again.num_generated) == (first.prompt_token_ids, first.sampling, 0)
    assert again.scores_prompt


async def test_a_request_may_go_on_more_than_once_if_more_deaths_are_allowed() -> None:
    handle, seen, error = await through([2, died()], [1, died()], [3], deaths=2)
    assert error is None
    assert tokens(seen) == list(range(100, 106))
    assert seen[-1].usage == Usage(3, 0, 6)
    assert [sent["request"].num_generated for sent in handle.sent] == [None, 2, 3]
    assert [sent["replaces"] for sent in handle.sent] == [None, "r", "r~1"]
    assert handle.resent == {"continued": 2}


@pytest.mark.parametrize("script", [[1, died], [STARTED, died], [died]])
@pytest.mark.parametrize("deaths", [1, 3])
async def test_a_request_that_kills_its_replicas_gets_so_many_and_no_more(script: list[Any], deaths: int) -> None:
    scripts = [[step() if step is died else step for step in script] for _ in range(5)]
    handle, _, error = await through(*scripts, deaths=deaths)
    assert isinstance(error, ReplicaDied)
    assert len(handle.sent) == deaths + 1


@pytest.mark.parametrize("retry", [True, False])
async def test_what_had_not_started_is_sent_elsewhere_as_it_was_whatever_is_set(retry: bool) -> None:
    handle, seen, error = await through([died()], [6], retry=retry)
    assert error is None
    assert tokens(seen) == list(range(100, 106))
    assert handle.sent[1]["request"] == replace(REQUEST, request_id="r~1"), "it pays for its input like any other"
    assert handle.resent == {"unstarted": 1}


@pytest.mark.parametrize("script", [[STARTED, died], [2, died]])
async def test_without_the_setting_what_had_started_fails(script: list[Any]) -> None:
    handle, seen, error = await through([step() if step is died else step for step in script], retry=False)
    assert isinstance(error, ReplicaDied)
    assert len(handle.sent) == 1
    assert all(output.token_ids for output in seen), "that it has started is no news for its caller"


async def test_with_the_setting_what_had_started_and_made_nothing_has_paid_for_its_input() -> None:
    handle, seen, _ = await through([STARTED, died()], [6])
    assert (handle.sent[1]["request"].num_generated, seen[0].waited_s) == (0, 0.5)
    assert seen[0].usage == Usage(3, 0, 6)


async def test_an_engine_that_failed_the_request_is_no_death() -> None:
    handle, _, error = await through([1, ReplicaFailed("the step failed")])
    assert error is not None and not isinstance(error, ReplicaDied)
    assert len(handle.sent) == 1


async def test_an_engine_that_ended_is_a_death() -> None:
    _, seen, error = await through([1, ReplicaDied("the engine thread has ended")], [5])
    assert (error, tokens(seen)) == (None, list(range(100, 106)))


async def test_a_replica_that_dies_with_its_last_word_said_changes_nothing() -> None:
    handle, seen, error = await through([6, died()])
    assert (error, len(handle.sent)) == (None, 1)
    assert seen[-1].finish_reason == "length"


async def test_what_goes_on_may_be_given_back_and_goes_on_from_there() -> None:
    handle, seen, error = await through([2, died()], [RETURNED], [4])
    assert (error, tokens(seen)) == (None, list(range(100, 106)))
    assert [sent["num_returns"] for sent in handle.sent] == [0, 0, 1]
    assert [sent["request"].num_generated for sent in handle.sent] == [None, 2, 2]
    assert [sent["replaces"] for sent in handle.sent] == [None, "r", "r~1"]
