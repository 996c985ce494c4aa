"""What goes into the engine and what comes out: frozen values, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fairserve.dispatch.messages import Standing
from fairserve.errors import FairServeError, InvalidRequest, ModelFailed, ReplicaFailed

FinishReason = Literal["stop", "length", "abort", "error", "returned"]
"""``returned``: the replica gives the request back unserved, to be granted anew; callers never see it."""
ErrorCode = Literal["replica_failed", "model_error", "invalid_request"]
"""Whose fault an error is: the replica's (another may do better), the model's on this very request, or the caller's."""
Pooling = Literal["mean", "last"]
"""How the hidden states of a prompt become one: their mean, or that of its last token."""
GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must be. ``text`` by kind: a JSON Schema; "" (any JSON object); a regular expression that
    matches all of it (Rust's syntax: no look-around, no references); a JSON list of strings; a grammar in llguidance's
    dialect of Lark, whose rule ``start`` is the output. See :mod:`fairserve.engine.grammar`."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Values are checked by the API; in here they are asserted.

    Names and meanings are OpenAI's and vLLM's. ``temperature`` 0 is greedy. ``top_k`` 0 means off, ``min_p`` 0
    means off, ``repetition_penalty`` 1 means off (transformers' definition: over prompt and output tokens);
    presence and frequency penalties count output tokens only. ``logprobs`` is the number of alternatives per
    output token (0: only the chosen token's), None for none; ``prompt_logprobs`` the same for every token of the prompt
    but its first. With ``max_tokens`` 0 a request ends when its prompt is computed.

    ``grammar``: only tokens with which the output can still become whole are drawn, and it ends where it is; with
    ``ignore_eos`` not before nothing else is left. ``logit_bias``: (token id, what is added to its logit).
    ``allowed_token_ids``: no others are drawn, EOS included. ``bad_words``: none of these token sequences is completed.
    ``min_tokens``: EOS, ``stop_token_ids`` and ``stop`` end nothing before so many output tokens.
    ``skip_special_tokens`` False: the text shows them.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. A chat request with n = 3 is three of these."""

    request_id: str
    client: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    weight: float = 1.0
    """The client's share: service is compared as service / weight."""
    max_waiting: int | None = None
    """The client's own limit of waiting requests, None for the cluster's default."""
    application: str = ""
    """Which of the client's applications sends it; "" for none."""
    interaction: str = ""
    """Id of the user task that this call belongs to; "" for a call that stands alone."""
    call_index: int = 0
    """Position of the call in its interaction, from 0, as the caller says."""
    trace: str = ""
    """The traceparent that spans of this request belong below; "" where it is not traced."""
    budgets: tuple[tuple[str, int | None, int | None], ...] = ()
    """The client's own budgets of tokens: window, soft, hard."""
    num_generated: int | None = None
    """The request goes on from a replica that died: the last so many of ``prompt_token_ids`` are its output until
    then, and all of them were charged there. None: it begins here."""
    pooling: Pooling | None = None
    """An embedding is asked for in place of output: the last hidden states of the prompt, pooled so."""
    adapter: str = ""
    """Name of the LoRA adapter (``EngineConfig.adapters``) that computes it; "" for the bare model."""

    @property
    def num_input(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_prompt(self) -> int:
        """Tokens of the caller's own prompt."""
        return len(self.prompt_token_ids) - (self.num_generated or 0)

    @property
    def scores_prompt(self) -> bool:
        """Log probabilities of the prompt are to be given. They come with the first output token: where there was one
        elsewhere, the caller has them."""
        return self.sampling.prompt_logprobs is not None and not self.num_generated

    @property
    def reads_all(self) -> bool:
        """Every token of the prompt must be computed here: what comes from the prefix cache has no hidden state."""
        return self.pooling == "mean" or self.scores_prompt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural log, of the unmodified model distribution) of one token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at this position as (token id, logprob), best first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens charged for one request so far; the same numbers that move the client's counter."""

    num_input: int
    num_cached: int
    """Part of ``num_input`` that came from the prefix cache."""
    num_output: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step (or several, merged) made for one request."""

    request_id: str
    text: str
    """New text since the last output; may be empty while a character is incomplete or a stop string is possible."""
    token_ids: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of ``token_ids``. A request with ``prompt_logprobs`` has those of its prompt's tokens, from the second on, before
    those of its first output."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended the text, None for the end-of-sequence token or another reason."""
    error: str | None = None
    """With finish_reason 'error': what happened."""
    waited_s: float | None = None
    """Seconds from the router to the grant, in the first output of a request; None where nobody measured it."""
    error_code: ErrorCode = "replica_failed"
    """With finish_reason 'error'."""
    embedding: bytes = b""
    """With the finish reason of a request with ``pooling``: float32, little-endian, of length 1."""
    standing: Standing | None = None
    """Where the client stood at the grant, in the first output that the API sees; None where nobody was asked."""


def failure(output: RequestOutput) -> FairServeError:
    """The exception that an output with finish_reason 'error' stands for."""
    detail = output.error or "its engine failed"
    match output.error_code:
        case "model_error":
            return ModelFailed(detail)
        case "invalid_request":
            return InvalidRequest(detail)
    return ReplicaFailed(detail)


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Successive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    finish = next((one for one in reversed(outputs) if one.finish_reason is not None), last)
    return replace(
        last,
        text="".join(one.text for one in outputs),
        token_ids=tuple(token for one in outputs for token in one.token_ids),
        logprobs=tuple(logprob for one in outputs for logprob in one.logprobs),
        finish_reason=finish.finish_reason,
        stop_reason=finish.stop_reason,
        waited_s=outputs[0].waited_s,
        standing=outputs[0].standing,
    )
