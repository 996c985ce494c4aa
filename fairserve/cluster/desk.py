"""Where a running service is changed: controls of clients, live keys, live settings, and who changed what.

A change is *planned* (checked, and written down as the state that would follow), *kept* by whoever has a disk or Ray,
and only then *adopted*: what is in force is durable. Plain code: no Ray, no disk, the wall clock is handed in.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from fairserve.cluster.live_settings import LIVE_PATHS, checked_paths, in_force, laid_over, value_at
from fairserve.cluster.live_state import ID_DIGITS, LiveKey, State
from fairserve.config import CLIENT_RULE, COUNTED_PATH, OF_CLIENT, ApiKey, FairServeArgs
from fairserve.dispatch.controls import NO_CONTROL, Control
from fairserve.errors import InvalidRequest, UnknownKey
from fairserve.fairness.hierarchy import path_of
from fairserve.views import ClientChange

logger = logging.getLogger(__name__)

MAX_AUDIT = 10_000
"""Entries of the audit log that are kept."""
MAX_WHO = 128


@dataclass(frozen=True, slots=True)
class Change:
    """One change that was checked and is not in force yet."""

    state: State
    """That follows."""
    entry: dict[str, Any]
    """``views.AuditView``; its seq is the version of ``state``."""
    answer: Any
    """What the caller gets: a view, or paths."""


class Desk:
    """``plan_`` methods check and change nothing; :meth:`adopt` brings a plan into force. One change at a time: the one
    that is planned must be adopted or dropped before the next is planned.

    Args:
        deployed: the settings of the newest deployment; :meth:`deploy` replaces them.
        unix_s: the wall clock.
        state: what was changed earlier.
        audit: the newest entries of the audit log, oldest first.

    Raises (all ``plan_`` methods):
        InvalidRequest: the change is wrong, or contradicts what is there.
    """

    def __init__(
        self,
        deployed: FairServeArgs,
        unix_s: Callable[[], float],
        *,
        state: State | None = None,
        audit: Iterable[dict[str, Any]] = (),
    ) -> None:
        self._deployed = deployed
        self._unix_s = unix_s
        self._state = _known(state or State())
        self._audit: deque[dict[str, Any]] = deque(audit, maxlen=MAX_AUDIT)
        self._in_force = in_force(deployed, self._state.settings)

    # -- questions ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    @property
    def in_force(self) -> FairServeArgs:
        """The deployment's settings with the live ones over them."""
        return self._in_force

    def control(self, client: str) -> Control:
        return self._state.controls.get(client, NO_CONTROL)

    def audit(self, before_seq: int | None = None, limit: int = 200) -> list[dict[str, Any]]:
        """Newest first."""
        found: list[dict[str, Any]] = []
        for entry in reversed(self._audit):
            if len(found) >= limit:
                break
            if before_seq is None or entry["seq"] < before_seq:
                found.append(entry)
        return found

    def keys(self) -> list[dict[str, Any]]:
        """``views.KeyView`` of every live key, by client."""
        return [one.view() for one in sorted(self._state.keys.values(), key=lambda one: (one.key.client, one.id))]

    def key_directory(self, version: int) -> dict[str, Any] | None:
        """The live keys for an ingress that knows ``version`` of them; None when it is up to date."""
        state = self._state
        if version == state.keys_version:
            return None
        keys = [one.key.model_dump(mode="json", exclude={"key"}) for one in state.keys.values()]
        return {"version": state.keys_version, "keys": keys}

    def settings(self, paths: Iterable[str] = LIVE_PATHS) -> list[dict[str, Any]]:
        """``views.SettingView`` of settings that can be changed live."""
        return [
            {
                "path": path,
                "value": value_at(self._in_force, path),
                "deployed": value_at(self._deployed, path),
                "is_live": path in self._state.settings,
            }
            for path in paths
        ]

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan_client(
        self, client: str, change: Mapping[str, Any], who: str, is_node: Callable[[str], bool] = lambda node: False
    ) -> Change:
        """``change``: fields of ``views.ClientChange``; None takes one back. The answer is the new :class:`Control`.
        ``is_node``: whether a client, or a group with a slash at its end, is known; a new client must fit in there."""
        if not re.fullmatch(COUNTED_PATH, client):
            raise InvalidRequest(f"{client[:128]!r} cannot be a client: {CLIENT_RULE}", param="client")
        if not change:
            raise InvalidRequest(f"nothing to change: name at least one of {', '.join(ClientChange.model_fields)}")
        fields = {name: value for name, value in change.items() if value is not None or name != "is_paused"}
        checked = _checked(ClientChange, fields).model_dump(exclude_unset=True)
        if "is_paused" in change:
            checked["is_paused"] = bool(change["is_paused"])
        if not is_node(client):
            _refuse_clash(client, is_node)
        was = self.control(client)
        control = was.with_changes(checked)
        controls = {name: one for name, one in self._state.controls.items() if name != client}
        if control != NO_CONTROL:
            controls[client] = control
        before = {name: getattr(was, name) for name in checked}
        after = {name: getattr(control, name) for name in checked}
        return self._change(who, "client", client, before, after, control, controls=controls)

    def plan_settings(self, change: Mapping[str, Any], who: str) -> Change:
        """``change``: values by path; None takes one back. The answer is the paths."""
        checked_paths(change)
        settings = dict(self._state.settings)
        for path, value in change.items():
            settings.pop(path, None)
            if value is not None:
                settings[path] = value
        args = laid_over(self._deployed, settings)
        for path in settings.keys() & change.keys():
            settings[path] = value_at(args, path)  # as it was understood: 5 is 5.0 for a float
        before = {path: value_at(self._in_force, path) for path in change}
        after = {path: value_at(args, path) for path in change}
        return self._change(who, "settings", ", ".join(change), before, after, tuple(change), settings=settings)

    def plan_key(self, entry: Mapping[str, Any], who: str) -> Change:
        """``entry``: fields of ``config.ApiKey``, with the digest and without the secret. The answer is its view."""
        if entry.get("key") is not None:
            raise InvalidRequest("send key_sha256, not the secret itself: it is kept nowhere", param="key")
        key = _checked(ApiKey, entry)
        keys = self._state.keys
        if key.digest in keys:
            raise InvalidRequest(
                f"this key exists already, for client {keys[key.digest].key.client!r}", param="key_sha256"
            )
        for other in keys.values():
            agree = all(getattr(other.key, name) == getattr(key, name) for name in OF_CLIENT)
            if other.key.client == key.client and not agree:
                raise InvalidRequest(
                    f"client {key.client!r} has key {other.id} with weight {other.key.weight:g} and max_waiting "
                    f"{other.key.max_waiting}: its keys must agree, in budgets, too; a live weight, limit or budget of "
                    "the client changes both",
                    param="weight",
                )
        nodes = {node for other in keys.values() for node in path_of(other.key.client)}
        _refuse_clash(key.client, nodes.__contains__)
        live = LiveKey(key, self._unix_s())
        return self._change(who, "key.create", live.id, {}, live.view(), live.view(), keys={**keys, key.digest: live})

    def plan_revoke(self, id: str, who: str) -> Change:  # noqa: A002 (the view's word)
        """``id``: the first digits of a key's digest. The answer is its view.

        Raises:
            UnknownKey: no live key begins so.
        """
        found = [one for digest, one in self._state.keys.items() if id and digest.startswith(id.lower())]
        if not found:
            raise UnknownKey(id[:64])
        if len(found) > 1:
            ids = ", ".join(sorted(one.key.digest[: max(ID_DIGITS, len(id) + 2)] for one in found)[:5])
            raise InvalidRequest(f"the id {id!r} fits {len(found)} keys ({ids}): give more digits", param="id")
        view = found[0].view()
        keys = {digest: one for digest, one in self._state.keys.items() if one is not found[0]}
        return self._change(who, "key.revoke", found[0].id, view, {}, view, keys=keys)

    def plan_import(self, cluster: str, num_clients: int, who: str) -> Change:
        """Counters of another cluster are laid over ours; ``cluster``: its id. The answer is how many clients."""
        return self._change(who, "counters.import", cluster, {}, {"clients": num_clients}, num_clients)

    def _change(
        self,
        who: str,
        action: str,
        target: str,
        before: dict[str, Any],
        after: dict[str, Any],
        answer: Any,
        **parts: Mapping[str, Any],
    ) -> Change:
        state, now_s = self._state, self._unix_s()
        seq = state.version + 1
        # Past every version that an earlier life, of which nothing is left, may have given out.
        keys_version = max(state.keys_version + 1, int(now_s * 1000)) if "keys" in parts else state.keys_version
        follows = replace(state, version=seq, keys_version=keys_version, **parts)
        entry = {"seq": seq, "time_s": now_s, "who": who[:MAX_WHO], "action": action, "target": target}
        return Change(follows, entry | {"before": before, "after": after}, answer)

    # -- what happens -------------------------------------------------------------------------------------------------

    def adopt(self, change: Change) -> None:
        """It has been kept."""
        assert change.state.version == self._state.version + 1, "planned before another change was adopted"
        self._state = change.state
        self._audit.append(change.entry)
        self._in_force = in_force(self._deployed, self._state.settings)

    def take_over(self, state: State, audit: Iterable[dict[str, Any]]) -> None:
        """Another cluster changed what both share. ``audit``: the newest entries, oldest first."""
        self._state = _known(state)
        self._audit = deque(audit, maxlen=MAX_AUDIT)
        self._in_force = in_force(self._deployed, self._state.settings)

    def deploy(self, deployed: FairServeArgs) -> None:
        """A new deployment; what was changed live stays over it."""
        self._deployed = deployed
        self._in_force = in_force(deployed, self._state.settings)


def _known(state: State) -> State:
    """Without settings that this fairserve does not have."""
    unknown = sorted(state.settings.keys() - set(LIVE_PATHS))
    if unknown:
        logger.error("live settings of another fairserve have no effect: %s", ", ".join(unknown))
    return replace(state, settings={path: value for path, value in state.settings.items() if path in LIVE_PATHS})


def _checked(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """
    Raises:
        InvalidRequest: with the first thing that is wrong; no value is told.
    """
    assert issubclass(kind, BaseModel)
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "change"
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise InvalidRequest(f"there is no field {where[:64]!r}; known: {known}", param=where[:64]) from None
        raise InvalidRequest(f"{where}: {first['msg']}", param=where) from None


def _refuse_clash(client: str, is_node: Callable[[str], bool]) -> None:
    """
    Raises:
        InvalidRequest: the client would stand above or below another one.
    """
    groups = path_of(client)[:-1]
    above = next((group.removesuffix("/") for group in groups if is_node(group.removesuffix("/"))), None)
    if above is not None:
        raise InvalidRequest(f"client {above!r} would stand above client {client!r}: only one can be", param="client")
    if is_node(client + "/"):
        raise InvalidRequest(f"there are clients below {client!r}: it cannot be a client itself", param="client")
