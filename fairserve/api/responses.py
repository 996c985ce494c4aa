"""What callers of ``/v1/responses`` get: items, whole or as typed events in OpenAI's order.

::

    response.created, response.in_progress                       with the first output, so that a refusal is a 429
      the events of each item: :mod:`fairserve.api.responses_output`
    response.completed | response.incomplete | response.failed   the last; there is no [DONE]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fairserve.api.answers import Job, TokenText
from fairserve.api.http_errors import Problem
from fairserve.api.responses_output import Event, Items
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.streaming import _to_json
from fairserve.api.tool_answers import NewParser
from fairserve.engine.request import RequestOutput

Json = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]
ONLY = 0
"""Index of the one sequence."""


class ResponsesAnswer:
    """Shapes the one sequence of a job. While streaming it keeps the items, which the last events repeat.

    ``new_parser``: as for a chat that may call functions; None where there are none.
    """

    def __init__(self, body: ResponsesRequest, job: Job, token_text: TokenText, new_parser: NewParser | None) -> None:
        self._body = body
        self._job = job
        tail = job.response_id.partition("-")[2]
        self._id = f"resp_{tail}"
        self._items = Items(tail, token_text, None if new_parser is None else new_parser(job.stream))
        self._num_events = 0
        self._last: RequestOutput | None = None

    # -- whole --------------------------------------------------------------------------------------------------------

    def whole(self, outputs: Mapping[int, RequestOutput]) -> Json:
        """The complete answer; ``outputs`` holds everything that was generated."""
        output = outputs[ONLY]
        self._items.push(output.text, output.logprobs)
        self._items.finish(_is_cut(output))
        return self._ended(output)

    # -- as events: ``streaming.Framing`` -----------------------------------------------------------------------------

    def of(self, batch: Mapping[int, RequestOutput]) -> bytes:
        """Of the next output; the first one opens the response."""
        output = batch[ONLY]
        opening = b"" if self._last is not None else self._begin()
        self._last = output
        return opening + self._framed(self._items.push(output.text, output.logprobs))

    def end(self, last: Mapping[int, RequestOutput]) -> bytes:
        output = last[ONLY]
        events = self._items.finish(_is_cut(output))
        whole = self._ended(output)
        return self._framed([*events, (whole["status"], {"response": whole})])

    def failed(self, problem: Problem) -> bytes:
        """It ended after the first byte: the last event says why, with what there is of the items."""
        opening = b"" if self._last is not None else self._begin()
        error = {"code": "server_error", "message": problem.message}
        usage = None if self._last is None else self._usage(self._last)
        response = self._response("failed", self._items.so_far()) | {"error": error, "usage": usage}
        return opening + self._framed([("failed", {"response": response})])

    def _begin(self) -> bytes:
        begun = {"response": self._response("in_progress", [])}
        return self._framed([("created", begun), ("in_progress", begun)])

    def _framed(self, events: Iterable[Event]) -> bytes:
        return b"".join([self._event(f"response.{kind}", fields) for kind, fields in events])

    def _event(self, kind: str, fields: Json) -> bytes:
        numbered = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {_to_json(numbered)}\n\n".encode()

    # -- objects ------------------------------------------------------------------------------------------------------

    def _ended(self, output: RequestOutput) -> Json:
        is_cut = _is_cut(output)
        why = {"incomplete_details": {"reason": "max_output_tokens"}} if is_cut else {}
        response = self._response("incomplete" if is_cut else "completed", self._items.so_far())
        return response | why | {"usage": self._usage(output)}

    def _usage(self, output: RequestOutput) -> Json:
        num_input, num_output = self._job.requests[ONLY].num_input, output.usage.num_output
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": output.usage.num_cached, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        }

    def _response(self, status: Status, output: list[Json]) -> Json:
        body, job = self._body, self._job
        return {
            "id": self._id,
            "object": "response",
            "created_at": job.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": job.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": job.service_tier,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format, "verbosity": "medium"},
            "tool_choice": body.tool_choice.told,
            "tools": [tool.as_told for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _is_cut(output: RequestOutput) -> bool:
    return output.finish_reason != "stop"
