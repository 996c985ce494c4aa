"""Files and batches of one ingress process, as the routes ask for them. Blocking work is done in threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from starlette.requests import Request

from fairserve.api.batches.answers import file_object, page
from fairserve.api.batches.asking import Asking, batch_client
from fairserve.api.batches.bodies import WINDOW_S, BatchPage, BatchRequest, FilePage, keep_s_of
from fairserve.api.batches.disk import Disk, Json
from fairserve.api.batches.files import FileFolder, FileLimits, FileRecord
from fairserve.api.batches.hold import Hold
from fairserve.api.batches.keeper import BatchKeeper
from fairserve.api.batches.runner import Runner
from fairserve.api.batches.store import BatchRecord, BatchStore, new_batch_id
from fairserve.api.batches.uploads import receive
from fairserve.api.identity import Client
from fairserve.api.service import OpenAIService
from fairserve.clock import Clock, SystemClock
from fairserve.config import BatchesConfig
from fairserve.errors import ConfigError, InvalidRequest, StorageFailed

READ_BYTES = 1 << 18
FORM_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class BatchService:
    """
    Args:
        config: with a directory.
        service: answers the lines.
        clock: for leases.
        unix_time_s: for times that callers see, and expiry.
        pause: waits for so many seconds.

    Raises:
        ConfigError: the directory cannot be written, or its file system has no hard links.
    """

    def __init__(
        self,
        config: BatchesConfig,
        service: OpenAIService,
        *,
        clock: Clock | None = None,
        unix_time_s: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        disk: Disk | None = None,
    ) -> None:
        assert config.directory is not None
        root = _usable(config.directory)
        limits = FileLimits(config.max_file_bytes, config.max_client_bytes, config.max_client_files)
        self._config = config
        self._service = service
        self._unix_time_s = unix_time_s
        self._files = FileFolder(root, limits, unix_time_s=unix_time_s, disk=disk)
        self._store = BatchStore(root, self._files, unix_time_s=unix_time_s, disk=disk)
        self._ask = Asking(service, pause)
        self.keeper = BatchKeeper(
            self._store,
            self._files,
            self._runner,
            config.lease_s,
            clock=clock or SystemClock(),
            unix_time_s=unix_time_s,
            pause=pause,
        )

    # -- files --------------------------------------------------------------------------------------------------------

    async def upload(self, client: Client, request: Request) -> Json:
        """
        Raises:
            InvalidRequest: the form is wrong, or the client has too many files.
            BodyTooLarge, BodyTooSlow, WrongContentType: see :func:`uploads.receive`.
        """
        with _storage():
            file_id, path, max_bytes = await asyncio.to_thread(self._files.begin, client.name)
            try:
                form = await receive(request, path, max_bytes, self._config.upload_timeout_s)
                _check_fields(form.fields)
                now_s = int(self._unix_time_s())
                expires_s = now_s + int(min(self._config.keep_s, keep_s_of(form.fields) or self._config.keep_s))
                name = form.filename or ""
                record = FileRecord(file_id, client.name, name, "batch", form.num_bytes, now_s, expires_s)
                return file_object(await asyncio.to_thread(self._files.commit, record))
            finally:
                with suppress(OSError):
                    self._files.abandon(client.name, file_id)

    async def files(self, client: Client, query: FilePage) -> Json:
        with _storage():
            records = await asyncio.to_thread(self._files.of, client.name)
        found = [file_object(one) for one in records if query.purpose in (None, one.purpose)]
        return page(found[::-1] if query.order == "desc" else found, query.after, query.limit)

    async def file(self, client: Client, file_id: str) -> Json:
        with _storage():
            return file_object(await asyncio.to_thread(self._files.get, client.name, file_id))

    async def content(self, client: Client, file_id: str) -> tuple[int, AsyncIterator[bytes]]:
        """Its size in bytes, and the content piece by piece."""
        with _storage():
            file = await asyncio.to_thread(self._files.open, client.name, file_id)
        return os.fstat(file.fileno()).st_size, _pieces(file)

    async def delete(self, client: Client, file_id: str) -> Json:
        with _storage():
            await asyncio.to_thread(self._files.delete, client.name, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    # -- batches ------------------------------------------------------------------------------------------------------

    async def create(self, client: Client, body: BatchRequest) -> Json:
        """
        Raises:
            UnknownFile: the client has no such file.
            InvalidRequest: the file is the result of a batch, or the client has too many unfinished batches.
        """
        now_s = int(self._unix_time_s())
        asked = body.output_expires_after
        with _storage():
            source = await asyncio.to_thread(self._files.get, client.name, body.input_file_id)
            if source.purpose != "batch":
                detail = f"input_file_id: must be a file with the purpose 'batch', this one has {source.purpose!r}"
                raise InvalidRequest(detail, param="input_file_id", code="invalid_value")
            record = BatchRecord(
                id=new_batch_id(),
                owner=client,
                endpoint=body.endpoint,
                model=self._service.model_name,
                input_file_id=body.input_file_id,
                completion_window=body.completion_window,
                metadata=body.metadata,
                created_s=now_s,
                expires_s=now_s + WINDOW_S,
                keep_s=min(self._config.keep_s, asked.seconds if asked else self._config.keep_s),
            )
            return await asyncio.to_thread(self._store.create, record, self._config.max_client_batches)

    async def batches(self, client: Client, query: BatchPage) -> Json:
        with _storage():
            found = await asyncio.to_thread(self._store.of, client.name)
        return page(found[::-1], query.after, query.limit)

    async def batch(self, client: Client, batch_id: str) -> Json:
        with _storage():
            return await asyncio.to_thread(self._store.view, client.name, batch_id)

    async def cancel(self, client: Client, batch_id: str) -> Json:
        """
        Raises:
            UnknownBatch: the client has none of that id.
            InvalidRequest: it is finished.
        """
        with _storage():
            return await asyncio.to_thread(self._store.cancel, client.name, batch_id)

    def _runner(self, hold: Hold) -> Runner:
        config = self._config
        return Runner(
            hold,
            self._ask,
            batch_client(hold.owner, config.weight),
            max_running=config.max_running,
            max_lines=config.max_lines,
            max_body_bytes=self._service.max_body_bytes,
            unix_time_s=self._unix_time_s,
        )


def _usable(directory: str) -> Path:
    root = Path(directory).expanduser()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("clients", "open"):
            (root / name).mkdir(mode=0o700, exist_ok=True)  # what clients wrote is nobody else's to read
        probe = root / f"probe-{os.getpid()}-{time.monotonic_ns()}"
        try:
            Disk().claim(probe, {})
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        detail = f"batches.directory {directory!r} must be a folder that can be written and has hard links"
        raise ConfigError(f"{detail}: {error.strerror}") from None
    return root


def _check_fields(fields: dict[str, str]) -> None:
    for name in fields:
        if name not in FORM_FIELDS:
            detail = f"unknown field {name!r}; known fields: file, {', '.join(FORM_FIELDS)}"
            raise InvalidRequest(detail, param=name, code="unknown_parameter")
    if fields.get("purpose") != "batch":
        code = "invalid_value" if "purpose" in fields else "missing_required_parameter"
        raise InvalidRequest("purpose: must be 'batch', the only one that files are kept for", "purpose", code)


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(file.read, READ_BYTES):
            yield piece
    finally:
        file.close()


@contextmanager
def _storage() -> Iterator[None]:
    """
    Raises:
        StorageFailed: the folder cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise StorageFailed(error.strerror or type(error).__name__) from error
