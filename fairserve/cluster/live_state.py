"""Everything that was changed while a service runs, as one frozen value and one JSON document."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fairserve.config import ApiKey
from fairserve.dispatch.controls import Control

logger = logging.getLogger(__name__)

ID_DIGITS = 12
DOCUMENT_VERSION = 1


@dataclass(frozen=True, slots=True)
class LiveKey:
    """One API key that was created while the service ran."""

    key: ApiKey
    """With its digest and without its secret."""
    created_s: float

    @property
    def id(self) -> str:
        return self.key.digest[:ID_DIGITS]

    def view(self) -> dict[str, Any]:
        """``views.KeyView``."""
        key = self.key
        return {
            "id": self.id,
            "client": key.client,
            "weight": key.weight,
            "max_waiting": key.max_waiting,
            "applications": list(key.applications),
            "budgets": key.budgets.model_dump(mode="json"),
            "source": "live",
            "created_s": self.created_s,
        }


@dataclass(frozen=True, slots=True)
class State:
    """Everything that was changed live. Never written: each change makes another one."""

    version: int = 0
    """Rises by one with every change."""
    keys_version: int = 0
    """Rises with every change of keys; 0 as long as there never was one."""
    controls: Mapping[str, Control] = field(default_factory=dict)
    keys: Mapping[str, LiveKey] = field(default_factory=dict)
    """By digest."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By path."""

    def dump(self) -> str:
        """As a JSON document."""
        return json.dumps(
            {
                "format": DOCUMENT_VERSION,
                "version": self.version,
                "keys_version": self.keys_version,
                "controls": {client: control.dump() for client, control in self.controls.items()},
                "keys": [
                    {"created_s": one.created_s, **one.key.model_dump(mode="json", exclude={"key"})}
                    for one in self.keys.values()
                ],
                "settings": dict(self.settings),
            },
            separators=(",", ":"),
        )

    @classmethod
    def load(cls, text: str) -> State:
        """
        Raises:
            ValueError: the document cannot be read, or was written by a newer fairserve.
        """
        try:
            data = json.loads(text)
            if data["format"] > DOCUMENT_VERSION:
                raise ValueError(f"format {data['format']}, this fairserve reads up to {DOCUMENT_VERSION}")
            keys = [LiveKey(created_s=entry.pop("created_s"), key=ApiKey(**entry)) for entry in data["keys"]]
            return cls(
                version=int(data["version"]),
                keys_version=int(data["keys_version"]),
                controls={client: Control(**fields) for client, fields in data["controls"].items()},
                keys={one.key.digest: one for one in keys},
                settings=dict(data["settings"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the document of live changes cannot be read: {error!r}") from error


def newest(documents: Iterable[str]) -> State:
    """The state with the greatest version among copies of the document, those that cannot be read left out."""
    best = State()
    for text in documents:
        try:
            state = State.load(text)
        except ValueError as error:
            logger.error("%s; it is left out", error)
            continue
        if state.version > best.version:
            best = state
    return best
