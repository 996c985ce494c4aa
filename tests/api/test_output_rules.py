"""What callers ask of the output itself, through the unmodified openai package, down to a real engine."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import openai
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from fairserve.api.output_rules import bad_words
from fairserve.api.served_model import ServedModel
from fairserve.api.service import OpenAIService
from fairserve.config import FairServeArgs
from fairserve.engine.request import GenerateRequest, Grammar, RequestOutput, failure
from tests.api.conftest import CONTEXT, MODEL, app_of, http_of
from tests.api.scripted import ScriptedBackend, byte_tokenizer
from tests.engine.support import Driver, drive, prepare, tiny

TOKENIZER = byte_tokenizer()
HI = [{"role": "user", "content": "hi"}]
NUMBERS = Grammar("regex", "[0-9]+")


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


class Person(BaseModel):
    name: str = Field(max_length=6)
    pets: list[Pet] = Field(max_length=2)
    boss: str | None = Field(max_length=3)


class EngineBackend:
    """A real engine in the event loop: whoever waits for an output makes a step."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._outputs: dict[str, deque[RequestOutput]] = {}

    async def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        mine = self._outputs[request.request_id] = deque()
        self._driver.add(request)
        while True:
            while not mine:
                for output in self._driver.step().outputs:
                    self._outputs[output.request_id].append(output)
            output = mine.popleft()
            if output.finish_reason == "error":
                raise failure(output)
            yield output
            if output.finish_reason is not None:
                return

    async def health(self) -> dict[str, Any]:
        return {"ready": True}


@pytest.fixture(scope="module")
def loaded() -> Any:
    model = tiny("llama", vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id, max_position_embeddings=256)
    return prepare(model, tokenizer=TOKENIZER)


@pytest.fixture
async def real(loaded: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    backend = EngineBackend(drive(loaded, kv_cache_tokens=2048))
    service = OpenAIService(
        (args := FairServeArgs(served_model_name=MODEL)),
        [ServedModel(args, backend, TOKENIZER, CONTEXT)],
        environ={},
    )
    async with http_of(app_of(service)) as http:
        yield openai.AsyncOpenAI(api_key="alice", base_url="http://fairserve/v1", http_client=http, max_retries=0)


# -- down to a real engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1])
async def test_parse_gives_a_pydantic_object(real: openai.AsyncOpenAI, temperature: int) -> None:
    answer = await real.chat.completions.parse(
        model=MODEL,
        messages=HI,
        response_format=Person,
        temperature=temperature,
        seed=1,
        n=3,
        logit_bias={_id(space): -100 for space in " \n\r\t"},  # random weights would like many
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    for choice in answer.choices:
        person = choice.message.parsed
        assert isinstance(person, Person)
        assert json.loads(choice.message.content or "") == person.model_dump()


async def test_a_stream_is_parsed_too(real: openai.AsyncOpenAI) -> None:
    async with real.chat.completions.stream(model=MODEL, messages=HI, response_format=Pet, temperature=0) as stream:
        kinds = {event.type async for event in stream}
        answer = await stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Pet)
    assert "content.delta" in kinds


async def test_an_output_that_max_tokens_cuts_says_so(real: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        await real.chat.completions.parse(model=MODEL, messages=HI, response_format=Person, max_tokens=4)


async def test_any_json_object(real: openai.AsyncOpenAI) -> None:
    answer = await real.chat.completions.create(
        model=MODEL, messages=HI, response_format={"type": "json_object"}, logit_bias={_id("}"): 100}, temperature=0
    )
    assert json.loads(answer.choices[0].message.content or "") == {}


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_choice": ["left", "right"]},
        {"guided_regex": "left|right"},
        {"guided_grammar": 'start: "left" | "right"'},
        {"guided_grammar": 'root ::= "left" | "right"'},
        {"guided_json": {"enum": ["left", "right"]}},
        {"guided_json": '{"enum": ["left", "right"]}'},
        {"structured_outputs": {"choice": ["left", "right"]}},
        {"structured_outputs": {"regex": "left|right", "json": None}},
        {"structured_outputs": {"grammar": 'start: "left" | "right"'}},
        {"structured_outputs": {"json": {"enum": ["left", "right"]}}},
    ],
    ids=str,
)
async def test_vllms_ways_to_ask(real: openai.AsyncOpenAI, extra: dict[str, Any]) -> None:
    answer = await real.completions.create(model=MODEL, prompt="a", extra_body=extra, temperature=0)
    assert answer.choices[0].text.strip('"') in ("left", "right")
    assert answer.choices[0].finish_reason == "stop"


async def test_biases_allowed_tokens_bad_words_and_a_least_length(real: openai.AsyncOpenAI) -> None:
    async def text(**given: Any) -> str:
        extra = {name: given.pop(name) for name in [*given] if name not in ("logit_bias",)}
        answer = await real.completions.create(
            model=MODEL, prompt="a", max_tokens=6, temperature=0, extra_body=extra, **given
        )
        return answer.choices[0].text

    assert await text(logit_bias={_id("x"): 100}) == "xxxxxx"
    assert set(await text(allowed_token_ids=[_id("y"), _id("z")])) <= {"y", "z"}
    assert await text(logit_bias={_id("x"): 100, _id("y"): 90}, bad_words=["xx"]) == "xyxyxy"
    eos = TOKENIZER.eos_token_id
    assert await text(logit_bias={eos: 100, _id("x"): 90}) == ""
    assert await text(logit_bias={eos: 100, _id("x"): 90}, min_tokens=4) == "xxxx"
    assert await text(logit_bias={_id("x"): 100}, stop=["x"], min_tokens=4) == "xxxx"


