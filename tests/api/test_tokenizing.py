"""Tokenizing for callers, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.conftest import CONTEXT, MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_prompt_comes_back_as_tokens_and_as_text_again(http: httpx.AsyncClient, tokenizer: Any) -> None:
    text = "Zoë counts " * 40
    answer = await http.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True})
    tokens = tokenizer.encode(text)
    assert answer.json() == {
        "count": len(tokens),
        "max_model_len": CONTEXT,
        "tokens": tokens,
        "token_strs": tokenizer.convert_ids_to_tokens(tokens),
    }
    assert len(tokens) > CONTEXT, "it may be longer than what a request may hold"
    answer = await http.post("/detokenize", json={"tokens": tokens})
    assert answer.json() == {"prompt": text}


async def test_messages_are_written_by_the_chat_template(http: httpx.AsyncClient, tokenizer: Any) -> None:
    for begins_turn in (True, False):
        answer = await http.post("/tokenize", json={"messages": MESSAGES, "add_generation_prompt": begins_turn})
        body = answer.json()
        wanted = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=begins_turn)
        assert tokenizer.decode(body["tokens"]) == wanted
        assert body["token_strs"] is None


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        ({"prompt": "x"}, True),
        ({"prompt": "x", "add_special_tokens": False}, False),
        ({"messages": MESSAGES}, False),
        ({"messages": MESSAGES, "add_special_tokens": True}, True),
    ],
)
async def test_special_tokens_are_added_to_a_text_and_not_to_what_a_template_wrote_unless_told(
    make_service: ServiceMaker, tokenizer: Any, asked: dict[str, Any], added: bool
) -> None:
    class Marking:
        chat_template = tokenizer.chat_template
        __len__ = tokenizer.__len__
        decode = staticmethod(tokenizer.decode)
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0] * add_special_tokens + list(tokenizer.encode(text, add_special_tokens=False))

    class Sized(Marking):
        def __len__(self) -> int:
            return len(tokenizer)

    async with http_of(app_of(make_service(tokenizer=Sized())), authorization="Bearer alice") as http:
        body = (await http.post("/tokenize", json=asked)).json()
    assert (body["tokens"][0] == 0) == added


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "give exactly one of prompt and messages"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "give exactly one of prompt and messages"),
        ("/tokenize", {"prompt": ["x"]}, "prompt: Input should be a valid string"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "not served here"),
        ("/tokenize", {"prompt": "x", "tools": [{}]}, "tools: is not supported yet"),
        ("/detokenize", {"tokens": [257]}, "tokens: token ids must be below 257"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]: Input should be greater than or equal to 0"),
        ("/detokenize", {"token": [1]}, "did you mean 'tokens'?"),
    ],
)
async def test_what_cannot_be_is_refused(http: httpx.AsyncClient, path: str, body: dict[str, Any], said: str) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/embeddings"])
async def test_a_key_is_asked_for_before_the_body_is_read_and_bodies_are_bounded(
    make_service: ServiceMaker, backend: ScriptedBackend, path: str
) -> None:
    app = app_of(make_service(keys=[{"client": "alice", "key": "alice-secret"}], max_body_bytes=50))
    async with http_of(app, **{"content-type": "application/json"}) as http:
        assert (await http.post(path, content=b"{")).status_code == 401
        http.headers["authorization"] = "Bearer alice-secret"
        assert (await http.post(path, content=b"{")).json()["error"]["code"] == "invalid_json"
        assert (await http.post(path, json={"prompt": "x" * 50})).status_code == 413


async def test_nothing_of_it_reaches_an_engine(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["count"] == 0
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    assert backend.requests == []
