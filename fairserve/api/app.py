"""The routes. ``create_app`` is cheap, and is called inside the process that serves."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fairserve.api import openapi, responses_routes, streaming
from fairserve.api.admin import PREFIX, create_admin
from fairserve.api.admin_service import AdminService
from fairserve.api.batches import routes as batch_routes
from fairserve.api.batches.service import BatchService
from fairserve.api.bodies import read_body
from fairserve.api.embeddings import EmbeddingRequest
from fairserve.api.generating import making
from fairserve.api.http_errors import install, request_id_of
from fairserve.api.openai_schema import ChatRequest, CompletionRequest
from fairserve.api.responses import ResponsesAnswer
from fairserve.api.responses_schema import ResponsesRequest
from fairserve.api.service import Generation, OpenAIService
from fairserve.api.tokenizing import DetokenizeRequest, TokenizeRequest


def create_app(
    service_provider: Callable[[], OpenAIService],
    *,
    admin_provider: Callable[[], AdminService] | None = None,
    batches_provider: Callable[[], BatchService | None] | None = None,
    id_from_server: bool = False,
) -> FastAPI:
    """The ASGI application; the providers are asked once per request.

    ``admin_provider``: for /admin/v1; without it there is no such route. ``batches_provider``: the same for /v1/files
    and /v1/batches. ``id_from_server``: true behind Ray Serve, whose proxy makes the ``x-request-id`` of request and
    response itself.
    """
    app = FastAPI(title="fairserve", docs_url=None, redoc_url=None, redirect_slashes=False)
    install(app, id_from_server=id_from_server)
    openapi.describe(app)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=openapi.takes(ChatRequest),
        responses=openapi.answered(openapi.ChatCompletion, is_generation=True),
    )
    async def chat_completions(request: Request) -> Response:
        return await _generate(service_provider(), request, ChatRequest)

    @app.post(
        "/v1/completions",
        openapi_extra=openapi.takes(CompletionRequest),
        responses=openapi.answered(openapi.Completion, is_generation=True),
    )
    async def completions(request: Request) -> Response:
        return await _generate(service_provider(), request, CompletionRequest)

    @app.post(
        "/v1/embeddings",
        openapi_extra=openapi.takes(EmbeddingRequest),
        responses=openapi.answered(openapi.EmbeddingList),
    )
    async def embeddings(request: Request) -> Response:
        return await _generate(service_provider(), request, EmbeddingRequest)

    @app.post("/tokenize", openapi_extra=openapi.takes(TokenizeRequest), responses=openapi.answered(openapi.Tokenized))
    async def tokenize(request: Request) -> Response:
        service = service_provider()
        service.identify(request.headers)
        body = await read_body(TokenizeRequest, request, service)
        return JSONResponse(await service.tokenize(body))

    @app.post(
        "/detokenize", openapi_extra=openapi.takes(DetokenizeRequest), responses=openapi.answered(openapi.Detokenized)
    )
    async def detokenize(request: Request) -> Response:
        service = service_provider()
        service.identify(request.headers)
        body = await read_body(DetokenizeRequest, request, service)
        return JSONResponse(await service.detokenize(body))

    @app.post(
        "/v1/responses",
        openapi_extra=openapi.takes(ResponsesRequest),
        responses=openapi.answered(openapi.Responses, is_generation=True),
    )
    async def responses(request: Request) -> Response:
        return await _generate(service_provider(), request, ResponsesRequest)

    responses_routes.install(app, service_provider)

    @app.get("/v1/models", responses=openapi.answered(openapi.ModelList))
    async def models(request: Request) -> Response:
        service = service_provider()
        service.identify(request.headers)
        return JSONResponse({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}", responses=openapi.answered(openapi.Model))
    async def model(request: Request, name: str) -> Response:
        service = service_provider()
        service.identify(request.headers)
        return JSONResponse(service.model(name))

    @app.get("/health", responses=openapi.HEALTH)
    async def health() -> Response:
        body = await service_provider().health()
        return JSONResponse(body, 200 if body["ready"] else 503)

    if batches_provider is not None:
        batch_routes.install(app, service_provider, batches_provider)
    if admin_provider is not None:
        app.mount(PREFIX, create_admin(admin_provider))
    return app


async def _generate(
    service: OpenAIService, request: Request, kind: type[Generation] | type[ResponsesRequest]
) -> Response:
    client = service.identify(request.headers)  # before the body: strangers get no parsing
    body = await read_body(kind, request, service)

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        made = await making(service, body, client, request.headers)
        deadline = made.meter.watching(service.deadline())
        if not body.stream:
            response = await streaming.whole(made.answer, made.outputs, deadline, made.headers)
            await response(scope, receive, send)
            return
        answer = made.answer
        events = answer if isinstance(answer, ResponsesAnswer) else streaming.Events(answer, made.job.include_usage)
        await streaming.stream(
            events,
            made.outputs,
            deadline,
            made.headers,
            request_id=request_id_of(request),
            keep_alive_s=service.keep_alive_s,
            send=send,
        )

    return streaming.WatchedResponse(respond)
