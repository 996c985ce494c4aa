"""The dispatcher's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from fairserve.dispatch.messages import Submit


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Numbers of the dispatcher; ``DispatchConfig`` documents each."""

    lookahead: int = 1
    reserve_output_tokens: int | None = None
    max_waiting: int = 10_000
    max_waiting_per_client: int = 2_000
    max_clients: int = 100_000
    lease_s: float = 5.0
    replica_stale_s: float = 5.0
    replica_dead_s: float = 20.0
    router_dead_s: float = 20.0
    preempt_gap: float | None = None
    prefix_block_tokens: int = 16
    """Prompt tokens that one entry of ``Submit.prefix`` stands for."""

    def need_tokens(self, submit: Submit) -> int:
        """KV tokens to reserve for a request."""
        reserve = self.reserve_output_tokens
        return submit.num_input + (submit.max_output if reserve is None else min(submit.max_output, reserve))
