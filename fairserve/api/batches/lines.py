"""The lines of a batch, in OpenAI's format: ``{"custom_id", "method", "url", "body"}`` in,
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`` out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from fairserve.api.embeddings import EmbeddingRequest
from fairserve.api.openai_schema import ChatRequest, CompletionRequest
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.service import Generation

ENDPOINTS: dict[str, type[Generation] | type[ResponsesRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
}
"""What lines may ask for, and the body of each."""
MAX_ID_CHARS = 512
MAX_PROBLEMS = 100
"""Wrong lines that are told at once."""
AROUND_BODY_BYTES = 4_096
"""What a line may hold beside its body."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One request; ``number`` counts from 1, blank lines included."""

    number: int
    custom_id: str
    body: bytes
    """JSON."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What HTTP would have answered."""

    status: int
    request_id: str
    body: bytes
    """JSON."""

    @property
    def is_ok(self) -> bool:
        return self.status == 200


class Wrong(Exception):
    """A line that is none, as an entry of a batch's ``errors``."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.message, self.param = code, message, param

    def problem(self, number: int | None = None) -> Json:
        return {"code": self.code, "message": self.message, "param": self.param, "line": number}


def read_lines(path: Path, max_body_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and content of each line that is not blank; None for one that is too long, which is never in memory."""
    most = max_body_bytes + AROUND_BODY_BYTES
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(most + 1):
            number += 1
            is_long = len(raw) > most
            while is_long and not raw.endswith(b"\n") and (raw := file.readline(most)):
                pass
            if is_long or raw.strip():
                yield number, None if is_long else raw


def parsed(number: int, raw: bytes | None, endpoint: str) -> Line:
    """
    Raises:
        Wrong: it is no request for ``endpoint``. What its body asks for is checked when its turn comes.
    """
    if raw is None:
        raise Wrong("line_too_long", "The line has more bytes than the body of a request may have.")
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Wrong("invalid_json_line", "The line is not a JSON object.")
    for field, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if field not in data:
            raise Wrong("missing_required_parameter", f"The line has no {field!r}.", field)
        if not isinstance(data[field], kind):
            raise Wrong("invalid_type", f"{field!r} must be {'a string' if kind is str else 'an object'}.", field)
    if unknown := sorted(data.keys() - {"custom_id", "method", "url", "body"}):
        raise Wrong("unknown_parameter", "A line has custom_id, method, url and body, nothing else.", unknown[0][:64])
    if not 0 < len(data["custom_id"]) <= MAX_ID_CHARS:
        raise Wrong("invalid_custom_id", f"'custom_id' must have 1 to {MAX_ID_CHARS} characters.", "custom_id")
    if data["method"] != "POST":
        raise Wrong("invalid_method", "'method' must be 'POST'.", "method")
    if data["url"] != endpoint:
        raise Wrong("url_mismatch", f"'url' must be the batch's endpoint, {endpoint!r}.", "url")
    return Line(number, data["custom_id"], json.dumps(data["body"]).encode())


def checked(path: Path, endpoint: str, max_lines: int, max_body_bytes: int) -> tuple[int, list[Json]]:
    """The number of requests in the file, and what is wrong with it; a file that has anything wrong is not run."""
    problems: list[Json] = []
    first: dict[str, int] = {}
    num_lines = 0
    for number, raw in read_lines(path, max_body_bytes):
        num_lines += 1
        if num_lines > max_lines:
            return num_lines, [Wrong("too_many_tasks", f"A batch may have {max_lines} lines.").problem()]
        try:
            line = parsed(number, raw, endpoint)
            if (earlier := first.setdefault(line.custom_id, number)) != number:
                message = f"The custom_id is that of line {earlier}, too: in a batch each line needs its own."
                raise Wrong("duplicate_custom_id", message, "custom_id")
        except Wrong as wrong:
            problems.append(wrong.problem(number))
            if len(problems) == MAX_PROBLEMS:
                break
    if not num_lines:
        problems.append(Wrong("empty_file", "The file has no line.").problem())
    return num_lines, problems


def answer_line(batch_id: str, line: Line, answered: Answered) -> bytes:
    """The line of the output or error file, with its line break. The body goes through as it is, but for characters
    that Python's ``str.splitlines`` takes for the end of a line: many read such files with it."""
    body = answered.body if answered.body.isascii() else json.dumps(json.loads(answered.body)).encode()
    head = {"id": _line_id(batch_id, line), "custom_id": line.custom_id}
    told = {"status_code": answered.status, "request_id": answered.request_id}
    start = f'{json.dumps(head)[:-1]}, "response": {json.dumps(told)[:-1]}, "body": '
    return start.encode() + body + b'}, "error": null}\n'


def unanswered_line(batch_id: str, line: Line, code: str, message: str) -> bytes:
    """The line of the error file for a request that was not run to its end."""
    head = {"id": _line_id(batch_id, line), "custom_id": line.custom_id, "response": None}
    return json.dumps(head | {"error": {"code": code, "message": message}}).encode() + b"\n"


def _line_id(batch_id: str, line: Line) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{line.number}"
