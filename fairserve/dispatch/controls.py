"""What an operator has set for a client while the service runs: it holds above what the client's key says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Control:
    """One client. None: as its key or the configuration says."""

    weight: float | None = None
    is_paused: bool = False
    """Its requests wait, none is granted, and what runs goes on."""
    max_waiting: int | None = None
    requests_per_min: int | None = None
    """Requests accepted in any 60 s; None for no such limit."""
    budgets: Mapping[str, Mapping[str, int | None]] | None = None
    """Tokens by window and kind: ``{"day": {"soft": 8000, "hard": 10000}}``; an empty one for no budget at all."""

    def with_changes(self, change: Mapping[str, Any]) -> Control:
        """``change``: values by field; None takes a field back."""
        return replace(self, **{name: _UNSET[name] if value is None else value for name, value in change.items()})

    def dump(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value != _UNSET[name]}


NO_CONTROL = Control()
_UNSET: dict[str, Any] = asdict(NO_CONTROL)


class Controls:
    """By client. Only the dispatcher that holds it writes it, so that queue and controls change in one step."""

    def __init__(self) -> None:
        self._of: dict[str, Control] = {}

    def __iter__(self) -> Iterator[str]:
        """Clients for which anything is set."""
        return iter(self._of)

    def of(self, client: str) -> Control:
        return self._of.get(client, NO_CONTROL)

    def put(self, client: str, control: Control) -> None:
        if control == NO_CONTROL:
            self._of.pop(client, None)
        else:
            self._of[client] = control

    def is_paused(self, client: str) -> bool:
        return self.of(client).is_paused

    def weight(self, client: str, carried: float) -> float:
        """In force, for a client whose requests carry the weight ``carried``."""
        weight = self.of(client).weight
        return carried if weight is None else weight

    def dump(self) -> dict[str, dict[str, Any]]:
        """Plain values, for :meth:`load`."""
        return {client: control.dump() for client, control in self._of.items()}

    def load(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what was dumped, instead of what is here.

        Raises:
            TypeError: a field is not known.
        """
        self._of = {client: Control(**fields) for client, fields in data.items()}
