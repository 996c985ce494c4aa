"""The OpenAI API as a plain object: no Ray, no HTTP server; a test hands it a scripted backend."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fairserve.api import output_rules
from fairserve.api.answers import Answer, ChatAnswer, CompletionAnswer, Job
from fairserve.api.echo import EchoAnswer
from fairserve.api.embeddings import EmbeddingAnswer, EmbeddingRequest
from fairserve.api.identity import OPEN_WARNING, Client, Headers, Identities
from fairserve.api.labels import NO_LABELS, Labels
from fairserve.api.merging import Batch, merged
from fairserve.api.openai_schema import ChatRequest, CompletionRequest
from fairserve.api.request_metrics import RequestMeter, RequestMetrics
from fairserve.api.responses import ResponsesAnswer
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.served_model import ServedModel
from fairserve.api.tokenizing import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from fairserve.api.tool_answers import ToolAnswer
from fairserve.clock import Clock, SystemClock
from fairserve.cluster.tracing import NO_TRACING, REQUEST, Tracer
from fairserve.config import FairServeArgs
from fairserve.engine.request import GenerateRequest, Grammar
from fairserve.errors import InvalidRequest, PromptTooLong, RequestTimeout, UnknownModel

logger = logging.getLogger(__name__)

Generation = ChatRequest | CompletionRequest | EmbeddingRequest
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions."""
HEALTH_TIMEOUT_S = 2.0
MAX_SCORES = 1_000_000
"""Log probabilities of prompts' tokens, alternatives included, in one answer: each takes about 200 bytes on the way."""
PARAMS: dict[type, str] = {ChatRequest: "messages", CompletionRequest: "prompt", EmbeddingRequest: "input"}
"""What each kind of body calls its prompts."""
ID_PREFIXES: dict[type, str] = {ChatRequest: "chatcmpl", CompletionRequest: "cmpl", EmbeddingRequest: "embd"}


