"""What callers of ``/v1/responses`` get: one message, whole or as typed events in OpenAI's order.

::

    response.created, response.in_progress                       with the first output, so that a refusal is a 429
      response.output_item.added, response.content_part.added
        response.output_text.delta ...
      response.output_text.done, response.content_part.done, response.output_item.done
    response.completed | response.incomplete | response.failed   the last; there is no [DONE]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fairserve.api.answers import Job
from fairserve.api.http_errors import Problem
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.streaming import _to_json
from fairserve.engine.request import RequestOutput

Json = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]
ONLY = 0
"""Index of the one item, and of its one part."""


class ResponsesAnswer:
    """Shapes the one sequence of a job. While streaming it keeps the text, which the last events repeat."""

    def __init__(self, body: ResponsesRequest, job: Job) -> None:
        self._body = body
        self._job = job
        tail = job.response_id.partition("-")[2]
        self._id, self._item_id = f"resp_{tail}", f"msg_{tail}"
        self._text: list[str] = []
        self._num_events = 0
        self._last: RequestOutput | None = None

    # -- whole --------------------------------------------------------------------------------------------------------

    def whole(self, outputs: Mapping[int, RequestOutput]) -> Json:
        """The complete answer; ``outputs`` holds everything that was generated."""
        output = outputs[ONLY]
        return self._ended(output.text, output)

    # -- as events: ``streaming.Framing`` -----------------------------------------------------------------------------

    def of(self, batch: Mapping[int, RequestOutput]) -> bytes:
        """Of the next output; the first one opens all that is to be closed."""
        output = batch[ONLY]
        data = b"" if self._last is not None else self._begin()
        self._last = output
        if output.text:
            self._text.append(output.text)
            data += self._event("response.output_text.delta", self._place | {"delta": output.text, "logprobs": []})
        return data

    def end(self, last: Mapping[int, RequestOutput]) -> bytes:
        text, output = "".join(self._text), last[ONLY]
        whole = self._ended(text, output)
        item = whole["output"][ONLY]
        return b"".join(
            [
                self._event("response.output_text.done", self._place | {"text": text, "logprobs": []}),
                self._event("response.content_part.done", self._place | {"part": _part(text)}),
                self._event("response.output_item.done", {"output_index": ONLY, "item": item}),
                self._event(f"response.{whole['status']}", {"response": whole}),
            ]
        )

    def failed(self, problem: Problem) -> bytes:
        """It ended after the first byte: the last event says why, with what there is of the text."""
        items = [self._item("".join(self._text), "incomplete")] if self._last is not None else []
        error = {"code": "server_error", "message": problem.message}
        usage = None if self._last is None else self._usage(self._last)
        response = self._response("failed", items) | {"error": error, "usage": usage}
        return self._event("response.failed", {"response": response})

    def _begin(self) -> bytes:
        begun = {"response": self._response("in_progress", [])}
        item = self._item(None, "in_progress")
        return b"".join(
            [
                self._event("response.created", begun),
                self._event("response.in_progress", begun),
                self._event("response.output_item.added", {"output_index": ONLY, "item": item}),
                self._event("response.content_part.added", self._place | {"part": _part("")}),
            ]
        )

    def _event(self, kind: str, fields: Json) -> bytes:
        numbered = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {_to_json(numbered)}\n\n".encode()

    @property
    def _place(self) -> Json:
        return {"item_id": self._item_id, "output_index": ONLY, "content_index": ONLY}

    # -- objects ------------------------------------------------------------------------------------------------------

    def _ended(self, text: str, output: RequestOutput) -> Json:
        is_cut = output.finish_reason != "stop"
        status: Status = "incomplete" if is_cut else "completed"
        why = {"incomplete_details": {"reason": "max_output_tokens"}} if is_cut else {}
        return self._response(status, [self._item(text, status)]) | why | {"usage": self._usage(output)}

    def _item(self, text: str | None, status: Status) -> Json:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

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
            "model": job.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
