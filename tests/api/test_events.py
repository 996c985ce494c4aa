"""Events that are put together from parts made once are byte for byte those that are made whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairserve.api.answers import Answer, ChatAnswer, CompletionAnswer, Job
from fairserve.api.streaming import Events, event
from fairserve.engine.request import GenerateRequest, RequestOutput, SamplingParams, TokenLogprob, Usage

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["", '"', "\\", "\0", "\n", "é"]
)
OUTPUTS = st.lists(
    st.tuples(st.integers(0, 2), TEXTS, st.booleans(), st.sampled_from([None, None, None, "stop", "length"])),
    max_size=20,
)


def answer(kind: type[Answer], logprobs: int | None, include_usage: bool) -> Answer:
    sampling = SamplingParams(logprobs=logprobs)
    requests = tuple(GenerateRequest(f"r-{i}", "ann", (1, 2), sampling) for i in range(3))
    job = Job('chat"cmpl', 17, 'a "model"', requests, 3, True, include_usage)
    return kind(job, lambda token_id: (f"<{token_id}>", [token_id]))


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize("logprobs", [None, 1])
@given(outputs=OUTPUTS, include_usage=st.booleans())
def test_an_event_is_what_its_chunk_says(
    kind: type[Answer], logprobs: int | None, outputs: list[tuple[int, str, bool, Any]], include_usage: bool
) -> None:
    events, plain = Events(answer(kind, logprobs, include_usage)), answer(kind, logprobs, include_usage)
    for index, text, has_logprobs, reason in outputs:
        probs = (TokenLogprob(7, -0.5, ((7, -0.5),)),) if has_logprobs and logprobs is not None else ()
        output = RequestOutput(f"r-{index}", text, (7,), Usage(2, 0, 1), probs, reason)
        chunk = plain.chunk(index, output)
        assert events.of_choice(index, output) == (b"" if chunk is None else event(chunk))


@given(text=st.text(max_size=20) | st.sampled_from(["a\x85b", "a\u2028b", "a\u2029b", "\x0b\x0c\x1c\x1d\x1e"]))
def test_an_event_is_one_line_also_for_readers_that_break_lines_where_text_does(text: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):  # half a character is in no output
        return
    lines = event({"text": text}).decode().splitlines()
    assert len(lines) == 2 and not lines[1]
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}
