"""Settings that may be changed while the service runs: they lie over those of the deployment."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fairserve.config import FairnessConfig, FairServeArgs
from fairserve.errors import InvalidRequest

logger = logging.getLogger(__name__)

LIVE_LIMITS = (
    "max_waiting",
    "max_waiting_per_client",
    "max_clients",
    "lookahead",
    "lease_s",
    "replica_stale_s",
    "replica_dead_s",
    "router_dead_s",
)


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


LIVE_PATHS = (
    # Replicas charge by the cost function that they were deployed with: a change has to reach all of them at once.
    *(path for path in _paths(FairnessConfig, "fairness.") if not path.startswith("fairness.cost.")),
    *(f"dispatch.{name}" for name in LIVE_LIMITS),
)


def value_at(args: FairServeArgs, path: str) -> Any:
    """The value of a setting, as plain JSON values."""
    value = args.model_dump(mode="json", include={path.split(".")[0]})
    for name in path.split("."):
        value = value[name]
    return value


def laid_over(deployed: FairServeArgs, live: Mapping[str, Any]) -> FairServeArgs:
    """``deployed`` with the values of ``live``, by path, in place of its own, validated as a whole.

    Raises:
        InvalidRequest: a value is wrong, by itself or together with the others.
    """
    if not live:
        return deployed
    data = deployed.model_dump(mode="json")
    for path, value in live.items():
        *sections, name = path.split(".")
        section = data
        for part in sections:
            section = section[part]
        section[name] = value
    try:
        return FairServeArgs.model_validate_json(json.dumps(data))
    except TypeError:
        raise InvalidRequest("a setting's value must be plain JSON") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{where}: {first['msg']}", param=where) from None


def in_force(deployed: FairServeArgs, live: Mapping[str, Any]) -> FairServeArgs:
    """The same, for a deployment that may be newer than the live values: those that have become wrong are left out."""
    try:
        return laid_over(deployed, live)
    except InvalidRequest:
        fitting: dict[str, Any] = {}
        for path, value in live.items():
            try:
                laid_over(deployed, fitting | {path: value})
                fitting[path] = value
            except InvalidRequest as error:
                logger.error("the live setting %s does not go with this deployment and has no effect: %s", path, error)
        return laid_over(deployed, fitting)


def checked_paths(change: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidRequest: no setting is named, or one that cannot be changed live.
    """
    if not change:
        raise InvalidRequest("nothing to change: name at least one setting, such as fairness.quantum")
    for path in change:
        if path not in LIVE_PATHS:
            near = difflib.get_close_matches(path, LIVE_PATHS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"these can: {', '.join(LIVE_PATHS)}"
            raise InvalidRequest(f"setting {path!r} cannot be changed live: {hint}", param=path[:128])
