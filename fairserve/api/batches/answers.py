"""What callers of /v1/files and /v1/batches get, and its description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fairserve.api.batches.disk import Json
from fairserve.api.batches.files import FileRecord
from fairserve.api.openapi import Answered


class FileObject(Answered):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(Answered):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answered):
    id: str
    object: Literal["file"]
    deleted: bool


class Counts(Answered):
    total: int
    completed: int
    failed: int


class CachedTokens(Answered):
    cached_tokens: int


class ReasoningTokens(Answered):
    reasoning_tokens: int


class BatchUsage(Answered):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchObject(Answered):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    request_counts: Counts
    usage: BatchUsage | None


class BatchList(Answered):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(record: FileRecord) -> Json:
    """OpenAI's File."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_s,
        "expires_at": record.expires_s,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }


def page(entries: Sequence[Json], after: str | None, limit: int) -> Json:
    """The part of a list that follows the entry ``after``; nothing follows one that is not there."""
    begin = 0
    if after is not None:
        begin = next((i + 1 for i, entry in enumerate(entries) if entry["id"] == after), len(entries))
    data: list[Any] = list(entries[begin : begin + limit])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": begin + limit < len(entries),
    }
