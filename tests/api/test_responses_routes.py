"""Routes of stored responses, of which there are none: the package's own errors, for callers with a key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from tests.api.admin_kit import error_of
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.responses_kit import PATH

ID = "resp_0123456789abcdef"
Ask = Callable[[openai.AsyncOpenAI, str], Awaitable[Any]]


async def items_of(client: openai.AsyncOpenAI, name: str) -> Any:
    return [item async for item in client.responses.input_items.list(name)]


WAYS: dict[str, Ask] = {
    "retrieve": lambda client, name: client.responses.retrieve(name),
    "retrieve a stream": lambda client, name: client.responses.retrieve(name, stream=True, starting_after=3),
    "delete": lambda client, name: client.responses.delete(name),
    "cancel": lambda client, name: client.responses.cancel(name),
    "input_items": items_of,
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_was_answered_a_moment_ago_is_not_there_and_the_error_says_why(
    client: openai.AsyncOpenAI, way: str
) -> None:
    answered = await client.responses.create(model=MODEL, input="hi", store=True)
    for name in (answered.id, ID):
        with pytest.raises(openai.NotFoundError, match="stores none") as caught:
            await WAYS[way](client, name)
        assert (caught.value.param, caught.value.code) == ("response_id", "response_not_found")
        assert caught.value.type == "invalid_request_error" and name in str(caught.value)


async def test_strangers_learn_nothing_and_other_methods_are_405(make_service: ServiceMaker) -> None:
    keys = [{"client": "ann", "key": "fs-ann-secret"}]
    async with http_of(app_of(make_service(keys=keys))) as http:
        for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            error_of(await http.request(method, f"{PATH}/{ID}{tail}"), 401)
        error_of(await http.put(f"{PATH}/{ID}"), 405)


async def test_going_on_from_an_earlier_answer_is_refused_by_openais_code(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send the whole conversation in 'input'") as caught:
        await client.responses.create(model=MODEL, input="hi", previous_response_id=ID)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
