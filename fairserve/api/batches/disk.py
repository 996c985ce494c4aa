"""Changes of a folder that are there as a whole or not at all, and stay there once made: also after a power cut."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Disk:
    """Every change goes through the steps at the end, which a test can make fail one by one.

    Raises (every method):
        OSError: the file system's.
    """

    def write(self, path: Path, data: Json) -> None:
        """Put ``data`` in the place of what is there. Readers see one or the other."""
        draft = self._draft(path, data)
        self._replace(draft, path)
        self._sync_folder(path.parent)

    def claim(self, path: Path, data: Json) -> bool:
        """Create the file. False: somebody has, and it stays as it is. Of several who try, one gets True."""
        draft = self._draft(path, data)
        try:
            is_first = self.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        self._sync_folder(path.parent)
        return is_first

    def link(self, source: Path, target: Path) -> bool:
        """Give the file a second name. False: something of that name is there already."""
        try:
            self._link(source, target)
        except FileExistsError:
            return False
        return True

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of the file. After a crash part of ``data`` may be there; when this returns all of it is."""
        is_new = not path.exists()
        with path.open("ab") as file:
            self._write(file.fileno(), data)
            self._sync(file.fileno())
        if is_new:
            self._sync_folder(path.parent)

    def remove(self, path: Path) -> None:
        """Take it away, if it is there."""
        self._remove(path)

    def settle(self, path: Path) -> None:
        """A finished file that was written without us is on disk when this returns."""
        with path.open("rb") as file:
            self._sync(file.fileno())
        self._sync_folder(path.parent)

    def _draft(self, path: Path, data: Json) -> Path:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with draft.open("wb") as file:
                self._write(file.fileno(), json.dumps(data).encode())
                self._sync(file.fileno())
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        return draft

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _write(self, descriptor: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def _replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def _link(self, source: Path, target: Path) -> None:
        target.hardlink_to(source)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems know no fsync of a folder, and need none
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Json | None:
    """The object in the file, None where there is no such file."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    assert isinstance(data, dict), path
    return data
