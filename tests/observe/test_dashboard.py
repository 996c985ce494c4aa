"""The dashboard as it is served: caching, compression, what a browser may do with it, and no way out of the folder."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI

from fairserve.observe import dashboard
from fairserve.observe.dashboard import serving

SCRIPTS = (
    "main.js",
    "charts.js",
    "clients.js",
    "budgets.js",
    "store.js",
    "panels.js",
    "theme.js",
    "style.css",
    "icon.svg",
)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI(redirect_slashes=False, openapi_url=None)
    dashboard.install(app)
    return app


@pytest.fixture
def http(app: FastAPI) -> httpx.AsyncClient:
    headers = {"accept-encoding": "identity"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door", headers=headers)


def static(name: str) -> str:
    return f"/dashboard/static/{serving.load().version}/{name}"


async def test_the_page_names_only_files_that_are_served(http: httpx.AsyncClient) -> None:
    page = (await http.get("/dashboard")).text
    named = re.findall(r'(?:src|href)="(dashboard/static/[^"]+)"', page)
    assert len(named) == 5 and "{{" not in page
    for path in named:
        assert (await http.get(f"/{path}")).status_code == 200, path


async def test_scripts_import_only_files_that_are_served(http: httpx.AsyncClient) -> None:
    for name in serving.load().files:
        if name.endswith(".js") and name != serving.CHARTS:
            for imported in re.findall(r'from "\./([^"]+)"', (await http.get(static(name))).text):
                assert imported in serving.load().files, (name, imported)


async def test_nothing_comes_from_another_host() -> None:
    site = serving.load()
    own = {name: asset.body.decode() for name, asset in site.files.items() if name != serving.CHARTS}
    for name, text in {**own, "index.html": site.page.body.decode()}.items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], name


async def test_the_page_is_asked_for_anew_and_its_files_are_kept_for_ever(http: httpx.AsyncClient) -> None:
    assert (await http.get("/dashboard")).headers["cache-control"] == "no-cache"
    assert "immutable" in (await http.get(static("main.js"))).headers["cache-control"]


async def test_a_file_of_another_version_is_served_but_not_kept(http: httpx.AsyncClient) -> None:
    answer = await http.get("/dashboard/static/0123abc/main.js")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")


@pytest.mark.parametrize("path", ["/dashboard", "main.js", serving.CHARTS])
async def test_what_the_browser_has_is_not_sent_again(http: httpx.AsyncClient, path: str) -> None:
    url = path if path.startswith("/") else static(path)
    tag = (await http.get(url)).headers["etag"]
    again = await http.get(url, headers={"if-none-match": f'"other", W/{tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert (await http.get(url, headers={"if-none-match": '"other"'})).status_code == 200


async def test_the_chart_library_is_the_one_of_the_package_and_compressed_where_that_is_accepted(
    http: httpx.AsyncClient,
) -> None:
    path = serving.charts_path()
    assert path is not None
    async with http.stream("GET", static(serving.CHARTS), headers={"accept-encoding": "br, gzip;q=0.5"}) as answer:
        raw = b"".join([part async for part in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip" and answer.headers["vary"] == "accept-encoding"
    assert gzip.decompress(raw) == path.read_bytes()
    assert len(raw) < 1_600_000
    plain = await http.get(static(serving.CHARTS), headers={"accept-encoding": "gzip;q=0, identity"})
    assert "content-encoding" not in plain.headers and plain.content == path.read_bytes()
    assert plain.headers["etag"] != answer.headers["etag"]


@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_answer_forbids_inline_scripts_and_other_hosts(http: httpx.AsyncClient, name: str) -> None:
    for url in ("/dashboard", static(name)):
        headers = (await http.get(url)).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'" and rules["connect-src"] == "'self'"
        assert "unsafe-inline" not in headers["content-security-policy"] and "http" not in rules["style-src"]
        assert rules["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


async def test_the_page_has_no_inline_script_and_no_inline_style() -> None:
    page = serving.load().page.body.decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"\s(?:on\w+|style)=", page) == [] and "<style" not in page


@pytest.mark.parametrize(
    "name",
    [
        "../serving.py",
        "..%2fserving.py",
        "%2e%2e%2f%2e%2e%2fmetrics.py",
        "....//x",
        "%2fetc%2fpasswd",
        "index.html",
        "",
    ],
)
async def test_there_is_no_way_out_of_the_folder(app: FastAPI, name: str) -> None:
    # By hand, since a client would tidy the path up first.
    path = f"/dashboard/static/v/{name}"
    answers: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    from urllib.parse import unquote

    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": [], "scheme": "http", "server": ("door", 80)}, receive, send)  # type: ignore[arg-type]
    assert answers[0]["status"] == 404


async def test_a_slash_too_many_leads_back_below_the_route_prefix(http: httpx.AsyncClient) -> None:
    answer = await http.get("/dashboard/")
    assert (answer.status_code, answer.headers["location"]) == (308, "../dashboard")


def test_serving_the_page_does_not_import_plotly() -> None:
    code = (
        "import sys; from fairserve.observe.dashboard import serving; site = serving.load();"
        "assert serving.CHARTS in site.files and 'plotly' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_without_the_package_the_page_comes_and_the_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, http: httpx.AsyncClient
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    bare = serving.load.__wrapped__()
    monkeypatch.setattr(serving, "load", lambda: bare)
    assert (await http.get("/dashboard")).status_code == 200
    missing = await http.get(f"/dashboard/static/{bare.version}/{serving.CHARTS}")
    assert missing.status_code == 404 and serving.CHARTS in missing.text
