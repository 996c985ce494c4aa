"""One served model as the API sees it: where its requests go, its tokenizer, and how much it holds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from fairserve.api.chats import Chats, fingerprint_of
from fairserve.api.prompts import Prompts, TextTokenizer
from fairserve.cluster.metrics_sink import NO_METRICS, MetricsSink
from fairserve.config import FairServeArgs
from fairserve.engine.request import GenerateRequest, RequestOutput


class Backend(Protocol):
    """Where requests go; in production the handle of the model replicas."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[RequestOutput]:
        """Generate one sequence; the last output carries the finish reason.

        Closing the iterator (``aclose``), or cancelling the task that waits in it, cancels the request at any stage.

        Raises:
            Refused: no room now; raised by the iterator before its first output.
            ReplicaFailed: the replica died or its engine failed.
            ModelFailed: the model failed on this very request.
        """
        ...

    async def health(self) -> dict[str, Any]:
        """``ready`` (bool) and what else is worth showing in /health, such as ``replicas``."""
        ...


class ServedModel:
    """
    Args:
        args: the settings of this model: see :meth:`FairServeArgs.of_model`.
        backend: where its requests go.
        tokenizer: the model's.
        max_model_len: tokens of prompt and output together that one request may hold.
        metrics: where what its callers get is counted.
    """

    def __init__(
        self,
        args: FairServeArgs,
        backend: Backend,
        tokenizer: TextTokenizer,
        max_model_len: int,
        metrics: MetricsSink = NO_METRICS,
    ) -> None:
        self.name = args.model_name
        self.backend = backend
        self.metrics = metrics
        self.prompts = Prompts(tokenizer)
        self.chats = Chats(args, tokenizer, self.prompts.conversations)
        self.max_model_len = max_model_len
        self.pooling = None if args.engine.pooling == "off" else args.engine.pooling
        self.adapters = {self.name: "", **{name: name for name in args.engine.adapters}}
        """Names that clients ask for, the model's own first -> the LoRA adapter that is meant, "" for none."""
        self.fingerprints = {name: fingerprint_of(args, adapter) for name, adapter in self.adapters.items()}

    def entry(self, name: str, created_s: int) -> dict[str, Any]:
        """Of /v1/models, for one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": created_s,
            "owned_by": "fairserve",
            "max_model_len": self.max_model_len,
            **({} if name == self.name else {"parent": self.name}),
        }
