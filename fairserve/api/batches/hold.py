"""One ingress's hold on one batch: the journal of what is answered, signs of life, and the end of it.

A journal entry is one line: ``NUMBER OK ANSWER``, with the number of the input's line, 1 or 0, and the line of the
output or error file as it will stand there. An entry counts once its line break is on disk. Every holder has a journal
of its own, so a torn entry is always the last one of a file that nobody adds to any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from fairserve.api.batches.disk import Disk, Json, read_json
from fairserve.api.batches.files import FileRecord, new_file_id
from fairserve.api.batches.lines import (
    Answered,
    Line,
    Wrong,
    answer_line,
    parsed,
    read_lines,
    unanswered_line,
)
from fairserve.api.batches.usage import NO_USAGE, of_line
from fairserve.api.identity import Client

End = Literal["failed", "completed", "expired", "cancelled"]
UNANSWERED = {
    "expired": ("batch_expired", "The completion window was over before this request was answered."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
}


class Hold:
    """Made by :meth:`BatchStore.claim`. Methods may block, and raise OSError where the folder cannot be reached."""

    def __init__(
        self,
        folder: Path,
        number: int,
        batch_id: str,
        owner: Client,
        endpoint: str,
        expires_s: int,
        keep_s: float,
        *,
        disk: Disk,
    ) -> None:
        self.folder = folder
        self.number = number
        self.batch_id = batch_id
        self.owner = owner
        self.endpoint = endpoint
        self.expires_s = expires_s
        self._keep_s = keep_s
        self._disk = disk
        self._beat = 1
        self._is_torn = False
        """A write into the journal has begun and has not ended well."""

    @property
    def input(self) -> Path:
        return self.folder / "input.jsonl"

    def beat(self) -> None:
        """Give a sign of life."""
        self._beat += 1
        self._disk.write(self._own("lease"), {"beat": self._beat})

    def release(self) -> None:
        """Give the lease back: whoever sees it may go on at once."""
        if not self.is_lost():
            self._beat += 1
            self._disk.write(self._own("lease"), {"beat": self._beat, "is_free": True})

    def is_lost(self) -> bool:
        """Somebody else has the batch, or it has ended."""
        return (self.folder / f"lease.{self.number + 1}").exists() or (self.folder / "decided.json").exists()

    def is_cancelled(self) -> bool:
        return (self.folder / "cancel.json").exists()

    def tell(self, progress: Json) -> None:
        """Show how far it is."""
        self._disk.write(self._own("progress"), progress)

    def told(self) -> Json:
        """What the holders before have shown last, such as when it began."""
        for number in range(self.number - 1, 0, -1):
            if (progress := read_json(self.folder / f"progress.{number}")) is not None:
                return progress
        return {}

    def keep(self, answers: list[tuple[Line, Answered]]) -> None:
        """These lines are answered, for good, when this returns. When it fails, this hold keeps nothing any more: what
        came behind half an entry could not be read."""
        if self._is_torn:
            raise OSError("a write into the journal has failed before")
        entries = [
            f"{line.number} {int(answered.is_ok)} ".encode() + answer_line(self.batch_id, line, answered)
            for line, answered in answers
        ]
        self._is_torn = True
        self._disk.append(self._own("journal"), b"".join(entries))
        self._is_torn = False

    def answers(self) -> Iterator[tuple[int, bool, bytes]]:
        """Number, success and answer of every line that is answered, each once: the first answer holds."""
        seen: set[int] = set()
        for number in range(1, self.number + 1):
            path = self.folder / f"journal.{number}"
            if not path.exists():
                continue
            with path.open("rb") as file:
                for entry in file:
                    if not entry.endswith(b"\n"):
                        break  # torn: its line is not answered
                    head, ok, answer = entry.split(b" ", 2)
                    if int(head) not in seen:
                        seen.add(int(head))
                        yield int(head), ok == b"1", answer

    def finish(
        self, end: End, now_s: int, progress: Json, *, max_body_bytes: int, problems: list[Json] | None = None
    ) -> bool:
        """Make the files and decide how the batch ended. False: it has ended already, by another's doing."""
        records: dict[str, FileRecord | None] = {"output": None, "errors": None}
        sums = {name: progress[name] for name in ("request_counts", "usage")}
        if end != "failed":
            sums, records, is_whole = self._compose(end, now_s, max_body_bytes, sums["request_counts"]["total"])
            if end == "completed" and not is_whole:
                assert self.is_lost(), "an answer that was kept is gone"
                return False  # others have finished it, and taken the journals away meanwhile
        decided = progress | {
            "status": end,
            f"{end}_at": now_s,
            **sums,
            "errors": {"object": "list", "data": problems} if problems else None,
            "output_file_id": records["output"] and records["output"].id,
            "error_file_id": records["errors"] and records["errors"].id,
            "output_record": records["output"] and asdict(records["output"]),
            "errors_record": records["errors"] and asdict(records["errors"]),
            "lease": self.number,
        }
        return self._disk.claim(self.folder / "decided.json", decided)

    def _compose(
        self, end: End, now_s: int, max_body_bytes: int, total: int
    ) -> tuple[Json, dict[str, FileRecord | None], bool]:
        """Every line of the input once, in one of the two files. Sums, files, and whether each line is in one."""
        output, errors = self._own("output"), self._own("errors")
        done: set[int] = set()
        num_ok, used = 0, NO_USAGE
        with output.open("wb") as to_output, errors.open("wb") as to_errors:
            for number, ok, answer in self.answers():
                done.add(number)
                if ok:
                    num_ok, used = num_ok + 1, used + of_line(answer)
                (to_output if ok else to_errors).write(answer)
            num_failed = len(done) - num_ok
            for number, raw in read_lines(self.input, max_body_bytes) if end in UNANSWERED else ():
                if number not in done:
                    done.add(number)
                    to_errors.write(self._unanswered(number, raw, end))
        made: dict[str, FileRecord | None] = {}
        for part, path in (("output", output), ("errors", errors)):
            self._disk.settle(path)
            made[part] = self._record(part, path.stat().st_size, now_s) if path.stat().st_size else None
        counts = {"total": total or len(done), "completed": num_ok, "failed": num_failed}
        return {"request_counts": counts, "usage": used.told()}, made, len(done) == total

    def _unanswered(self, number: int, raw: bytes | None, end: End) -> bytes:
        try:
            line = parsed(number, raw, self.endpoint)
        except Wrong:  # stopped before the input was checked
            line = Line(number, "", b"")
        return unanswered_line(self.batch_id, line, *UNANSWERED[end])

    def _record(self, part: str, num_bytes: int, now_s: int) -> FileRecord:
        name = f"{self.batch_id}_{'output' if part == 'output' else 'error'}.jsonl"
        expires_s = now_s + int(self._keep_s)
        return FileRecord(new_file_id(), self.owner.name, name, "batch_output", num_bytes, now_s, expires_s)

    def _own(self, kind: str) -> Path:
        return self.folder / f"{kind}.{self.number}"