async def test_what_leaves_nothing_to_draw_is_the_callers_mistake(real: openai.AsyncOpenAI) -> None:
    extra = {"guided_regex": "[0-9]+", "allowed_token_ids": [_id("y")]}
    with pytest.raises(openai.BadRequestError, match="leave none"):
        await real.completions.create(model=MODEL, prompt="a", extra_body=extra)


def _id(letter: str) -> int:
    return TOKENIZER.encode(letter)[0]


# -- what the engine is asked, and what is refused ---------------------------------------------------------------------


async def asked(http: httpx.AsyncClient, backend: ScriptedBackend, **fields: Any) -> GenerateRequest:
    answer = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": HI, **fields})
    assert answer.status_code == 200, answer.text
    return backend.requests[-1]


async def test_every_rule_reaches_the_engine(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    one = await asked(
        http,
        backend,
        guided_regex=NUMBERS.text,
        logit_bias={"3": -1, "4": 2.5},
        allowed_token_ids=[3, 4],
        bad_words=["ab"],
        min_tokens=2,
    )
    p = one.sampling
    assert (p.grammar, p.logit_bias, p.allowed_token_ids, p.min_tokens) == (NUMBERS, ((3, -1.0), (4, 2.5)), (3, 4), 2)
    assert p.bad_words == (tuple(TOKENIZER.encode("ab")),)


async def test_properties_keep_their_order(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    schema = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"type": "null"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True, "description": None}}
    one = await asked(http, backend, response_format=form)
    assert one.sampling.grammar == Grammar("json_schema", json.dumps(schema, separators=(",", ":")))


@pytest.mark.parametrize(
    "neutral", [{"response_format": {"type": "text"}}, {"logit_bias": {}}, {"logit_bias": None}, {"guided_json": None}]
)
async def test_what_asks_for_nothing_changes_nothing(
    http: httpx.AsyncClient, backend: ScriptedBackend, neutral: dict[str, Any]
) -> None:
    plain = (await asked(http, backend)).sampling
    assert (await asked(http, backend, **neutral)).sampling == plain


def test_a_bad_word_is_looked_for_with_and_without_a_space_before_it() -> None:
    ids = {"ab": [1], " ab": [2], "cd": [3], " cd": [9, 3]}

    class Words:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return ids[text]

    assert bad_words(Words(), ["ab", "cd", "ab"]) == ((1,), (2,), (3,))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    ({"response_format": "json_object"}, "response_format", "must be an object"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "unknown field 'x'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be an object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "1 to 64 characters",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format",
        'Unimplemented keys: ["not"]',
    ),
    ({"guided_json": {"type": "objec"}}, "guided_json", "Invalid type: objec"),
    ({"guided_json": "{"}, "guided_json", "is not JSON"),
    ({"guided_json": {"title": "x" * 70_000}}, "guided_json", "at most 65536 are allowed"),
    ({"guided_regex": "a" * 5_000}, "guided_regex", "at most 4096 are allowed"),
    ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
    ({"guided_regex": 5}, "guided_regex", "must be a string"),
    ({"guided_choice": []}, "guided_choice", "with one at least"),
    ({"guided_choice": ["a", None]}, "guided_choice", "a list of strings"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar", "neither Lark nor GBNF"),
    ({"guided_grammar": "root ::= " + "(" * 6_000}, "guided_grammar", "neither Lark nor GBNF"),
    ({"structured_outputs": {}}, "structured_outputs", "give one of them"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "give one of them"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "must be true"),
    (
        {"structured_outputs": {"structural_tag": "x"}},
        "structured_outputs.structural_tag",
        "unknown field 'structural_tag'",
    ),
    (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
        "together with response_format",
    ),
    ({"logit_bias": {"999": 1}}, "logit_bias", "must be below 257"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "-100 to 100"),
    ({"logit_bias": {"1": True}}, "logit_bias.1", "-100 to 100"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    ({"allowed_token_ids": [257]}, "allowed_token_ids", "must be below 257"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ({"bad_words": [""]}, "bad_words[0]", "at least 1"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must be at most 8"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG, ids=lambda one: str(one)[:60])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_wrong_rule_is_refused_with_its_field_and_the_reason(
    http: httpx.AsyncClient, backend: ScriptedBackend, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": MODEL, **({"messages": HI} if path[:4] == "chat" else {"prompt": "hi"}), **fields}
    answer = await http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert said in error["message"], error
    assert len(error["message"]) < 700
    assert backend.requests == []


async def test_a_number_too_long_to_write_down_is_refused(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    body = '{"model": "tiny", "prompt": "hi", "guided_json": {"const": ' + "9" * 5_000 + "}}"
    answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert backend.requests == []


def test_the_description_knows_the_new_fields(app: FastAPI) -> None:
    properties = app.openapi()["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"response_format", "structured_outputs", "guided_json", "logit_bias", "min_tokens"} <= properties.keys()
    assert "json_schema" in json.dumps(properties["response_format"])
