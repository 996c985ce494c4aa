"""What callers of /v1/files and /v1/batches may send, beside the files themselves."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from starlette.requests import Request

from fairserve.api.batches.lines import ENDPOINTS
from fairserve.api.body_errors import invalid, refuse
from fairserve.api.openai_schema import MAX_KEY_CHARS, MAX_PAIRS, MAX_VALUE_CHARS, Body
from fairserve.errors import InvalidRequest

MIN_KEEP_S, MAX_KEEP_S = 3_600, 2_592_000
WINDOW = "24h"
WINDOW_S = 86_400
Id = Annotated[str, Field(min_length=1, max_length=128)]
Seconds = Annotated[int, Field(ge=MIN_KEEP_S, le=MAX_KEEP_S)]
Pairs = dict[
    Annotated[str, Field(max_length=MAX_KEY_CHARS)],
    Annotated[str, Field(max_length=MAX_VALUE_CHARS)],
]


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: Seconds


class BatchRequest(Body):
    """The body of ``POST /v1/batches``."""

    input_file_id: Id
    endpoint: Annotated[str, WithJsonSchema({"enum": list(ENDPOINTS)})]
    """The url of every line."""
    completion_window: Literal["24h"]
    metadata: Annotated[Pairs, Field(max_length=MAX_PAIRS)] | None = None
    """Up to 16 pairs of strings: keys of up to 64 characters, values of up to 512."""
    output_expires_after: ExpiresAfter | None = None
    """When the results expire, from their creation."""

    @field_validator("endpoint")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ENDPOINTS:
            raise refuse("wrong_endpoint", f"batches are run for {', '.join(ENDPOINTS)}")
        return value


class FileForm(BaseModel):
    """For the description: the parts of ``POST /v1/files``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    file: Annotated[str, WithJsonSchema({"type": "string", "format": "binary"})]
    """JSON lines, one request each."""
    purpose: Literal["batch"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    """Given with the next, or not at all."""
    seconds: Annotated[Seconds | None, Field(alias="expires_after[seconds]")] = None
    """Seconds from its creation until the file expires."""


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    after: Annotated[str, Field(max_length=128)] | None = None
    """The id that the page before ended with."""


class FilePage(Page):
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    """By time of creation."""
    purpose: Annotated[str, Field(max_length=64)] | None = None


class BatchPage(Page):
    limit: Annotated[int, Field(ge=1, le=100)] = 20


P = TypeVar("P", bound=Page)


def page_of(kind: type[P], request: Request) -> P:
    """The query of a list.

    Raises:
        InvalidRequest: an unknown parameter, one that is given twice, or a wrong value.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in kind.model_fields:
            near = difflib.get_close_matches(name[:64], kind.model_fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kind.model_fields)}"
            detail = f"there is no query parameter {name[:64]!r} here: {hint}"
            raise InvalidRequest(detail, param=name[:64], code="unknown_parameter")
        if name in found:
            raise InvalidRequest(f"query parameter {name!r} is given twice", param=name)
        found[name] = value
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise invalid(error) from None


def parameters(kind: type[Page]) -> list[dict[str, Any]]:
    """The same, described for OpenAPI."""
    properties = kind.model_json_schema()["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": _without_null(schema)}
        for name, schema in properties.items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter is there or it is not."""
    kept = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    return kept[0] if kept else schema


def keep_s_of(fields: dict[str, str]) -> int | None:
    """``expires_after`` of an upload's form, in seconds.

    Raises:
        InvalidRequest: one of its two fields is missing or wrong.
    """
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after[anchor]: must be 'created_at'", param="expires_after[anchor]")
    if seconds is None or not seconds.isascii() or not seconds.isdecimal() or len(seconds) > 9:
        raise InvalidRequest("expires_after[seconds]: must be an integer", param="expires_after[seconds]")
    if not MIN_KEEP_S <= int(seconds) <= MAX_KEEP_S:
        detail = f"expires_after[seconds]: must be from {MIN_KEEP_S} to {MAX_KEEP_S}"
        raise InvalidRequest(detail, param="expires_after[seconds]")
    return int(seconds)
