"""Scored and pooled prompts on their way through routers, replicas and trunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.conftest import Served

pytestmark = pytest.mark.cluster

TEXTS = [f"Text number {i}, " + "which goes on and on, " * i for i in range(8)]


@torch.inference_mode()
def wanted(folder: Path) -> list[tuple[list[float], list[float]]]:
    """Log probabilities and embedding of each text, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        output = model(torch.tensor([tokens]), output_hidden_states=True)
        rows = output.logits[0].log_softmax(-1)
        mean = output.hidden_states[-1][0].mean(0)
        found.append(([float(rows[i, token]) for i, token in enumerate(tokens[1:])], (mean / mean.norm()).tolist()))
    return found


async def test_they_are_transformers_own_and_charged_to_the_token_beside_streams(
    serve_app: Callable[..., Served], tiny_model: Path
) -> None:
    served = serve_app("main", num_replicas=2, num_ingress_replicas=2)
    client = served.client("scorer").with_options(timeout=600)

    async def scored(text: str) -> Any:
        return await client.completions.create(
            model="tiny", prompt=text, max_tokens=3, echo=True, logprobs=1, extra_body={"ignore_eos": True}
        )

    async with client:
        noise = client.completions.create(model="tiny", prompt="noise", max_tokens=100, n=4)
        answers, pooled, other = await asyncio.gather(
            asyncio.gather(*map(scored, TEXTS)), client.embeddings.create(model="tiny", input=TEXTS), noise
        )
    for text, answer, data, (logprobs, vector) in zip(TEXTS, answers, pooled.data, wanted(tiny_model), strict=True):
        choice = answer.choices[0]
        assert choice.text.startswith(text)
        given = choice.logprobs.token_logprobs
        assert given[0] is None
        assert len(given) == len(logprobs) + 1 + 3
        assert given[1 : len(logprobs) + 1] == pytest.approx(logprobs, abs=1e-4)
        assert data.embedding == pytest.approx(vector, abs=1e-4)
    row = (await served.quiet())["clients"]["scorer"]
    num_prompt = sum(answer.usage.prompt_tokens for answer in answers)
    assert pooled.usage.prompt_tokens == num_prompt
    assert row["num_input"] == 2 * num_prompt + 4 * other.usage.prompt_tokens
    assert row["num_output"] == 3 * len(TEXTS) + other.usage.completion_tokens
