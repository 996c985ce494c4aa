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
from typing import Any, Protocol

from fairserve.api import output_rules
from fairserve.api.answers import Answer, ChatAnswer, CompletionAnswer, Job
from fairserve.api.chats import Chats, fingerprint_of
from fairserve.api.echo import EchoAnswer
from fairserve.api.embeddings import EmbeddingAnswer, EmbeddingRequest
from fairserve.api.identity import OPEN_WARNING, Client, Headers, Identities
from fairserve.api.labels import NO_LABELS, Labels
from fairserve.api.merging import Batch, merged
from fairserve.api.openai_schema import ChatRequest, CompletionRequest
from fairserve.api.prompts import Prompts, TextTokenizer
from fairserve.api.request_metrics import RequestMeter, RequestMetrics
from fairserve.api.responses import ResponsesAnswer
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.tokenizing import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from fairserve.api.tool_answers import ToolAnswer
from fairserve.clock import Clock, SystemClock
from fairserve.cluster.metrics_sink import NO_METRICS, MetricsSink
from fairserve.cluster.tracing import NO_TRACING, REQUEST, Tracer
from fairserve.config import FairServeArgs
from fairserve.engine.request import GenerateRequest, Grammar, RequestOutput
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


class Backend(Protocol):
    """Where requests go; in production the handle of the model replicas."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """Generate one sequence; the last output carries the finish reason.

        Closing the iterator (``aclose``), or cancelling the task that waits in it, cancels the request at any stage.

        Raises:
            Refused: no room now; raised by the iterator before its first output.
            ReplicaFailed: the replica died or its engine failed.
            ModelFailed: the model failed on this very request.
        """
        ...

    async def health(self) -> dict[str, Any]:
        """``ready`` (bool) and what else is worth showing in /health, such as ``replicas``."""
        ...


class OpenAIService:
    """Authenticates, tokenizes, generates and answers.

    Args:
        args: the configuration; its clear-text keys are hashed and not kept.
        backend: where requests go.
        tokenizer: the served model's.
        max_model_len: tokens of prompt and output together that one request may hold.
        environ: where FAIRSERVE_API_KEYS may be.
        unix_time_s: for the ``created`` fields.
        timeout: makes the context manager that ends a request after so many seconds.
        metrics: where what callers get is counted.
        tracer: what records a span of each request.
        clock: for how long requests take.

    Raises:
        ConfigError: the API keys are wrong.
    """

    def __init__(
        self,
        args: FairServeArgs,
        backend: Backend,
        tokenizer: TextTokenizer,
        max_model_len: int,
        *,
        environ: Mapping[str, str] = os.environ,
        unix_time_s: Callable[[], float] = time.time,
        timeout: Callable[[float], asyncio.Timeout] = asyncio.timeout,
        metrics: MetricsSink = NO_METRICS,
        tracer: Tracer = NO_TRACING,
        clock: Clock | None = None,
    ) -> None:
        self.model_name = args.model_name
        self.max_body_bytes = args.api.max_body_bytes
        self.read_timeout_s = args.api.read_timeout_s
        self.keep_alive_s = args.api.keep_alive_s
        self._pooling = None if args.engine.pooling == "off" else args.engine.pooling
        self._limits = args.api.model_copy(update={"keys": (), "admin_keys": ()})
        self.deployed = self._identities = Identities.from_config(args.api, environ)
        """Who has a key of the deployment."""
        self._backend = backend
        self._prompts = Prompts(tokenizer)
        self._chats = Chats(args, tokenizer, self._prompts.conversations)
        self._max_model_len = max_model_len
        self._unix_time_s = unix_time_s
        self._timeout = timeout
        self._tracer = tracer
        self.clock = clock or SystemClock()
        self._metrics = RequestMetrics(metrics, args.metrics.top_clients, self.clock)
        self._started_s = int(unix_time_s())
        self._fingerprint = fingerprint_of(args)

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
        return [
            {
                "id": self.model_name,
                "object": "model",
                "created": self._started_s,
                "owned_by": "fairserve",
                "max_model_len": self._max_model_len,
            }
        ]

    def check_model(self, name: str) -> None:
        """
        Raises:
            UnknownModel: another model than the served one was asked for.
        """
        if name != self.model_name:
            raise UnknownModel(name[:128], self.model_name)

    async def health(self) -> dict[str, Any]:
        """The body of /health; ``ready`` decides between 200 and 503."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                backend = await self._backend.health()
        except Exception as error:
            logger.warning("the backend's health is unknown: %r", error)
            backend = {"ready": False}
        body = {**backend, "ready": bool(backend.get("ready")), "model": self.model_name}
        if self._identities.is_open:
            return body | {"mode": "open", "warning": OPEN_WARNING}
        return body | {"mode": "keyed"}

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """See :func:`fairserve.api.tokenizing.tokenized`."""
        self.check_model(body.model or self.model_name)
        return await tokenized(body, self._prompts, self._max_model_len)

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """See :func:`fairserve.api.tokenizing.detokenized`."""
        self.check_model(body.model or self.model_name)
        return await detokenized(body, self._prompts)

    def meter(self, client: Client, trace: str = "") -> RequestMeter:
        """Begin to measure a request of this client; ``trace``: the caller's traceparent."""
        span = self._tracer.begin(REQUEST, trace, client=client.name, model=self.model_name)
        return RequestMeter(self._metrics, client.name, span)

    async def job(self, body: Generation, client: Client, labels: Labels = NO_LABELS, trace: str = "") -> Job:
        """Check and tokenize a request: everything that can be the caller's mistake shows here.

        All its sequences carry the same ``labels``: one HTTP request is one call of its interaction. ``trace``: the
        traceparent that their spans belong below.

        Raises:
            UnknownModel, InvalidRequest, PromptTooLong: see :mod:`fairserve.errors`.
        """
        self.check_model(body.model)
        if isinstance(body, EmbeddingRequest) and self._pooling is None:
            detail = "this service makes no embeddings: its setting engine.pooling is off (mean and last make them)"
            raise InvalidRequest(detail, code="embeddings_off")
        shaped = self._chats.shaped(body)
        await output_rules.check(body, self._prompts.num_tokens, shaped)
        if isinstance(body, ChatRequest):
            self._check_choices(1, body.n)
            how = self._chats.rendering(body)
            prompts: Sequence[tuple[int, ...]] = [await self._prompts.of_chat(body.messages, how)]
            client, tier = client.at_tier(body.service_tier, self._limits.service_tiers)
        else:
            self._check_choices(len(body.prompt), body.n, "input" if isinstance(body, EmbeddingRequest) else "n")
            prompts = await self._prompts.of_prompts(body.prompt, PARAMS[type(body)])
            tier = ""
        _check_scores(body, sum(map(len, prompts)))
        response_id = f"{ID_PREFIXES[type(body)]}-{secrets.token_hex(16)}"
        return Job(
            response_id=response_id,
            created_s=int(self._unix_time_s()),
            model=self.model_name,
            requests=tuple(self._requests(response_id, body, client, labels, prompts, shaped, trace)),
            n=body.n,
            stream=body.stream,
            include_usage=body.include_usage,
            prompt_logprobs=body.prompt_logprobs,
            fingerprint=self._fingerprint,
            service_tier=tier if isinstance(body, ChatRequest) and body.service_tier else None,
        )

    async def answer(self, body: Generation | ResponsesRequest, job: Job) -> Answer | ResponsesAnswer:
        """What shapes the outputs of the job that ``body`` asked for."""
        token_text = self._prompts.token_text
        match body:
            case ResponsesRequest():
                return ResponsesAnswer(body, job)
            case EmbeddingRequest():
                return EmbeddingAnswer(job, token_text, body.encoding_format)
            case CompletionRequest():
                if body.echo:
                    return EchoAnswer(job, token_text, await self._prompts.texts(body.prompt))
                return CompletionAnswer(job, token_text)
            case ChatRequest():
                if (toolbox := body.toolbox) is not None:
                    return ToolAnswer(job, token_text, self._chats.parsers(toolbox))
                return ChatAnswer(job, token_text)

    def generate(self, job: Job) -> AsyncGenerator[Batch, None]:
        """Run all sequences of a job at once. Close it (``aclosing``): that cancels what still runs."""
        return merged([self._backend.generate(request) for request in job.requests])

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
            raise InvalidRequest(detail, param=param)

    def _requests(
        self,
        response_id: str,
        body: Generation,
        client: Client,
        labels: Labels,
        prompts: Sequence[tuple[int, ...]],
        shaped: Mapping[str, Grammar],
        trace: str,
    ) -> list[GenerateRequest]:
        requests: list[GenerateRequest] = []
        bad_words = self._prompts.bad_words(body.bad_words)
        for prompt in prompts:
            max_tokens = self._max_output(body, len(prompt))
            for choice in range(body.n):
                request = GenerateRequest(
                    request_id=f"{response_id}-{len(requests)}",
                    client=client.name,
                    prompt_token_ids=prompt,
                    sampling=self._chats.sampling(
                        body, replace(body.sampling(max_tokens, choice), bad_words=bad_words), shaped
                    ),
                    weight=client.weight,
                    max_waiting=client.max_waiting,
                    application=labels.application,
                    interaction=labels.interaction,
                    call_index=labels.call_index,
                    trace=trace,
                    pooling=self._pooling if isinstance(body, EmbeddingRequest) else None,
                    budgets=client.budgets,
                )
                requests.append(request)
        return requests

    def _max_output(self, body: Generation, num_prompt: int) -> int:
        is_chat = isinstance(body, ChatRequest)
        left = self._max_model_len - num_prompt
        asked = body.asked_output
        if left < (1 if asked is None else asked):
            raise PromptTooLong(num_prompt, 1 if asked is None else asked, self._max_model_len, PARAMS[type(body)])
        if body.min_tokens > (most := left if asked is None else asked):
            detail = f"min_tokens: must be at most {most}, the most tokens that this output may have"
            raise InvalidRequest(detail, param="min_tokens")
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
