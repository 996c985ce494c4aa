"""Changes that people ask for, checked before they are sent to the counter actor."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fairserve.config import CLIENT_PATH, CLIENT_RULE, ApiKey, Budgets, key_digest
from fairserve.errors import InvalidRequest
from fairserve.views import ClientChange

SECRET_PREFIX = "fs-"
MAX_DEPTH = 20
"""Lists and objects within one another in a setting's value; the deepest that means anything has one."""
MAX_SHOWN = 3
"""Wrong fields told at once."""
Model = TypeVar("Model", bound=BaseModel)


class KeyWanted(BaseModel):
    """A key to be made; see :class:`fairserve.config.ApiKey`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)

    client: Annotated[str, Field(pattern=f"^{CLIENT_PATH}$")]
    """Up to three segments joined by /, each 1-64 of A-Z a-z 0-9 . _ : @ -"""
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """The client's share relative to others."""
    max_waiting: Annotated[int, Field(gt=0, lt=2**63)] | None = None
    """Requests of this client that may wait; null: as the configuration says."""
    applications: tuple[str, ...] = ()
    """Application labels that callers with this key may send."""
    budgets: Budgets = Budgets()
    """Tokens that the client may use."""


def new_secret() -> str:
    return SECRET_PREFIX + secrets.token_urlsafe(32)


def new_key(wanted: KeyWanted) -> tuple[str, ApiKey]:
    """A fresh secret, and the entry that holds its digest.

    Raises:
        InvalidRequest: an application's name is wrong, or named twice.
    """
    secret = new_secret()
    return secret, checked(ApiKey, wanted.model_dump() | {"key_sha256": key_digest(secret)})


def change_of(fields: dict[str, Any]) -> ClientChange:
    """
    Raises:
        InvalidRequest: no field at all, an unknown one, or a wrong value.
    """
    if not fields:
        raise InvalidRequest(f"nothing to change: name at least one of {', '.join(ClientChange.model_fields)}")
    return checked(ClientChange, fields)


def settings_of(change: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        InvalidRequest: no setting is named, or a value is nested so deeply that it could not be sent on.
    """
    if not change:
        raise InvalidRequest('nothing to change: name a setting and its value, such as {"fairness.quantum": 500}')
    level: list[Any] = [change]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise InvalidRequest(f"a setting's value may be nested {MAX_DEPTH} levels deep")
    return change


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def checked(kind: type[Model], fields: dict[str, Any]) -> Model:
    """
    Raises:
        InvalidRequest: names what is wrong and what is allowed.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        raise wrong([(".".join(str(step) for step in one["loc"]), one["msg"]) for one in found]) from None


def wrong(fields: list[tuple[str, str]]) -> InvalidRequest:
    """One sentence about some wrong fields: (name, what is wrong); no value that was sent."""
    hints = {"client": f" ({CLIENT_RULE})", "name": f" ({CLIENT_RULE})"}
    lines = []
    for name, text in fields[:MAX_SHOWN]:
        said = text.removeprefix("Value error, ") + hints.get(name, "")
        lines.append(f"{name}: {said}" if name else said)
    return InvalidRequest("; ".join(lines), param=fields[0][0] or None)
