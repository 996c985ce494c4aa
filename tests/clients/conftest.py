"""One application over HTTP for all client packages, with a scripted model that calls functions when it has some."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Sequence

import openai
import pytest

from fairserve.engine.request import GenerateRequest, SamplingParams
from tests.api import tool_kit
from tests.api.scripted import Step, byte_tokenizer, words
from tests.api.served import API_KEY, PATIENCE_S, Served
from tests.api.tool_kit import CALL

CAN_BE_FORCED = "grammar" in SamplingParams.__dataclass_fields__
needs_grammar = pytest.mark.skipif(not CAN_BE_FORCED, reason="the engine cannot be held to a grammar")
TOKENIZER = byte_tokenizer()


def model(request: GenerateRequest) -> Sequence[Step]:
    """Greets; with functions in its prompt it calls the weather first, and then tells what came of it. Held to a
    grammar without functions, it writes JSON."""
    prompt = TOKENIZER.decode(request.prompt_token_ids)
    roles = re.findall(r"<\|(\w+)\|>", prompt)
    if roles[-2:-1] == ["tool"]:
        return words("It rains", " in Oslo.")(request)
    if "tool" in roles:
        return words("Let me look. ", *re.findall(r".{1,4}", CALL, re.DOTALL))(request)
    if getattr(request.sampling, "grammar", None) is not None:
        return words('{"city": ', '"Oslo"}')(request)
    return words("Hello", " world")(request)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("clients") / "store.sqlite", chat_template=tool_kit.HERMES, context=20_000)
    served.backend.script = model
    with served.running():
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=API_KEY, base_url=served.url + "/v1", timeout=PATIENCE_S, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    url = served.url + "/v1"
    async with openai.AsyncOpenAI(api_key=API_KEY, base_url=url, timeout=PATIENCE_S, max_retries=0) as client:
        yield client
