"""What a batch used: the sum of what its answers say, each line counted by the answer that holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from fairserve.api.batches.disk import Json


@dataclass(frozen=True, slots=True)
class BatchUsage:
    """Tokens. Of input some were ``num_cached``, of output some ``num_reasoning``."""

    num_input: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_reasoning: int = 0

    def __add__(self, other: BatchUsage) -> BatchUsage:
        return BatchUsage(
            self.num_input + other.num_input,
            self.num_cached + other.num_cached,
            self.num_output + other.num_output,
            self.num_reasoning + other.num_reasoning,
        )

    def told(self) -> Json:
        """OpenAI's BatchUsage."""
        return {
            "input_tokens": self.num_input,
            "input_tokens_details": {"cached_tokens": self.num_cached},
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning},
            "total_tokens": self.num_input + self.num_output,
        }


NO_USAGE = BatchUsage()


def of_body(body: bytes) -> BatchUsage:
    """What the answer of any of the routes says."""
    return _said(from_json(body))


def of_line(line: bytes) -> BatchUsage:
    """The same, of a line of the output file."""
    return _said(from_json(line)["response"]["body"])


def _said(body: Json) -> BatchUsage:
    usage = body.get("usage") or {}
    return BatchUsage(
        _either(usage, "input_tokens", "prompt_tokens"),
        _either(usage, "input_tokens_details", "prompt_tokens_details", "cached_tokens"),
        _either(usage, "output_tokens", "completion_tokens"),
        _either(usage, "output_tokens_details", "completion_tokens_details", "reasoning_tokens"),
    )


def _either(usage: Json, name: str, in_chats: str, detail: str | None = None) -> int:
    """By the name of ``/v1/responses`` or that of the other routes; 0 where nothing is said."""
    found: Any = usage.get(name) or usage.get(in_chats) or 0
    return int(found if detail is None else (found or {}).get(detail) or 0)
