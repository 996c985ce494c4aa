"""Serves the page, its scripts and styles, and the chart library as the installed ``plotly`` package ships it.

No build step and no other host: what lies in ``page/`` is what the browser gets. Requests name files in a table that is
read once, so there is no path to walk out of. The page itself is asked for anew each time (``no-cache`` with an ETag);
it names its files below a version that is made from their contents, so these may be cached for ever. The page shows
nothing by itself: the data comes from ``/admin/v1``, which asks for the admin key.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

CHARTS = "plotly.min.js"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FOR_EVER = "public, max-age=31536000, immutable"
ASK_ANEW = "no-cache"

# plotly makes an empty <style> element, whose rules it adds by script, and sets one style attribute on an invisible
# image to ask what the browser can do. These two, by their digests, are the only inline styles; inline script: none.
_EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
_IMAGE_STYLE = "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' 'unsafe-hashes' {_EMPTY_STYLE} {_IMAGE_STYLE}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it is sent. ``zipped``: compressed with gzip."""

    body: bytes
    zipped: bytes
    media_type: str
    digest: str


@dataclass(frozen=True, slots=True)
class Site:
    """Everything below /dashboard. ``version`` changes with any of the files."""

    page: Asset
    files: Mapping[str, Asset]
    version: str


def install(app: FastAPI) -> None:
    """Add ``/dashboard`` and its files to ``app``; they are read, once, when the first request comes."""

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard(request: Request) -> Response:
        site = await asyncio.to_thread(load)
        return answer(request, site.page, ASK_ANEW)

    @app.get("/dashboard/", include_in_schema=False)
    async def with_slash() -> Response:
        return RedirectResponse("../dashboard", 308)  # relative: the service may lie below a route prefix

    @app.get("/dashboard/static/{version}/{name}", include_in_schema=False)
    async def static(request: Request, version: str, name: str) -> Response:
        site = await asyncio.to_thread(load)
        asset = site.files.get(name)
        if asset is None:
            raise HTTPException(404, f"the dashboard has no file {name[:64]!r}")
        # While an upgrade rolls, a page of one version may ask an ingress of another: it gets what there is, uncached.
        return answer(request, asset, FOR_EVER if version == site.version else ASK_ANEW)


def answer(request: Request, asset: Asset, cache_control: str) -> Response:
    """The file, compressed where the browser accepts that, or 304 when it has it already."""
    is_zipped = _accepts_gzip(request.headers.get("accept-encoding", ""))
    plain_tag, zipped_tag = f'"{asset.digest}"', f'"{asset.digest}-gzip"'
    headers = {
        **HEADERS,
        "cache-control": cache_control,
        "etag": zipped_tag if is_zipped else plain_tag,
        "vary": "accept-encoding",
    }
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {plain_tag, zipped_tag, "*"}:
        return Response(status_code=304, headers=headers)
    if is_zipped:
        headers["content-encoding"] = "gzip"
    return Response(asset.zipped if is_zipped else asset.body, headers=headers, media_type=asset.media_type)


@cache
def load() -> Site:
    """Read and compress everything: about a second of CPU, for the chart library, so call it in a thread."""
    folder = resources.files("fairserve.observe.dashboard") / "page"
    bodies = {entry.name: entry.read_bytes() for entry in folder.iterdir() if _suffix(entry.name) in MEDIA_TYPES}
    page = bodies.pop("index.html")
    charts = charts_path()
    if charts is not None:
        bodies[CHARTS] = charts.read_bytes()
    files = {name: _asset(name, body) for name, body in bodies.items()}
    version = _digest(b"".join(f"{name} {files[name].digest}\n".encode() for name in sorted(files)))
    return Site(_asset("index.html", page.replace(b"{{version}}", version.encode())), files, version)


def charts_path() -> Path | None:
    """Where plotly keeps its script, without importing plotly; None where it is not installed: the page says so."""
    spec = find_spec("plotly")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0], "package_data", CHARTS) if places else None
    return path if path and path.is_file() else None


def _asset(name: str, body: bytes) -> Asset:
    return Asset(body, gzip.compress(body, 6, mtime=0), MEDIA_TYPES[_suffix(name)], _digest(body))


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:20]


def _suffix(name: str) -> str:
    return Path(name).suffix


def _accepts_gzip(accepted: str) -> bool:
    for part in accepted.lower().split(","):
        coding, _, quality = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
