"""One ``multipart/form-data`` upload, read as it comes and written as it is read: never in memory as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from fairserve.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, WrongContentType

MAX_FIELD_BYTES = 1024
MAX_PARTS = 16
MAX_NAME_CHARS = 255
AROUND_FILE_BYTES = 64_000
"""What boundaries, headers and the other fields of a form may add to its file."""
WRITE_BYTES = 1 << 20
"""Collected before they are written, in a thread."""


@dataclass
class Form:
    """What came: the text fields, and the file's name and size."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    num_bytes: int = 0


class _Parts:
    """The parser's callbacks: text goes into the form, the content of the file is collected in ``pending``."""

    def __init__(self, max_file_bytes: int) -> None:
        self.form = Form()
        self.pending: list[bytes] = []
        self.num_pending = 0
        self.is_complete = False
        self._max_file_bytes = max_file_bytes
        self._num_parts = 0
        self._begin()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._complete,
        }

    def take(self) -> bytes:
        data = b"".join(self.pending)
        self.pending, self.num_pending = [], 0
        return data

    def _begin(self) -> None:
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._value = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (b"", b"")

    def _headers_finished(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts")
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""), "a field's name")[:64]
        self._is_file = self._name == "file"
        if not self._is_file:
            return
        if self.form.filename is not None:
            raise InvalidRequest("file: send one file at a time", param="file")
        if not options.get(b"filename"):
            raise InvalidRequest("file: must be a file with a name", param="file")
        self.form.filename = _text(options[b"filename"], "file")[:MAX_NAME_CHARS]

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if not self._is_file:
            self._value += piece
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"{self._name}: has more than {MAX_FIELD_BYTES} bytes", param=self._name)
            return
        self.form.num_bytes += len(piece)
        if self.form.num_bytes > self._max_file_bytes:
            raise BodyTooLarge(self._max_file_bytes)
        self.pending.append(piece)
        self.num_pending += len(piece)

    def _end(self) -> None:
        if not self._is_file:
            if self._name in self.form.fields:
                raise InvalidRequest(f"{self._name}: is given twice", param=self._name)
            self.form.fields[self._name] = _text(self._value, self._name)

    def _complete(self) -> None:
        self.is_complete = True


async def receive(request: Request, path: Path, max_file_bytes: int, limit_s: float) -> Form:
    """Write the file of the form to ``path``, which the caller removes if this fails.

    Raises:
        WrongContentType: the body is not declared as a form with a boundary.
        InvalidRequest: it is none, breaks off, or has too many or too large fields.
        BodyTooLarge: the file has more than ``max_file_bytes``.
        BodyTooSlow: it was not there as a whole after ``limit_s`` seconds.
        starlette.requests.ClientDisconnect: the client went away.
        OSError: it could not be written.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        shown = kind.decode("latin-1")[:64]
        raise WrongContentType(f"send a file as 'multipart/form-data' with a boundary, not {shown!r}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise WrongContentType(f"send the body uncompressed, not with 'Content-Encoding: {encoding[:64]}'")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_file_bytes + AROUND_FILE_BYTES):
        raise BodyTooLarge(max_file_bytes)
    file = await asyncio.to_thread(path.open, "wb")
    try:
        async with asyncio.timeout(limit_s):
            return await _read(request.stream(), options[b"boundary"], file, max_file_bytes)
    except TimeoutError:
        raise BodyTooSlow(limit_s) from None
    except FormParserError as error:
        raise InvalidRequest(f"the request body is no multipart form: {str(error)[:200]}") from None
    finally:
        await asyncio.to_thread(file.close)


async def _read(stream: AsyncIterator[bytes], boundary: bytes, file: BinaryIO, max_file_bytes: int) -> Form:
    parts = _Parts(max_file_bytes)
    parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
    num_around = 0
    async for chunk in stream:
        num_file = parts.form.num_bytes
        parser.write(chunk)
        num_around += len(chunk) - (parts.form.num_bytes - num_file)
        if num_around > AROUND_FILE_BYTES:
            raise BodyTooLarge(max_file_bytes)
        if parts.num_pending >= WRITE_BYTES:
            await asyncio.to_thread(file.write, parts.take())
    if not parts.is_complete:
        raise InvalidRequest("the form breaks off: its last boundary did not come")
    await asyncio.to_thread(file.write, parts.take())
    if parts.form.filename is None:
        raise InvalidRequest("file: is missing", param="file", code="missing_required_parameter")
    return parts.form


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what}: is not UTF-8") from None
