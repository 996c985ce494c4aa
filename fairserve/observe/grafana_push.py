"""Put dashboards, folder, data source and annotations into a running Grafana, over its HTTP API.

Through `grafana-client`, or its predecessor `grafana-api` (archived in 2020): only what both have is used. Pushing
twice leaves what pushing once leaves. Both speak Grafana's older API under ``/api``, which Grafana 13 still answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from fairserve.errors import ConfigError, GrafanaFailed
from fairserve.observe.grafana_json import TAG

OLDEST = (10, 4)
"""Grafana that knows every panel option that the dashboards use."""
CLIENTS = (("grafana_client", "GrafanaApi"), ("grafana_api", "GrafanaFace"))
"""Modules and their classes, the better one first."""
SOURCE_NAME = "fairserve Prometheus"
SOURCE_UID = "fairserve-prometheus"
SAME_MOMENT_MS = 600_000
"""An annotation with the same text in this time is the same event, told again by a repeated command."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where Grafana is; ``path`` is "" or ends with a slash."""

    protocol: str
    host: str
    port: int | None
    path: str

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}://{host}{port}/{self.path}"

    @classmethod
    def parsed(cls, url: str) -> Address:
        """Raises ConfigError, which never repeats a password."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url is not an address: {error}") from None
        if parts.username or parts.password:
            raise ConfigError(
                "--url holds a user name or password: set GRAFANA_TOKEN to the token of a service account"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(
                f"--url {url!r} is not an address such as https://grafana.example.com or http://host:3000"
            )
        path = parts.path.strip("/")
        return cls(parts.scheme, parts.hostname, port, f"{path}/" if path else "")


def open_grafana(address: Address, token: str, *, module: str | None = None, timeout_s: float = 10.0) -> Grafana:
    """``module``: one of :data:`CLIENTS`; None takes the first that is installed. Nothing is sent yet."""
    for name, class_name in CLIENTS:
        if module not in (None, name):
            continue
        try:
            made = getattr(importlib.import_module(name), class_name)
        except ImportError:
            continue
        api = made(
            token,
            host=f"[{address.host}]" if ":" in address.host else address.host,
            port=address.port,
            url_path_prefix=address.path,
            protocol=address.protocol,
            timeout=timeout_s,
        )
        return Grafana(api, str(address))
    raise ConfigError("pushing needs the package grafana-client: pip install 'fairserve[grafana]'")


class Grafana:
    """``api``: a ``grafana_client.GrafanaApi`` or a ``grafana_api.GrafanaFace``; ``name`` is how messages call it."""

    def __init__(self, api: Any, name: str) -> None:
        self._api = api
        self._http = getattr(api, "client", None) or api.api
        self._name = name

    def version(self) -> str:
        """Raises GrafanaFailed when something else answers, or a Grafana that is too old."""
        with self._explained("is there a Grafana?"):
            health = self._http.GET("/health")
        version = health.get("version") if isinstance(health, Mapping) else None
        if not isinstance(version, str):
            raise GrafanaFailed(f"{self._name} answers, but not as Grafana does: is the path right?")
        if _numbers(version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise GrafanaFailed(f"{self._name} is Grafana {version}: the dashboards need {oldest} or later")
        return version

    def folder(self, title: str) -> str:
        """The uid of the folder of this title, made if need be."""
        with self._explained(f"folder {title!r}"):
            for folder in self._api.folder.get_all_folders():
                if folder["title"] == title:
                    return str(folder["uid"])
            return str(self._api.folder.create_folder(title)["uid"])

    def data_source(self, prometheus_url: str) -> tuple[str, str]:
        """The uid of our data source, and whether it was "created", "updated" or "unchanged"."""
        wanted = {
            "name": SOURCE_NAME,
            "uid": SOURCE_UID,
            "type": "prometheus",
            "access": "proxy",
            "url": prometheus_url,
            "jsonData": {"httpMethod": "POST"},
        }
        with self._explained(f"data source {SOURCE_NAME!r}"):
            found = self._or_none(lambda: self._api.datasource.get_datasource_by_name(SOURCE_NAME.replace(" ", "%20")))
            if found is None:
                return str(self._api.datasource.create_datasource(wanted)["datasource"]["uid"]), "created"
            if found["url"] == prometheus_url and found["type"] == "prometheus":
                return str(found["uid"]), "unchanged"
            changed = {**found, **wanted, "uid": found["uid"]}
            if hasattr(self._api.datasource, "update_datasource_by_uid"):  # Grafana retires the numbers
                self._api.datasource.update_datasource_by_uid(found["uid"], changed)
            else:
                self._api.datasource.update_datasource(found["id"], changed)
            return str(found["uid"]), "updated"

    def dashboard(self, document: Mapping[str, Any], folder_uid: str, message: str) -> str:
        """Whether it was "created", "updated" or "unchanged"."""
        with self._explained(f"dashboard {document['title']!r}"):
            found = self._or_none(lambda: self._api.dashboard.get_dashboard(document["uid"]))
            if found is not None and _is_same(found, document, folder_uid):
                return "unchanged"
            body = {"dashboard": {**document, "id": None}, "folderUid": folder_uid, "overwrite": True}
            self._api.dashboard.update_dashboard({**body, "message": message})
            return "created" if found is None else "updated"

    def annotate(self, text: str, now_ms: int, tags: tuple[str, ...] = ()) -> str:
        """Mark this moment on every dashboard of ours: "created", or "unchanged" when it was told just now."""
        annotations = self._api.annotations
        find = getattr(annotations, "find_annotations", None) or annotations.get_annotation  # its older name
        with self._explained("annotations"):
            told = find(time_from=now_ms - SAME_MOMENT_MS, time_to=now_ms, tags=[TAG], limit=100)
            if any(annotation["text"] == text for annotation in told):
                return "unchanged"
            annotations.add_annotation(time_from=now_ms, time_to=now_ms, tags=[TAG, *tags], text=text)
            return "created"

    def _or_none(self, ask: Callable[[], Any]) -> Any | None:
        """None for what is not there."""
        try:
            return ask()
        except Exception as error:
            if getattr(error, "status_code", None) == HTTPStatus.NOT_FOUND:
                return None
            raise

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """The clients raise their HTTP library's errors besides their own; neither says what to do."""
        try:
            yield
        except GrafanaFailed:
            raise
        except Exception as error:
            status = getattr(error, "status_code", None)
            if not isinstance(error, OSError | ValueError | LookupError | TypeError) and status is None:
                raise
            raise GrafanaFailed(f"{self._name}: {_reason(error, status)} ({what})") from None


def _reason(error: Exception, status: int | None) -> str:
    if status == HTTPStatus.UNAUTHORIZED:
        return "it does not know the token: GRAFANA_TOKEN must be that of a service account"
    if status == HTTPStatus.FORBIDDEN:
        return "the token may not do this: its service account needs the role Editor, Admin for a data source"
    if status == HTTPStatus.NOT_FOUND:
        return "it answered 404: the path is not Grafana's, or this Grafana no longer has the API under /api"
    if status:
        return f"it answered {status}: {_message(error)}"
    if type(error).__name__ in ("JSONDecodeError", "KeyError", "TypeError"):
        return "its answer is not what Grafana says"
    return f"it cannot be reached ({type(error).__name__})"


def _message(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("message", "")) if isinstance(response, Mapping) else "no reason given"


def _numbers(version: str) -> tuple[int, ...]:
    """ "12.1.0-pre" as (12, 1, 0)."""
    parts = version.split("-")[0].split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _is_same(found: Mapping[str, Any], document: Mapping[str, Any], folder_uid: str) -> bool:
    """Grafana adds an id and counts versions."""
    there = {name: value for name, value in found["dashboard"].items() if name not in ("id", "version")}
    return there == document and found.get("meta", {}).get("folderUid") == folder_uid