class OpenAIService:
    """Authenticates, tokenizes, generates and answers.

    Args:
        args: the configuration; its clear-text keys are hashed and not kept.
        models: what is served, the first model of the configuration first.
        environ: where FAIRSERVE_API_KEYS may be.
        unix_time_s: for the ``created`` fields.
        timeout: makes the context manager that ends a request after so many seconds.
        tracer: what records a span of each request.
        clock: for how long requests take.

    Raises:
        ConfigError: the API keys are wrong.
    """

    def __init__(
        self,
        args: FairServeArgs,
        models: Sequence[ServedModel],
        *,
        environ: Mapping[str, str] = os.environ,
        unix_time_s: Callable[[], float] = time.time,
        timeout: Callable[[float], asyncio.Timeout] = asyncio.timeout,
        tracer: Tracer = NO_TRACING,
        clock: Clock | None = None,
    ) -> None:
        self._models = tuple(models)
        self._names = {name: one for one in models for name in one.adapters}
        """What clients may ask for: models and their LoRA adapters."""
        self.model_name = models[0].name
        """Of the first one."""
        self.max_body_bytes = args.api.max_body_bytes
        self.read_timeout_s = args.api.read_timeout_s
        self.keep_alive_s = args.api.keep_alive_s
        self._limits = args.api.model_copy(update={"keys": (), "admin_keys": ()})
        self.deployed = self._identities = Identities.from_config(args.api, environ)
        """Who has a key of the deployment."""
        self._unix_time_s = unix_time_s
        self._timeout = timeout
        self._tracer = tracer
        self.clock = clock or SystemClock()
        self._metrics = {one.name: RequestMetrics(one.metrics, args.metrics.top_clients, self.clock) for one in models}
        self._started_s = int(unix_time_s())

    @property
    def is_open(self) -> bool:
        """There is no API key: anybody may call."""
        return self._identities.is_open

    def adopt(self, identities: Identities) -> None:
        """From the next request on, these are the callers."""
        self._identities = identities

    def identify(self, headers: Headers) -> Client:
        """The caller of a request; see :meth:`Identities.identify`."""
        return self._identities.identify(headers)

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        return [one.entry(name, self._started_s) for name, one in self._names.items()]

    def model(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            UnknownModel: no model of this name is served.
        """
        return self._served(name).entry(name, self._started_s)

    async def health(self) -> dict[str, Any]:
        """The body of /health; ``ready``, which is true when any model is, decides between 200 and 503."""
        models = await asyncio.gather(*map(_health_of, self._models))
        body: dict[str, Any] = {**models[0], "ready": any(one["ready"] for one in models), "model": self.model_name}
        if len(models) > 1:
            body["models"] = {one.name: health for one, health in zip(self._models, models, strict=True)}
        if self._identities.is_open:
            return body | {"mode": "open", "warning": OPEN_WARNING}
        return body | {"mode": "keyed"}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """See :func:`fairserve.api.tokenizing.tokenized`."""
        served = self._served(body.model or self.model_name)
        return await tokenized(body, served.prompts, served.max_model_len)

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """See :func:`fairserve.api.tokenizing.detokenized`."""
        return await detokenized(body, self._served(body.model or self.model_name).prompts)

    def meter(self, client: Client, model: str, trace: str = "") -> RequestMeter:
        """Begin to measure a request of this client for a model, which may not be known; ``trace``: the caller's
        traceparent."""
        name = self._names[model].name if model in self._names else self.model_name
        span = self._tracer.begin(REQUEST, trace, client=client.name, model=name)
        return RequestMeter(self._metrics[name], client.name, span)

    async def job(self, body: Generation, client: Client, labels: Labels = NO_LABELS, trace: str = "") -> Job:
        """Check and tokenize a request: everything that can be the caller's mistake shows here.

        All its sequences carry the same ``labels``: one HTTP request is one call of its interaction. ``trace``: the
        traceparent that their spans belong below.

        Raises:
            UnknownModel, InvalidRequest, PromptTooLong: see :mod:`fairserve.errors`.
        """
        served = self._served(body.model)
        if isinstance(body, EmbeddingRequest) and served.pooling is None:
            detail = "this model makes no embeddings: its setting engine.pooling is off (mean and last make them)"
            raise InvalidRequest(detail, code="embeddings_off")
        shaped = served.chats.shaped(body)
        await output_rules.check(body, served.prompts.num_tokens, shaped)
        if isinstance(body, ChatRequest):
            self._check_choices(1, body.n)
            how = served.chats.rendering(body)
            prompts: Sequence[tuple[int, ...]] = [await served.prompts.of_chat(body.messages, how)]
            client, tier = client.at_tier(body.service_tier, self._limits.service_tiers)
        else:
            self._check_choices(len(body.prompt), body.n, "input" if isinstance(body, EmbeddingRequest) else "n")
            prompts = await served.prompts.of_prompts(body.prompt, PARAMS[type(body)])
            tier = ""
        _check_scores(body, sum(map(len, prompts)))
        response_id = f"{ID_PREFIXES[type(body)]}-{secrets.token_hex(16)}"
        return Job(
            response_id=response_id,
            created_s=int(self._unix_time_s()),
            model=body.model,
            requests=tuple(self._requests(served, response_id, body, client, labels, prompts, shaped, trace)),
            n=body.n,
            stream=body.stream,
            include_usage=body.include_usage,
            usage_in_chunks=body.usage_in_chunks,
            prompt_logprobs=body.prompt_logprobs,
            fingerprint=served.fingerprints[body.model],
            service_tier=tier if isinstance(body, ChatRequest) and body.service_tier else None,
        )

    async def answer(self, body: Generation | ResponsesRequest, job: Job) -> Answer | ResponsesAnswer:
        """What shapes the outputs of the job that ``body`` asked for."""
        served = self._served(job.model)
        token_text = served.prompts.token_text
        match body:
            case ResponsesRequest():
                toolbox = body.as_chat().toolbox
                parsers = None if toolbox is None else served.chats.parsers(toolbox)
                return ResponsesAnswer(body, job, token_text, parsers)
            case EmbeddingRequest():
                return EmbeddingAnswer(job, token_text, body.encoding_format)
            case CompletionRequest():
                if body.echo:
                    return EchoAnswer(job, token_text, await served.prompts.texts(body.prompt))
                return CompletionAnswer(job, token_text)
            case ChatRequest():
                if (toolbox := body.toolbox) is not None:
                    return ToolAnswer(job, token_text, served.chats.parsers(toolbox))
                return ChatAnswer(job, token_text)

    def generate(self, job: Job) -> AsyncGenerator[Batch, None]:
        """Run all sequences of a job at once. Close it (``aclosing``): that cancels what still runs."""
        backend = self._served(job.model).backend
        return merged([backend.generate(request) for request in job.requests])

    @asynccontextmanager
    async def deadline(self) -> AsyncIterator[None]:
        """
        Raises:
            RequestTimeout: the block took longer than request_timeout_s, and was cancelled.
        """
        timeout = self._timeout(self._limits.request_timeout_s)
        try:
            async with timeout:
                yield
        except TimeoutError:
            if timeout.expired():
                raise RequestTimeout(self._limits.request_timeout_s) from None
            raise

    def _check_choices(self, num_prompts: int, n: int, param: str = "n") -> None:
        most = self._limits.max_choices
        if num_prompts * n > most:
            asked = f"n = {n}" if num_prompts == 1 else f"{num_prompts} prompts with n = {n}"
            detail = f"{param}: {asked[:64]} asks for more than {most} sequences, the most that one request may have"
            code = "integer_above_max_value" if param == "n" else "array_above_max_length"
            raise InvalidRequest(detail, param=param, code=code)

    def _served(self, name: str) -> ServedModel:
        """
        Raises:
            UnknownModel: no model of this name is served.
        """
        if name not in self._names:
            raise UnknownModel(name[:128], ", ".join(self._names))
        return self._names[name]

    def _requests(
        self,
        served: ServedModel,
        response_id: str,
        body: Generation,
        client: Client,
        labels: Labels,
        prompts: Sequence[tuple[int, ...]],
        shaped: Mapping[str, Grammar],
        trace: str,
    ) -> list[GenerateRequest]:
        requests: list[GenerateRequest] = []
        bad_words = served.prompts.bad_words(body.bad_words)
        for prompt in prompts:
            max_tokens = self._max_output(body, len(prompt), served.max_model_len)
            for choice in range(body.n):
                request = GenerateRequest(
                    request_id=f"{response_id}-{len(requests)}",
                    client=client.name,
                    prompt_token_ids=prompt,
                    sampling=served.chats.sampling(
                        body, replace(body.sampling(max_tokens, choice), bad_words=bad_words), shaped
                    ),
                    weight=client.weight,
                    max_waiting=client.max_waiting,
                    application=labels.application,
                    interaction=labels.interaction,
                    call_index=labels.call_index,
                    trace=trace,
                    pooling=served.pooling if isinstance(body, EmbeddingRequest) else None,
                    budgets=client.budgets,
                    adapter=served.adapters[body.model],
                )
                requests.append(request)
        return requests

    def _max_output(self, body: Generation, num_prompt: int, max_model_len: int) -> int:
        is_chat = isinstance(body, ChatRequest)
        left = max_model_len - num_prompt
        asked = body.asked_output
        if left < (1 if asked is None else asked):
            raise PromptTooLong(num_prompt, 1 if asked is None else asked, max_model_len, PARAMS[type(body)])
        if body.min_tokens > (most := left if asked is None else asked):
            detail = f"min_tokens: must be at most {most}, the most tokens that this output may have"
            raise InvalidRequest(detail, param="min_tokens", code="integer_above_max_value")
        if asked is not None:
            return asked
        return min(left, self._limits.default_max_tokens or (left if is_chat else COMPLETION_MAX_TOKENS))


def _check_scores(body: Generation, num_prompt: int) -> None:
    num_top = body.asked_prompt_logprobs
    if num_top is not None and (num := num_prompt * body.n * (1 + num_top)) > MAX_SCORES:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(
            f"{param}: {num} log probabilities of prompt tokens are asked for, at most {MAX_SCORES} come in an answer: "
            "send fewer prompts, or ask for fewer alternatives or choices",
            param=param,
        )


async def _health_of(one: ServedModel) -> dict[str, Any]:
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            health = await one.backend.health()
    except Exception as error:
        logger.warning("the health of model %s is unknown: %r", one.name, error)
        health = {"ready": False}
    return health | {"ready": bool(health.get("ready"))}
