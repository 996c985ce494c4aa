"""A Grafana of a few pages: it keeps what is put into it, and every request that it got."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "glsa_a-token-nobody-may-see"


@dataclass
class FakeGrafana:
    """``prefix``: the path that it lies under. ``refuses``: path prefix -> status that it answers instead."""

    version: str | None = "13.1.0"
    prefix: str = ""
    refuses: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    folders: list[dict[str, Any]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    dashboards: dict[str, dict[str, Any]] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @property
    def writes(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.requests if method != "GET"]

    def answer(self, method: str, url: str, token: str | None, body: Any) -> tuple[int, Any]:
        """Status and JSON; a page that is not JSON comes as a string."""
        path, query = unquote(urlsplit(url).path), parse_qs(urlsplit(url).query)
        self.requests.append((method, path, body))
        if not path.startswith(f"{self.prefix}/api/"):
            return 404, "<html>no page</html>"
        path = path.removeprefix(f"{self.prefix}/api")
        for start, status in self.refuses.items():
            if path.startswith(start):
                return status, {"message": f"refused with {status}"}
        if path == "/health":
            return 200, "<html>hello</html>" if self.version is None else {"database": "ok", "version": self.version}
        if token != f"Bearer {TOKEN}":
            return 401, {"message": "Invalid API key"}
        return self._known(method, path, query, body) or (404, {"message": "Not found"})

    def _known(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any] | None:
        match method, path.strip("/").split("/"):
            case "GET", ["folders"]:
                return 200, self.folders
            case "POST", ["folders"]:
                self.folders.append({"id": len(self.folders) + 1, "uid": f"f{len(self.folders)}", **body})
                return 200, self.folders[-1]
            case "GET", ["datasources", "name", name]:
                return next(((200, source) for source in self.sources if source["name"] == name), None)
            case "POST", ["datasources"]:
                self.sources.append({"id": len(self.sources) + 1, **body})
                return 200, {"datasource": self.sources[-1]}
            case "PUT", ["datasources", *which]:
                source = next(s for s in self.sources if which in (["uid", s["uid"]], [str(s["id"])]))
                source.update(body)
                return 200, {"datasource": source}
            case "GET", ["dashboards", "uid", uid]:
                return (200, self.dashboards[uid]) if uid in self.dashboards else None
            case "POST", ["dashboards", "db"]:
                return 200, self._save(body)
            case "GET", ["annotations"]:
                began, ended, tags = int(query["from"][0]), int(query["to"][0]), set(query["tags"])
                return 200, [a for a in self.annotations if began <= a["time"] <= ended and tags <= set(a["tags"])]
            case "POST", ["annotations"]:
                self.annotations.append({"id": len(self.annotations) + 1, **body})
                return 200, {"id": len(self.annotations)}
        return None

    def _save(self, body: dict[str, Any]) -> dict[str, Any]:
        uid = body["dashboard"]["uid"]
        version = self.dashboards.get(uid, {"dashboard": {"version": 0}})["dashboard"]["version"] + 1
        dashboard = {**body["dashboard"], "id": 7, "version": version}
        self.dashboards[uid] = {"dashboard": dashboard, "meta": {"folderUid": body["folderUid"]}}
        return {"uid": uid, "version": version, "status": "success"}


@contextmanager
def serving(grafana: FakeGrafana) -> Iterator[FakeGrafana]:
    """``grafana`` on a port of its own, at ``grafana.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"null")
            status, said = grafana.answer(self.command, self.path, self.headers.get("Authorization"), body)
            is_page = isinstance(said, str)
            data = said.encode() if is_page else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if is_page else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    grafana.url = f"http://127.0.0.1:{server.server_port}{grafana.prefix}"
    try:
        yield grafana
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
