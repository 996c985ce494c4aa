"""The admin API, /admin/v1: what runs, and changes to it. Typed by :mod:`fairserve.views`, described by OpenAPI."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from datetime import date
from enum import IntEnum
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fairserve import __version__
from fairserve.api.admin_auth import AdminDoor, who_of
from fairserve.api.admin_service import PAGE, AdminService
from fairserve.api.http_errors import Problem, describe, request_id_of
from fairserve.cluster.changes import KeyWanted, wrong
from fairserve.config import COUNTED_PATH
from fairserve.errors import FairServeError, InvalidRequest
from fairserve.usage_export import as_csv
from fairserve.views import (
    AuditView,
    ClientChange,
    ClientOrder,
    ClientPage,
    ClientView,
    CounterView,
    EventView,
    History,
    KeyView,
    ModelView,
    NewKey,
    Overview,
    ReplicaView,
    SettingView,
    UsagePeriod,
    UsageView,
)

PREFIX = "/admin/v1"
MAX_SERIES = 50
"""Clients in one answer of /history; an hour of one is 3,600 points."""
DESCRIPTION = """What a running fairserve does, and changes to it that take effect at the next pick and are kept.

Reading and changing need an admin key (`api.admin_keys` or `FAIRSERVE_ADMIN_KEYS`); everybody may read a service that
has no key at all. Answers are at most a second old. Changes are written to the audit log under the key's name."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    """The wrong field."""
    code: str | None


class ErrorBody(BaseModel):
    """Every failure, in the shape of OpenAI's errors."""

    error: ErrorDetail


class Resolution(IntEnum):
    """Seconds between points: of the last hour, or of the last week."""

    SECOND = 1
    MINUTE = 60


KEY = HTTPBearer(auto_error=False, scheme_name="adminKey", description="An admin key")
"""For the description only: AdminDoor has admitted whoever comes so far."""
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "No admin key, or another one"},
    403: {"model": ErrorBody, "description": "The service has no admin key, and without one this is closed"},
    503: {"model": ErrorBody, "description": "The counter actor does not answer; serving goes on"},
    "default": {"model": ErrorBody, "description": "The request is wrong, or the service failed"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorBody, "description": "There is none"}}
Search = Annotated[str, Query(max_length=200, description="Part of the clients' names")]
Limit = Annotated[int, Query(ge=1, le=PAGE)]
ClientName = Annotated[str, Path(pattern=f"^{COUNTED_PATH}$", description="Flat or a path: acme/research/ann")]
Who = Annotated[str, Depends(who_of)]
ModelName = Annotated[str, Query(max_length=200, description="Of several models: which; default: the first")]


def known_query_only(request: Request) -> None:
    """
    Raises:
        InvalidRequest: a parameter that the route does not have: a misspelt one would change nothing, silently.
    """
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise InvalidRequest(f"there is no query parameter {name[:64]!r} here: {hint}", param=name[:64])


