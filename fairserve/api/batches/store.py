"""All batches of a folder: made, shown, cancelled, and held by the one who runs them.

::

    open/BATCH.json                     the batch is not finished: {owner, created_s}
    clients/HASH/batches/BATCH/
        batch.json                      what was asked for; written last, so the batch is there as a whole
        input.jsonl                     second name of the uploaded file, which may be deleted meanwhile
        cancel.json                     somebody wants it cancelled
        lease.N  progress.N  journal.N  of the N-th holder
        output.N  errors.N              made by the N-th holder when all is answered
        decided.json                    how it ended; can be created once
        final.json                      second name of it, once the files that it names are there
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fairserve.api.batches.disk import Disk, Json, read_json
from fairserve.api.batches.files import STALE_S, FileRecord, Files, client_folder
from fairserve.api.batches.hold import Hold
from fairserve.api.batches.usage import NO_USAGE
from fairserve.api.identity import Client
from fairserve.errors import InvalidRequest, UnknownBatch

BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
ENDED = ("failed", "completed", "expired", "cancelled")
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What was asked for. Times are Unix seconds."""

    id: str
    owner: Client
    """As its key was when the batch was made."""
    endpoint: str
    model: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    created_s: int
    expires_s: int
    """What is not answered by then never will be."""
    keep_s: float
    """For how long the results are kept."""


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that is not finished, as an ingress sees it."""

    id: str
    owner: str
    created_s: int
    lease: int
    """Number of the newest lease; 0: nobody has taken it up yet."""
    beat: int
    """What its holder wrote last."""
    is_free: bool = False
    """Its holder has given the lease back."""


class BatchStore:
    """Every method may block, and raises OSError where the folder cannot be reached."""

    def __init__(
        self, root: Path, files: Files, *, unix_time_s: Callable[[], float] = time.time, disk: Disk | None = None
    ) -> None:
        self._root = root
        self._files = files
        self._unix_time_s = unix_time_s
        self._disk = disk or Disk()
        self._markers: dict[str, Json] = {}
        """Of open batches, which never change."""

    # -- for those who own them ---------------------------------------------------------------------------------------

    def create(self, record: BatchRecord, max_open: int) -> Json:
        """
        Raises:
            InvalidRequest: the client has ``max_open`` unfinished batches already.
            UnknownFile: it has no such file.
        """
        owner = record.owner.name
        if sum(marker["owner"] == owner for marker in self._read_markers().values()) >= max_open:
            detail = f"you have {max_open} unfinished batches, the most at a time: wait for one or cancel one"
            raise InvalidRequest(detail, code="batch_limit")
        content = self._files.path(owner, record.input_file_id)
        folder = self._folder(owner, record.id)
        folder.mkdir(parents=True)
        self._disk.write(self._marker(record.id), {"owner": owner, "created_s": record.created_s})
        self._disk.link(content, folder / "input.jsonl")
        self._disk.write(folder / "batch.json", asdict(record))
        return self.view(owner, record.id)

    def view(self, owner: str, batch_id: str) -> Json:
        """OpenAI's Batch object.

        Raises:
            UnknownBatch: ``owner`` has none of that id.
        """
        folder = self._folder(owner, batch_id) if BATCH_ID.fullmatch(batch_id) else None
        record = None if folder is None else _record_in(folder)
        if folder is None or record is None or record.owner.name != owner:
            raise UnknownBatch(batch_id[:64])
        return _view(folder, record)

    def of(self, owner: str) -> list[Json]:
        """All batches of the client, oldest first."""
        folders = (client_folder(self._root, owner) / "batches").glob("batch_*")
        found = [_view(folder, one) for folder in folders if (one := _record_in(folder)) and one.owner.name == owner]
        return sorted(found, key=lambda view: (view["created_at"], view["id"]))

    def cancel(self, owner: str, batch_id: str) -> Json:
        """
        Raises:
            UnknownBatch: ``owner`` has none of that id.
            InvalidRequest: it is finished.
        """
        view = self.view(owner, batch_id)
        if view["status"] in ENDED:
            detail = f"the batch is {view['status']}: only one that is not finished can be cancelled"
            raise InvalidRequest(detail, code="batch_finished")
        self._disk.claim(self._folder(owner, batch_id) / "cancel.json", {"cancelling_at": int(self._unix_time_s())})
        return self.view(owner, batch_id)

    # -- for those who run them ---------------------------------------------------------------------------------------

    def open(self) -> list[OpenBatch]:
        """The batches that are not finished, oldest first."""
        found = []
        for batch_id, marker in self._read_markers().items():
            folder = self._folder(marker["owner"], batch_id)
            if (folder / "batch.json").exists():
                lease = newest(folder, "lease")
                held = (read_json(folder / f"lease.{lease}") or {}) if lease else {}
                beat, is_free = held.get("beat", 0), held.get("is_free", False)
                found.append(OpenBatch(batch_id, marker["owner"], marker["created_s"], lease, beat, is_free))
        return sorted(found, key=lambda one: (one.created_s, one.id))

    def claim(self, one: OpenBatch) -> Hold | None:
        """Become the holder after ``one.lease``. None: somebody else has, or the batch has ended."""
        folder = self._folder(one.owner, one.id)
        if self._publish(one, folder):
            return None
        record = _record_in(folder)
        if record is None or not self._disk.claim(folder / f"lease.{one.lease + 1}", {"beat": 1}):
            return None
        hold = Hold(
            folder,
            one.lease + 1,
            record.id,
            record.owner,
            record.endpoint,
            record.expires_s,
            record.keep_s,
            disk=self._disk,
        )
        return None if self._publish(one, folder) else hold  # it may have ended in between

    def publish(self, hold: Hold) -> None:
        """``hold`` has ended, or has seen that the batch has: let everybody see it."""
        self._publish(OpenBatch(hold.batch_id, hold.owner.name, 0, hold.number, 0), hold.folder)

    def sweep(self) -> None:
        """Forget batches whose time is over, and what was begun and never made."""
        now_s = self._unix_time_s()
        for folder in self._root.glob("clients/*/batches/batch_*"):
            record = _record_in(folder)
            if record is None:
                is_over = now_s - folder.stat().st_mtime > STALE_S
            else:
                is_over = (folder / "final.json").exists() and now_s > record.expires_s + record.keep_s
            if is_over:
                shutil.rmtree(folder, ignore_errors=True)
        for batch_id, marker in self._read_markers().items():
            if not self._folder(marker["owner"], batch_id).exists() and now_s - marker["created_s"] > STALE_S:
                self._marker(batch_id).unlink(missing_ok=True)

    def _publish(self, one: OpenBatch, folder: Path) -> bool:
        """Whether the batch has ended; if so, its files are there afterwards, and what it left behind is not. May be
        done by several, and again after a crash anywhere in here."""
        end = read_json(folder / "decided.json")
        if end is None:
            return False
        for part in ("output", "errors"):
            content = folder / f"{part}.{end['lease']}"
            if end[f"{part}_record"] is not None and content.exists():
                self._files.adopt(FileRecord(**end[f"{part}_record"]), content)
        self._disk.link(folder / "decided.json", folder / "final.json")
        for kind in ("lease", "progress", "journal", "output", "errors", "input"):
            for path in folder.glob(f"{kind}.*"):
                self._disk.remove(path)
        self._disk.remove(self._marker(one.id))
        return True

    def _read_markers(self) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for path in (self._root / "open").glob("batch_*.json"):
            marker = self._markers.get(path.stem) or read_json(path)
            if marker is not None:
                found[path.stem] = marker
        self._markers = found
        return found

    def _marker(self, batch_id: str) -> Path:
        return self._root / "open" / f"{batch_id}.json"

    def _folder(self, owner: str, batch_id: str) -> Path:
        return client_folder(self._root, owner) / "batches" / batch_id


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(16)}"


def newest(folder: Path, kind: str) -> int:
    """The largest N of the files ``kind``.N; 0 without any."""
    numbers = (path.suffix[1:] for path in folder.glob(f"{kind}.*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _record_in(folder: Path) -> BatchRecord | None:
    data = read_json(folder / "batch.json")
    if data is None:
        return None
    known = {one.name for one in fields(Client)}
    owner: dict[str, Any] = {name: _frozen(value) for name, value in data.pop("owner").items() if name in known}
    return BatchRecord(owner=Client(**owner), **data)


def _frozen(value: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _view(folder: Path, record: BatchRecord) -> Json:
    number = newest(folder, "progress")
    progress = read_json(folder / f"progress.{number}") or {}
    cancel = read_json(folder / "cancel.json")
    end = read_json(folder / "final.json")  # last: before it is there, nothing of the others goes
    none = {"request_counts": {"total": 0, "completed": 0, "failed": 0}, "usage": NO_USAGE.told()}
    state = {"status": "validating"} | (progress or none)
    if cancel is not None:
        state |= cancel | {"status": "cancelling"}
    if end is not None:
        state |= {"usage": None} | end  # which an older fairserve did not count
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": state.get("errors"),
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": state["status"],
        "output_file_id": state.get("output_file_id"),
        "error_file_id": state.get("error_file_id"),
        "created_at": record.created_s,
        "expires_at": record.expires_s,
        "request_counts": state["request_counts"],
        "usage": state.get("usage"),
        "metadata": record.metadata,
        **{f"{what}_at": state.get(f"{what}_at") for what in TIMES},
    }
