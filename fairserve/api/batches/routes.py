"""The routes of files and batches. The key is checked before anything of the body is read."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fairserve.api import openapi
from fairserve.api.batches.answers import BatchList, BatchObject, FileDeleted, FileList, FileObject
from fairserve.api.batches.bodies import BatchPage, BatchRequest, FileForm, FilePage, page_of, parameters
from fairserve.api.batches.service import BatchService
from fairserve.api.bodies import read_body
from fairserve.api.identity import Client
from fairserve.api.service import OpenAIService
from fairserve.errors import BatchesOff

FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FileForm.model_json_schema()}}}}
CONTENT = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


def install(
    app: FastAPI, service_provider: Callable[[], OpenAIService], provider: Callable[[], BatchService | None]
) -> None:
    """Add the routes; ``provider`` gives None where nothing is kept, and they answer 404."""

    def caller(request: Request) -> tuple[Client, BatchService]:
        """
        Raises:
            Unauthenticated: as everywhere.
            BatchesOff: nothing is kept here.
        """
        client = service_provider().identify(request.headers)
        batches = provider()
        if batches is None:
            raise BatchesOff()
        return client, batches

    @app.post("/v1/files", openapi_extra=FORM, responses=openapi.answered(FileObject))
    async def create_file(request: Request) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.upload(client, request))

    @app.get("/v1/files", openapi_extra={"parameters": parameters(FilePage)}, responses=openapi.answered(FileList))
    async def list_files(request: Request) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.files(client, page_of(FilePage, request)))

    @app.get("/v1/files/{file_id}", responses=openapi.answered(FileObject))
    async def retrieve_file(request: Request, file_id: str) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.file(client, file_id))

    @app.get(
        "/v1/files/{file_id}/content",
        response_class=StreamingResponse,
        responses=openapi.ERRORS | {200: {"description": "The file", **CONTENT}},
    )
    async def file_content(request: Request, file_id: str) -> Response:
        client, batches = caller(request)
        num_bytes, pieces = await batches.content(client, file_id)
        headers = {"content-length": str(num_bytes)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @app.delete("/v1/files/{file_id}", responses=openapi.answered(FileDeleted))
    async def delete_file(request: Request, file_id: str) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.delete(client, file_id))

    @app.post("/v1/batches", openapi_extra=openapi.takes(BatchRequest), responses=openapi.answered(BatchObject))
    async def create_batch(request: Request) -> Response:
        client, batches = caller(request)
        body = await read_body(BatchRequest, request, service_provider())
        return JSONResponse(await batches.create(client, body))

    @app.get("/v1/batches", openapi_extra={"parameters": parameters(BatchPage)}, responses=openapi.answered(BatchList))
    async def list_batches(request: Request) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.batches(client, page_of(BatchPage, request)))

    @app.get("/v1/batches/{batch_id}", responses=openapi.answered(BatchObject))
    async def retrieve_batch(request: Request, batch_id: str) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.batch(client, batch_id))

    @app.post("/v1/batches/{batch_id}/cancel", responses=openapi.answered(BatchObject))
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        client, batches = caller(request)
        return JSONResponse(await batches.cancel(client, batch_id))
