"""Echo and log probabilities of the prompt, through the unmodified openai package: over a script for the shapes, over
a tiny model for the numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion

from tests.api.conftest import CONTEXT, MODEL
from tests.api.scripted import ScriptedBackend, words


@torch.inference_mode()
def logprobs_of(real_model: Any, tokens: list[int]) -> list[float]:
    """Of each token but the first."""
    rows = real_model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(tokens[1:])]


async def test_a_prompt_is_scored_alone_as_transformers_scores_it(
    real_client: openai.AsyncOpenAI, real_engine: Any, real_model: Any
) -> None:
    text = "To be scored, from its second token on; longer than a step."
    tokens = real_engine.tokenizer.encode(text)
    answer = await real_client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=3)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(logprobs_of(real_model, tokens), abs=1e-4)
    assert logprobs.tokens == list(text)
    assert logprobs.text_offset == list(range(len(text)))
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert all(len(top) in (3, 4) for top in logprobs.top_logprobs[1:])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokens), 0)
    request_id = f"{answer.id}-0"
    assert (real_engine.ledger.num_input[request_id], real_engine.ledger.num_output[request_id]) == (len(tokens), 0)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_prompt_and_output_are_one_text_with_one_list_of_log_probabilities(
    real_client: openai.AsyncOpenAI, real_engine: Any, real_model: Any, is_stream: bool
) -> None:
    prompts = ["First of two.", "The second is longer than the first."]
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": prompts, "max_tokens": 6, "echo": True, "logprobs": 0, "n": 2, "seed": 3,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    texts, tokens, values, offsets = ([""] * 4, *([[] for _ in range(4)] for _ in range(3)))
    chunks = [await real_client.completions.create(**asked)]
    if is_stream:
        chunks = [chunk async for chunk in await real_client.completions.create(stream=True, **asked)]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        values[choice.index] += choice.logprobs.token_logprobs
        offsets[choice.index] += choice.logprobs.text_offset
    for index in range(4):
        prompt = prompts[index // 2]
        assert texts[index].startswith(prompt)
        num_prompt = len(prompt)
        assert tokens[index][:num_prompt] == list(prompt)
        assert len(tokens[index]) == len(values[index]) == num_prompt + 6
        ends = [offset + len(token) for offset, token in zip(offsets[index], tokens[index], strict=True)]
        assert [0, *ends[:-1]] == offsets[index]
        wanted = logprobs_of(real_model, real_engine.tokenizer.encode(prompt))
        assert values[index][0] is None
        assert values[index][1:num_prompt] == pytest.approx(wanted, abs=1e-4)
    assert texts[0] != texts[1], "two seeds"


async def test_token_ids_are_echoed_as_text(real_client: openai.AsyncOpenAI, real_engine: Any) -> None:
    tokens = [*real_engine.tokenizer.encode("hello"), 1]
    answer = await real_client.completions.create(model=MODEL, prompt=tokens, max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("hello</s>", None)


async def test_vllms_prompt_logprobs_come_with_both_kinds_of_answers(
    real_client: openai.AsyncOpenAI, real_engine: Any, real_model: Any
) -> None:
    text = "Scored."
    tokens = real_engine.tokenizer.encode(text)
    answer = await real_client.completions.create(
        model=MODEL, prompt=text, max_tokens=1, logprobs=4, extra_body={"prompt_logprobs": 2}
    )
    listed = answer.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    assert listed[0] is None
    given = [one[str(token)]["logprob"] for one, token in zip(listed[1:], tokens[1:], strict=True)]
    assert given == pytest.approx(logprobs_of(real_model, tokens), abs=1e-4)
    assert [one[str(token)]["decoded_token"] for one, token in zip(listed[1:], tokens[1:], strict=True)] == list(
        text[1:]
    )
    assert all(sorted(e["rank"] for e in one.values() if e["rank"])[:2] == [1, 2] for one in listed[1:])
    assert all(len(one) in (2, 3) for one in listed[1:])
    assert answer.choices[0].text != text, "only echo repeats it"
    assert len(answer.choices[0].logprobs.tokens) == 1  # type: ignore[union-attr, arg-type]
    chat = await real_client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    listed = chat.model_extra["prompt_logprobs"]  # type: ignore[index]
    assert [len(one) for one in listed[1:]] == [1] * (chat.usage.prompt_tokens - 1)  # type: ignore[union-attr]


async def test_what_is_scored_beside_others_is_what_is_scored_alone(
    real_client: openai.AsyncOpenAI, real_engine: Any
) -> None:
    texts = [f"{i} " + "many at once " * i for i in range(1, 9)]

    async def scored(text: str) -> list[float]:
        answer = await real_client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=0)
        return answer.choices[0].logprobs.token_logprobs[1:]  # type: ignore[union-attr, index]

    noise = real_client.completions.create(model=MODEL, prompt="noise", max_tokens=60, extra_body={"ignore_eos": True})
    *together, _ = await asyncio.gather(*map(scored, texts), noise)
    for text, values in zip(texts, together, strict=True):
        assert await scored(text) == pytest.approx(values, abs=1e-4)


async def test_an_echo_is_a_completion_to_the_openai_package(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    answer = await client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=1)
    assert answer.choices[0].text == "abcHello world"
    shown = answer.model_dump()
    for key in ("token_logprobs", "top_logprobs"):
        assert shown["choices"][0]["logprobs"][key].pop(0) is None  # where its own type knows of no null
    Completion.model_validate(shown, strict=True)
    assert backend.requests[0].sampling.prompt_logprobs == 1
    await client.completions.create(model=MODEL, prompt="abc", echo=True)
    assert backend.requests[1].sampling.prompt_logprobs is None, "nobody asked"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 is only allowed with echo = true"),
        ({"suffix": "the end"}, "suffix: is not supported yet: leave it out"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs: is only allowed with stream = false"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: Input should be less than or equal to 20"),
        ({"max_tokens": -1, "echo": True}, "max_tokens: Input should be greater than or equal to 0"),
        ({"prompt": "x" * (CONTEXT + 1), "max_tokens": 0, "echo": True}, f"the prompt has {CONTEXT + 1} tokens"),
    ],
)
async def test_what_cannot_be_is_refused(client: openai.AsyncOpenAI, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.post("/completions", body={"model": MODEL, "prompt": "x"} | extra, cast_to=object)
    assert said in str(refused.value)


async def test_an_answer_holds_a_bounded_number_of_scores(
    client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairserve.api.service.MAX_SCORES", 50)
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["abcde"] * 2, "echo": True}
    await client.completions.create(**asked, logprobs=4)
    with pytest.raises(openai.BadRequestError, match="logprobs: 60 log probabilities of prompt tokens"):
        await client.completions.create(**asked, logprobs=5)


async def test_a_prompt_that_fills_the_context_can_be_scored(
    client: openai.AsyncOpenAI, backend: ScriptedBackend
) -> None:
    backend.script = words("", finish="length")
    await client.completions.create(model=MODEL, prompt="x" * CONTEXT, max_tokens=0, echo=True, logprobs=1)
    assert backend.requests[0].sampling.max_tokens == 0
