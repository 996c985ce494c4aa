"""Answers of /v1/responses as they came over the wire, held against the types of the ``openai`` package: its client
makes objects of whatever comes, and checks nothing itself."""

from __future__ import annotations

from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.api.tool_kit import TIME, WEATHER

PATH = "/v1/responses"
TOOLS: list[dict[str, Any]] = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
"""Flat, as this route has them."""
_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def answer_of(answer: httpx.Response) -> Response:
    assert answer.status_code == 200, answer.text
    return Response.model_validate_json(answer.content, strict=True)


def events_of(answer: httpx.Response) -> list[Any]:
    """Each is named, numbered, and what its type says."""
    assert answer.status_code == 200, answer.text
    events = []
    for number, block in enumerate(answer.text.strip().split("\n\n")):
        named, data = block.split("\n")
        event = _EVENTS.validate_json(data.removeprefix("data: "), strict=True)
        assert (event.type, event.sequence_number) == (named.removeprefix("event: "), number)
        events.append(event)
    return events


def kinds_of(events: list[Any]) -> list[str]:
    """Types without ``response.``; deltas that follow each other count once."""
    kinds = [event.type.removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if not kind.endswith(".delta") or kinds[i - 1] != kind]
