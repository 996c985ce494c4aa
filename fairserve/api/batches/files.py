"""What clients uploaded and what batches made for them. A file belongs to one client, and to others it is not there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from fairserve.api.batches.disk import Disk, read_json
from fairserve.errors import InvalidRequest, UnknownFile

logger = logging.getLogger(__name__)

Purpose = Literal["batch", "batch_output"]
FILE_ID = re.compile(r"file-[0-9a-f]{32}")
MAX_UPLOADS = 4
"""Files that one client may be sending at a time."""
STALE_S = 3600.0
"""Age at which what somebody began to write and never finished is taken away."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file. Times are Unix seconds."""

    id: str
    owner: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_s: int
    expires_s: int


@dataclass(frozen=True, slots=True)
class FileLimits:
    """Of one client."""

    max_file_bytes: int
    max_bytes: int
    max_files: int


class Files(Protocol):
    """Where files are kept. Every method may block, and raises OSError where the store cannot be reached.

    Methods that name a file raise UnknownFile where ``owner`` has none of that id.
    """

    def begin(self, owner: str) -> tuple[str, Path, int]:
        """A new id, where to write the content, and how many bytes it may have.

        Raises:
            InvalidRequest: the client has as many files, bytes or unfinished uploads as it may.
        """
        ...

    def commit(self, record: FileRecord) -> FileRecord:
        """The content is written: from now on the file is there, or it is not and never will be.

        Raises:
            InvalidRequest: others of the client have come before, and now it is too much.
        """
        ...

    def abandon(self, owner: str, file_id: str) -> None:
        """The upload came to nothing."""
        ...

    def adopt(self, record: FileRecord, content: Path) -> None:
        """Keep what a batch made; a repeat changes nothing. No limit holds: the answers have been paid for."""
        ...

    def of(self, owner: str) -> list[FileRecord]:
        """All files of the client, oldest first."""
        ...

    def get(self, owner: str, file_id: str) -> FileRecord: ...

    def open(self, owner: str, file_id: str) -> BinaryIO: ...

    def path(self, owner: str, file_id: str) -> Path: ...

    def delete(self, owner: str, file_id: str) -> None: ...

    def sweep(self) -> None:
        """Take away what has expired."""
        ...


class FileFolder:
    """:class:`Files` in a folder: ``clients/<SHA-256 of the owner>/files/``, an id's content and, as ``.json``, what is
    known of it. The record comes last and goes first, so that a crash leaves content that nobody sees, and the sweep
    takes away. A client's name is no path: two that differ in case only are two on every file system."""

    def __init__(
        self, root: Path, limits: FileLimits, *, unix_time_s: Callable[[], float] = time.time, disk: Disk | None = None
    ) -> None:
        self._root = root
        self._limits = limits
        self._unix_time_s = unix_time_s
        self._disk = disk or Disk()

    def begin(self, owner: str) -> tuple[str, Path, int]:
        folder = self._folder(owner)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [record.num_bytes for record in self.of(owner)]
        drafts = [path.stat().st_size for path in folder.glob("*.part")]
        left = 1 + self._check(len(sizes) + len(drafts) + 1, sum(sizes) + sum(drafts) + 1)
        if len(drafts) >= MAX_UPLOADS:
            raise InvalidRequest(f"you are sending {len(drafts)} files already, the most at a time", code="file_limit")
        file_id = new_file_id()
        return file_id, self._part(owner, file_id), min(left, self._limits.max_file_bytes)

    def commit(self, record: FileRecord) -> FileRecord:
        part, content = self._part(record.owner, record.id), self._content(record.owner, record.id)
        self._disk.settle(part)
        part.replace(content)
        self._disk.write(self._record(record.owner, record.id), asdict(record))
        records = self.of(record.owner)
        try:  # two that came at the same time have each seen the other's room
            self._check(len(records), sum(one.num_bytes for one in records))
        except InvalidRequest:
            self._remove(record.owner, record.id)
            raise
        return record

    def abandon(self, owner: str, file_id: str) -> None:
        self._part(owner, file_id).unlink(missing_ok=True)

    def adopt(self, record: FileRecord, content: Path) -> None:
        target = self._content(record.owner, record.id)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._disk.link(content, target)
        os.utime(target)  # it may have waited long for somebody to go on here, and no sweep may come in between
        self._disk.write(self._record(record.owner, record.id), asdict(record))

    def of(self, owner: str) -> list[FileRecord]:
        records = [self._read(path, owner) for path in self._folder(owner).glob("file-*.json")]
        return sorted((one for one in records if one is not None), key=lambda one: (one.created_s, one.id))

    def get(self, owner: str, file_id: str) -> FileRecord:
        record = self._read(self._record(owner, file_id), owner) if FILE_ID.fullmatch(file_id) else None
        if record is None:
            raise UnknownFile(file_id[:64])
        return record

    def open(self, owner: str, file_id: str) -> BinaryIO:
        try:
            return self.path(owner, file_id).open("rb")
        except FileNotFoundError:  # deleted since
            raise UnknownFile(file_id[:64]) from None

    def path(self, owner: str, file_id: str) -> Path:
        return self._content(owner, self.get(owner, file_id).id)

    def delete(self, owner: str, file_id: str) -> None:
        self._remove(owner, self.get(owner, file_id).id)

    def sweep(self) -> None:
        now_s = self._unix_time_s()
        for folder in self._root.glob("clients/*/files"):
            for path in list(folder.iterdir()):
                if path.suffix == ".json" and not path.name.startswith("."):
                    record = read_json(path)
                    is_over = record is not None and record["expires_s"] <= now_s
                    if is_over:
                        path.with_suffix("").unlink(missing_ok=True)
                else:  # content without a record, a draft, an upload that broke off
                    has_record = path.with_name(f"{path.name}.json").exists()
                    is_over = not has_record and _age_s(path, now_s) > STALE_S
                if is_over:
                    path.unlink(missing_ok=True)

    def _check(self, num_files: int, num_bytes: int) -> int:
        """Bytes that are left."""
        limits = self._limits
        if num_files > limits.max_files:
            detail = f"a client may have {limits.max_files} files, and this is one more: delete some"
            raise InvalidRequest(detail, code="file_limit")
        if num_bytes > limits.max_bytes:
            detail = f"the files of a client may have {limits.max_bytes} bytes in all, and these are more: delete some"
            raise InvalidRequest(detail, code="file_limit")
        return limits.max_bytes - num_bytes

    def _read(self, path: Path, owner: str) -> FileRecord | None:
        data = read_json(path)
        if data is None or data["expires_s"] <= self._unix_time_s():
            return None
        record = FileRecord(**data)
        return record if record.owner == owner else None

    def _remove(self, owner: str, file_id: str) -> None:
        self._record(owner, file_id).unlink(missing_ok=True)
        self._content(owner, file_id).unlink(missing_ok=True)

    def _folder(self, owner: str) -> Path:
        return client_folder(self._root, owner) / "files"

    def _content(self, owner: str, file_id: str) -> Path:
        return self._folder(owner) / file_id

    def _record(self, owner: str, file_id: str) -> Path:
        return self._folder(owner) / f"{file_id}.json"

    def _part(self, owner: str, file_id: str) -> Path:
        return self._folder(owner) / f"{file_id}.part"


def client_folder(root: Path, owner: str) -> Path:
    return root / "clients" / hashlib.sha256(owner.encode()).hexdigest()[:32]


def new_file_id() -> str:
    return f"file-{secrets.token_hex(16)}"


def _age_s(path: Path, now_s: float) -> float:
    try:
        return now_s - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
