"""Routes below ``/v1/responses/{response_id}``. Nothing is stored, and each of them says so, as OpenAI says that
something is not there; "no such route" would make callers look for a wrong URL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from fastapi import FastAPI, Request

from fairserve.api import openapi
from fairserve.api.admin import ErrorBody
from fairserve.api.service import OpenAIService
from fairserve.errors import UnknownResponse

PATH = "/v1/responses/{response_id}"
ONE: dict[str, Any] = {
    "status_code": 404,
    "responses": openapi.ERRORS | {404: {"model": ErrorBody, "description": "No response is stored"}},
}


def install(app: FastAPI, service_provider: Callable[[], OpenAIService]) -> None:
    """Add the routes."""

    def refused(request: Request, response_id: str) -> NoReturn:
        """
        Raises:
            Unauthenticated: as everywhere.
            UnknownResponse: to everybody else.
        """
        service_provider().identify(request.headers)
        raise UnknownResponse(response_id[:128])

    @app.get(PATH, **ONE)
    async def retrieve_response(request: Request, response_id: str) -> None:
        refused(request, response_id)

    @app.delete(PATH, **ONE)
    async def delete_response(request: Request, response_id: str) -> None:
        refused(request, response_id)

    @app.post(PATH + "/cancel", **ONE)
    async def cancel_response(request: Request, response_id: str) -> None:
        refused(request, response_id)

    @app.get(PATH + "/input_items", **ONE)
    async def list_input_items(request: Request, response_id: str) -> None:
        refused(request, response_id)
