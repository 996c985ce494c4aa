"""What the engine tells its surroundings after each step: frozen values, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.engine.request import RequestOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine can hold; fixed when it is built."""

    max_model_len: int
    """Tokens of prompt and output together that one request may hold."""
    kv_capacity_tokens: int
    max_num_seqs: int
    block_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class StepEvents:
    """One step: what came out, and the state after it."""

    outputs: tuple[RequestOutput, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    free_kv_tokens: int = 0
    """KV capacity minus, over every request here, running or waiting, the larger of the tokens it holds and its
    reservation (prompt + output as far as it is reserved), in whole blocks. Negative when too much was granted."""
    free_slots: int = 0
    """max_num_seqs minus requests here, running or waiting; may be negative."""
    num_prefill_tokens: int = 0
    """Prompt tokens computed in this step (recomputed ones too)."""
    num_decode_tokens: int = 0
    """Running requests that this step gave their next token."""
    num_preempted: int = 0
    step_s: float = 0.0
    resident_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    num_failed: int = 0
    """Requests that the model failed on."""
    num_out_of_memory: int = 0
    """1 for a step that ran out of memory: nothing was computed, and the next one is smaller."""
    num_started_tokens: int = 0
    """Prompt tokens of the requests that started with this step."""
    num_cached_tokens: int = 0
    """Those of them that the prefix cache held."""
    idle_cached_tokens: int = 0
    """Tokens in blocks that nobody holds and that a new request may find its beginning in."""
