"""Files through the unmodified ``openai`` client, and uploads that are none."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request

from fairserve.api.batches.uploads import receive
from fairserve.config import BatchesConfig
from fairserve.errors import BodyTooSlow, ConfigError
from tests.api.batches.conftest import DAWN_S, Ingress, IngressMaker, files_below
from tests.api.conftest import ServiceMaker, http_of

CONTENT = b"a\r\n--no boundary\r\n\xff\x00" * 7


async def upload(ingress: Ingress, content: bytes = CONTENT, name: str = "in.jsonl", **more: Any) -> Any:
    return await ingress.client().files.create(file=(name, content), purpose="batch", **more)


async def test_a_file_comes_back_as_it_was_sent(ingress: Ingress) -> None:
    file = await upload(ingress, name="Größe \U0001f600.jsonl")
    assert (file.bytes, file.filename, file.purpose) == (len(CONTENT), "Größe \U0001f600.jsonl", "batch")
    assert (file.created_at, file.expires_at) == (int(DAWN_S), int(DAWN_S) + 30 * 86_400)
    client = ingress.client()
    assert await client.files.retrieve(file.id) == file
    answer = await client.files.content(file.id)
    assert answer.content == CONTENT and int(answer.response.headers["content-length"]) == len(CONTENT)
    assert (await client.files.delete(file.id)).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="you have no file"):
            await call(file.id)


async def test_files_outlive_the_process(make_ingress: IngressMaker) -> None:
    file = await upload(make_ingress())
    assert (await make_ingress().client().files.content(file.id)).content == CONTENT


async def test_files_are_listed_in_pages_and_by_purpose(ingress: Ingress) -> None:
    made = []
    for _ in range(5):
        made.append((await upload(ingress)).id)
        ingress.clock.advance(1.0)
    client = ingress.client()
    assert [one.id async for one in client.files.list(limit=2)] == made[::-1]
    assert [one.id async for one in client.files.list(limit=2, order="asc")] == made
    page = await client.files.list(after=made[2], limit=1)
    assert [one.id for one in page.data] == [made[1]] and page.has_more
    assert not (await client.files.list(purpose="batch_output")).data
    assert not (await client.files.list(after="file-unknown")).data


async def test_a_file_expires_when_it_was_told_to_and_never_later_than_the_service_keeps_files(
    make_ingress: IngressMaker,
) -> None:
    ingress = make_ingress(keep_s=7_200.0)
    short = await upload(ingress, expires_after={"anchor": "created_at", "seconds": 3_600})
    long = await upload(ingress, expires_after={"anchor": "created_at", "seconds": 86_400})
    assert (short.expires_at - short.created_at, long.expires_at - long.created_at) == (3_600, 7_200)
    ingress.clock.advance(3_601.0)
    client = ingress.client()
    assert [one.id for one in (await client.files.list()).data] == [long.id]
    with pytest.raises(openai.NotFoundError):
        await client.files.content(short.id)


async def test_limits_hold_for_each_client_by_itself(make_ingress: IngressMaker) -> None:
    ingress = make_ingress(max_file_bytes=100, max_client_bytes=250, max_client_files=3)
    with pytest.raises(openai.APIStatusError, match="more than 100 bytes") as refused:
        await upload(ingress, b"x" * 101)
    assert refused.value.status_code == 413
    kept = [await upload(ingress, b"x" * 100) for _ in range(2)]
    with pytest.raises(openai.APIStatusError, match="more than 50 bytes"):
        await upload(ingress, b"x" * 51)
    await upload(ingress, b"x" * 50)
    with pytest.raises(openai.BadRequestError, match="may have 3 files"):
        await upload(ingress, b"x")
    await ingress.client("bob").files.create(file=("x", b"x" * 100), purpose="batch")
    await ingress.client().files.delete(kept[0].id)
    await upload(ingress, b"x" * 100)


async def test_uploads_at_the_same_time_cannot_pass_the_limit_together(make_ingress: IngressMaker) -> None:
    ingress = make_ingress(max_client_files=2)
    ends = await asyncio.gather(*(upload(ingress) for _ in range(4)), return_exceptions=True)
    assert len((await ingress.client().files.list()).data) <= 2
    assert sum(isinstance(end, openai.BadRequestError) for end in ends) >= 2


HEAD = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n{}\r\n'

END = b"--B--\r\n"


def field(name: str, value: str) -> bytes:
    return f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "breaks off"),
        (HEAD + FILE, "breaks off"),
        (b"no form at all", "no multipart form"),
        (HEAD + END, "file: is missing"),
        (FILE + END, "purpose: must be 'batch'"),
        (field("purpose", "fine-tune") + FILE + END, "purpose: must be 'batch'"),
        (HEAD + field("file", "{}") + END, "must be a file with a name"),
        (HEAD + FILE + FILE + END, "one file at a time"),
        (HEAD + HEAD + FILE + END, "is given twice"),
        (HEAD + FILE + field("prupose", "x") + END, "unknown field 'prupose'"),
        (HEAD + FILE + field("purpose2", "x" * 2_000) + END, "more than 1024 bytes"),
        (HEAD + FILE + b"".join(field(str(i), "x") for i in range(20)) + END, "more than 16 parts"),
        (HEAD + FILE + field("expires_after[anchor]", "now") + END, "expires_after"),
        (HEAD + FILE + field("expires_after[seconds]", "5") + END, "expires_after"),
        (
            HEAD + FILE + field("expires_after[anchor]", "created_at") + field("expires_after[seconds]", "5") + END,
            "from 3600 to 2592000",
        ),
    ],
)  # fmt: skip
async def test_a_wrong_form_is_told_what_is_wrong_and_leaves_nothing(
    ingress: Ingress, tmp_path: Path, body: bytes, told: str
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=B", "authorization": "Bearer ann"}
    async with http_of(ingress.app, **headers) as http:
        answer = await http.post("/v1/files", content=body)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text
    assert not files_below(tmp_path)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain; boundary=B"])
async def test_an_upload_must_say_that_it_is_a_form(ingress: Ingress, kind: str) -> None:
    async with http_of(ingress.app, **{"content-type": kind, "authorization": "Bearer ann"}) as http:
        assert (await http.post("/v1/files", content=HEAD + FILE + END)).status_code == 415


async def test_strangers_are_sent_away_before_a_byte_is_read(make_ingress: IngressMaker, tmp_path: Path) -> None:
    ingress = make_ingress(api={"keys": [{"client": "ann", "key": "secret-of-ann"}]})

    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    headers = {"content-type": "multipart/form-data; boundary=B"}
    async with http_of(ingress.app, **headers) as http:
        for method, path in (
            ("POST", "/v1/files"),
            ("GET", "/v1/files"),
            ("GET", "/v1/files/x/content"),
            ("DELETE", "/v1/files/x"),
            ("POST", "/v1/batches"),
            ("GET", "/v1/batches?limit=x"),
            ("POST", "/v1/batches/x/cancel"),
        ):
            content = never() if method == "POST" else None
            assert (await http.request(method, path, content=content)).status_code == 401, path


@pytest.mark.parametrize(
    "file_id", ["..", "../../open", "file-" + "0" * 31 + "/", "%2e%2e", "file-" + "0" * 32 + ".json"]
)
async def test_no_id_leads_out_of_the_owners_folder(ingress: Ingress, file_id: str) -> None:
    await upload(ingress)
    async with http_of(ingress.app, authorization="Bearer ann") as http:
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{file_id}"):
            assert (await http.get(httpx.URL("http://fairserve").copy_with(path=path))).status_code in (404, 405)


def request_of(*chunks: bytes | asyncio.Event) -> Request:
    pieces = list(chunks)

    async def come() -> dict[str, Any]:
        piece = pieces.pop(0)
        if isinstance(piece, asyncio.Event):
            await piece.wait()
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = [(b"content-type", b"multipart/form-data; boundary=B")]
    return Request({"type": "http", "headers": headers}, come)  # type: ignore[arg-type]


async def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    piece = b"x" * 65_536
    request = request_of(HEAD + FILE.replace(b"{}\r\n", b""), *[piece] * 512, b"\r\n" + END)
    tracemalloc.start()
    try:
        form = await receive(request, tmp_path / "file", 10**9, 60.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert form.num_bytes == 512 * 65_536 == (tmp_path / "file").stat().st_size
    assert peak < 8 * 2**20


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_it_does_not_matter_how_a_form_is_cut(tmp_path: Path, size: int) -> None:
    body = HEAD + FILE.replace(b"{}", CONTENT) + END
    form = await receive(
        request_of(*(body[i : i + size] for i in range(0, len(body), size))), tmp_path / "f", 10**6, 60.0
    )
    assert (tmp_path / "f").read_bytes() == CONTENT and form.fields == {"purpose": "batch"}


async def test_an_upload_that_does_not_come_in_time_ends(tmp_path: Path) -> None:
    with pytest.raises(BodyTooSlow):
        await receive(request_of(HEAD, asyncio.Event()), tmp_path / "f", 10**6, 0.01)


def test_a_directory_that_cannot_be_written_is_a_wrong_setting(make_service: ServiceMaker, tmp_path: Path) -> None:
    from fairserve.api.batches.service import BatchService

    (tmp_path / "file").write_text("")
    config = BatchesConfig(directory=str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=r"batches\.directory"):
        BatchService(config, make_service())
