"""An eyewitness in every model replica: what was made, written down before anybody is told; it outlives a SIGKILL.

A line per event in a file per replica, handed to the kernel at once: a killed process loses none of it. The ledger of
the counter actor and the usage that callers are told can be held against it, request by request.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from fairserve.cluster import replica
from fairserve.cluster.keeper import ray_session_folder
from fairserve.cluster.multiplex import Own
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.request import GenerateRequest, RequestOutput

MADE, UNGRANTED = "made", "ungranted"
FOLDER = "witness"


class Notes:
    """Lines of ``kind unix_s request_id num_input num_output``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, kind: str, request_id: str, num_input: int = 0, num_output: int = 0) -> None:
        os.write(self._file, f"{kind} {time.time():.3f} {request_id} {num_input} {num_output}\n".encode())


class WitnessBook(LocalBook[GenerateRequest]):
    """Tells what each request was charged in all, after every change."""

    witness: Notes

    def started(self, request_id: str, num_input: int, num_cached: int) -> None:
        super().started(request_id, num_input, num_cached)
        self._tell(request_id)

    def output(self, request_id: str, num_tokens: int) -> None:
        super().output(request_id, num_tokens)
        self._tell(request_id)

    def refund_input(self, request_id: str, num_tokens: int) -> None:
        super().refund_input(request_id, num_tokens)
        self._tell(request_id)

    def _tell(self, request_id: str) -> None:
        entry = self._open[request_id]
        self.witness.write(MADE, request_id, entry.num_input, entry.num_output)


class WitnessReplica(replica.ModelReplica):
    """The real replica, with a book that writes down what it books."""

    async def __init__(self, args_json: str, slot: str = "") -> None:  # type: ignore[misc]
        from ray import serve

        self._notes = Notes(witness_folder() / serve.get_replica_context().replica_id.unique_id)
        make: Any = vars(replica)["make_local_book"]

        def witnessed(*settings: Any, **more: Any) -> Any:
            book: Any = make(*settings, **more)
            book.__class__ = WitnessBook
            book.witness = self._notes
            return book

        with mock.patch.object(replica, "make_local_book", witnessed):
            await super().__init__(args_json, slot)

    async def generate(
        self, request: GenerateRequest, waited_s: float | None = None, *others: Any, **more: Any
    ) -> AsyncIterator[RequestOutput | Own]:
        if waited_s is None:
            self._notes.write(UNGRANTED, request.request_id)
        async for output in super().generate(request, waited_s, *others, **more):
            yield output


@contextlib.contextmanager
def witnessed() -> Iterator[None]:
    """Applications that are built inside the block have witnesses."""
    with mock.patch("fairserve.app.ModelReplica", WitnessReplica):
        yield


def witness_folder() -> Path:
    """In Ray's session folder, which all nodes on this machine share."""
    return Path(ray_session_folder()) / FOLDER


@dataclass(slots=True)
class Made:
    """What one replica made: ``requests`` has (input, output) tokens by request id. Times are Unix seconds."""

    requests: dict[str, tuple[int, int]] = field(default_factory=dict)
    ungranted_s: list[float] = field(default_factory=list)
    """When requests came without a grant."""
    times_s: list[float] = field(default_factory=list)
    """When anything was made."""
    totals: list[int] = field(default_factory=list)
    """Output tokens made in all by then."""

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Input and output."""
        return sum(i for i, _ in self.requests.values()), sum(o for _, o in self.requests.values())

    def seconds_since(self, num_output: int) -> float:
        """From the moment when more than so many output tokens had been made to the last thing that was."""
        first = next((at_s for at_s, total in zip(self.times_s, self.totals, strict=True) if total > num_output), None)
        return 0.0 if first is None else self.times_s[-1] - first


def read_witnesses(folder: Path) -> dict[str, Made]:
    """By replica, as far as the files go now."""
    made = {}
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        one, total = Made(), 0
        made[path.name] = one
        for line in path.read_text().splitlines():
            kind, at_s, request_id, num_input, num_output = line.split()
            if kind == UNGRANTED:
                one.ungranted_s.append(float(at_s))
            else:
                total += int(num_output) - one.requests.get(request_id, (0, 0))[1]
                one.times_s.append(float(at_s))
                one.totals.append(total)
                one.requests[request_id] = int(num_input), int(num_output)
    return made
