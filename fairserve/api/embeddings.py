"""``/v1/embeddings``: one vector of length 1 for each input, by the setting ``engine.pooling``.

An input is a request like any other, in the same queue and the same batches: its prompt is charged, it has no output,
and it ends when its prompt is computed.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, field_validator

from fairserve.api.answers import Answer, Job, Json, TokenText
from fairserve.api.openai_schema import PROMPT, Body, Prompt, prompts_of
from fairserve.engine.request import Grammar, RequestOutput, SamplingParams

FLOAT_BYTES = 4
Encoding = Literal["float", "base64"]


class EmbeddingRequest(Body):
    """The body of ``POST /v1/embeddings``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dimensions": ()
    }  # a vector cut short means little, unless the model was trained to be cut

    model: Annotated[str, Field(min_length=1, max_length=512)]
    input: Annotated[tuple[Prompt, ...], WithJsonSchema(PROMPT)]
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    encoding_format: Encoding = "float"
    """base64: the bytes of little-endian 32-bit floats, which OpenAI's own client asks for."""
    user: str | None = None

    # What the other generations say of themselves.
    n: ClassVar[int] = 1
    stream: ClassVar[bool] = False
    include_usage: ClassVar[bool] = False
    usage_in_chunks: ClassVar[bool] = False
    metadata: ClassVar[None] = None
    asked_output: ClassVar[int] = 0
    prompt_logprobs: ClassVar[None] = None
    asked_prompt_logprobs: ClassVar[None] = None
    grammars: ClassVar[Mapping[str, Grammar]] = {}
    logit_bias: ClassVar[tuple[tuple[int, float], ...]] = ()
    allowed_token_ids: ClassVar[None] = None
    bad_words: ClassVar[tuple[str, ...]] = ()
    min_tokens: ClassVar[int] = 0

    @field_validator("input", mode="before")
    @classmethod
    def _inputs(cls, value: Any) -> tuple[Prompt, ...]:
        return prompts_of(value)

    @property
    def prompt(self) -> tuple[Prompt, ...]:
        return self.input

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        return SamplingParams(max_tokens=max_tokens)


class EmbeddingAnswer(Answer):
    whole_object = "list"
    chunk_object = "list"

    def __init__(self, job: Job, token_text: TokenText, encoding: Encoding) -> None:
        super().__init__(job, token_text)
        self._encoding = encoding

    def usage(self, outputs: Mapping[int, RequestOutput]) -> Json:
        usage = super().usage(outputs)
        return {name: usage[name] for name in ("prompt_tokens", "total_tokens")}

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {"object": object_name, "data": choices, "model": self._job.model}

    def _choice(self, index: int, output: RequestOutput) -> Json:
        return {"object": "embedding", "index": index, "embedding": self._encoded(output.embedding)}

    def _delta(self, index: int, output: RequestOutput, is_first: bool) -> Json:
        raise AssertionError("embeddings are not streamed")

    def _encoded(self, vector: bytes) -> str | list[float]:
        if self._encoding == "base64":
            return base64.b64encode(vector).decode()
        return list(struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector))
