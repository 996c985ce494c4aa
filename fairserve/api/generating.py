"""From a body to an answer that is being made: one path for HTTP requests and for the lines of batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from starlette.datastructures import Headers

from fairserve.api.answer_headers import AnswerHeaders
from fairserve.api.answers import Answer, Job
from fairserve.api.identity import Client
from fairserve.api.labels import labels_of
from fairserve.api.request_metrics import RequestMeter
from fairserve.api.responses import ResponsesAnswer
from fairserve.api.responses_schema import ResponsesRequest, in_our_words
from fairserve.api.service import Generation, OpenAIService
from fairserve.api.streaming import Batches


@dataclass(frozen=True, slots=True)
class Making:
    """``outputs`` become an ``answer``, below ``meter.watching``. Nothing is asked for before they are."""

    job: Job
    answer: Answer | ResponsesAnswer
    outputs: Batches
    meter: RequestMeter
    headers: AnswerHeaders


async def making(
    service: OpenAIService, body: Generation | ResponsesRequest, client: Client, headers: Headers
) -> Making:
    """Everything that can be the caller's mistake shows here.

    Raises:
        FairServeError: as :meth:`OpenAIService.job`, :func:`labels_of` and ``ResponsesRequest.as_chat``.
    """
    asked = body.as_chat() if isinstance(body, ResponsesRequest) else body
    client = client.of_user(body.user)
    labels = labels_of(headers, body.metadata or {}, client)
    told = AnswerHeaders(service.clock)
    meter = service.meter(client, asked.model, headers.get("traceparent", ""))
    with in_our_words() if isinstance(body, ResponsesRequest) else nullcontext():
        job = await service.job(asked, client, labels, meter.span.traceparent)
    answer = await service.answer(body, job)
    return Making(job, answer, meter.outputs(service.generate(job)), meter, told)