def create_admin(provider: Callable[[], AdminService]) -> FastAPI:
    """The ASGI application to be mounted at ``PREFIX`` below an application with ``http_errors.Guard``."""
    app = FastAPI(
        title="fairserve admin API",
        version=__version__,
        description=DESCRIPTION,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        responses=ERRORS,
        dependencies=[Security(KEY), Depends(known_query_only)],
    )
    app.add_middleware(AdminDoor, admins=lambda: provider().admins)
    for kind in (FairServeError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    _add_reads(app, provider)
    _add_changes(app, provider)
    return app


def _add_reads(app: FastAPI, provider: Callable[[], AdminService]) -> None:
    @app.get("/overview")
    async def overview(
        top: Annotated[int, Query(ge=0, le=PAGE)] = 50,
        search: Search = "",
        model: ModelName = "",
    ) -> Overview:
        """The service at a glance: verdict, totals, replicas, the ``top`` busiest clients, the newest events."""
        return await provider().of(model).overview(top, search or None)

    @app.get("/models")
    async def models() -> tuple[ModelView, ...]:
        """The models of this service. Each has a queue and counters of its own, which `model=` chooses below."""
        return await provider().models()

    @app.get("/clients")
    async def clients(
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Limit = 100,
        order: ClientOrder = "service",
        search: Search = "",
        model: ModelName = "",
    ) -> ClientPage:
        """Clients, ordered by name or by the largest of something."""
        return await provider().of(model).clients(offset, limit, order, search or None)

    @app.get("/clients/{name:path}", responses=NOT_FOUND)
    async def client(name: ClientName, model: ModelName = "") -> ClientView:
        """One client."""
        return await provider().of(model).client(name)

    @app.get("/counters")
    async def counters(model: ModelName = "") -> list[CounterView]:
        """The counter of every client, by name."""
        return await provider().of(model).counters()

    @app.get("/replicas")
    async def replicas(model: ModelName = "") -> tuple[ReplicaView, ...]:
        """The model replicas."""
        return await provider().of(model).replicas()

    @app.get("/history")
    async def history(
        client: Annotated[list[str], Query(min_length=1, max_length=MAX_SERIES)],
        since: Annotated[float, Query(ge=0, allow_inf_nan=False, description="Unix seconds")] = 0,
        resolution: Resolution = Resolution.SECOND,
        model: ModelName = "",
    ) -> History:
        """Service, waiting requests and lead of some clients over time."""
        return await provider().of(model).history(client, since, int(resolution))

    @app.get("/usage", responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}})
    async def usage(
        form: Annotated[Literal["json", "csv"], Query(alias="format")] = "json",
        first: Annotated[date | None, Query(alias="from", description="Default: the first of the month")] = None,
        last: Annotated[date | None, Query(alias="to", description="Inclusive; default: today")] = None,
        by: Annotated[UsagePeriod, Query(description="hour: of the days for which hours are kept")] = "day",
        model: Annotated[str, Query(max_length=200, description="Default: all, each with rows of its own")] = "",
    ) -> list[UsageView]:
        """What each client used, by day of UTC, or by hour."""
        found = await provider().of(model).usage(first, last, by)
        if form == "json":
            return found
        return Response(as_csv(found), media_type="text/csv")  # type: ignore[return-value]  # FastAPI sends it as it is

    @app.get("/events")
    async def events(
        after: Annotated[int, Query(ge=0)] = 0, limit: Limit = 200, model: ModelName = ""
    ) -> tuple[EventView, ...]:
        """What happened, oldest first, after the event with the sequence number ``after``."""
        return await provider().of(model).events(after, limit)

    @app.get("/audit")
    async def audit(before: Annotated[int | None, Query(ge=0)] = None, limit: Limit = 200) -> tuple[AuditView, ...]:
        """Who changed what, newest first; ``before`` a sequence number, for the next page."""
        return await provider().audit(before, limit)

    @app.get("/keys")
    async def keys() -> tuple[KeyView, ...]:
        """The API keys, without their secrets."""
        return await provider().keys()

    @app.get("/settings")
    async def settings() -> tuple[SettingView, ...]:
        """The settings that can be changed live."""
        return await provider().settings()


def _add_changes(app: FastAPI, provider: Callable[[], AdminService]) -> None:
    @app.patch("/clients/{name:path}")
    async def set_client(name: ClientName, change: ClientChange, who: Who) -> ClientView:
        """Weight, pause and limits of a client. Fields that are left out stay; null takes a live value back."""
        return await provider().set_client(name, change, who)

    @app.patch("/settings")
    async def set_settings(
        change: Annotated[dict[str, Any], Body(examples=[{"fairness.quantum": 500, "fairness.policy": None}])], who: Who
    ) -> tuple[SettingView, ...]:
        """Path to value; null takes a live value back. All or none: they are checked together."""
        return await provider().set_settings(change, who)

    @app.post("/keys", status_code=201)
    async def create_key(wanted: KeyWanted, who: Who) -> NewKey:
        """Make an API key, known to every ingress within a second. The secret is in this answer and nowhere else."""
        return await provider().create_key(wanted, who)

    @app.delete("/keys/{id}", responses=NOT_FOUND)
    async def revoke_key(
        id: Annotated[str, Path(pattern="^[0-9a-f]{4,64}$", description="The first 4 hex digits or more")],  # noqa: A002
        who: Who,
    ) -> KeyView:
        """Revoke a live API key within a second. Those of the deployment are revoked by taking them out of it."""
        return await provider().revoke_key(id, who)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    request_id = request_id_of(request)
    match error:
        case RequestValidationError():
            # The first step says where the field came from: query, path or body.
            found = [(".".join(str(step) for step in one["loc"][1:]), one["msg"]) for one in error.errors()]
            return describe(wrong(found), request_id).response()
        case HTTPException(__cause__=FairServeError() as cause):  # while FastAPI read the body
            return describe(cause, request_id).response()
        case HTTPException(status_code=404):
            text = f"no such route; see {PREFIX}/openapi.json"
            return Problem(404, text, "invalid_request_error", None, "unknown_url").response()
    return describe(error, request_id).response()
