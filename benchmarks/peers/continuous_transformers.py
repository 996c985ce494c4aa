"""transformers' own continuous batching, which computes on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.driver import Spec, serve

BLOCK_TOKENS = 32


class ContinuousTransformers:
    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(spec.threads)
        model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32, attn_implementation="sdpa")
        blocks = -(-spec.max_length // BLOCK_TOKENS) * spec.max_requests
        self._manager = model.eval().init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=BLOCK_TOKENS,
                num_blocks=blocks,
                max_batch_tokens=spec.max_step_tokens,
                max_requests_per_batch=spec.max_requests,
                allow_block_sharing=False,  # no prefix cache anywhere: runs repeat their prompts
            ),
        )
        self._manager.start()
        self._num_added = 0
        self._requests: dict[str, int] = {}
        self._num_made: dict[str, int] = {}

    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        self._num_added += 1
        name = str(self._num_added)
        self._requests[name], self._num_made[name] = request, 0
        self._manager.add_request(list(prompt), request_id=name, max_new_tokens=num_output, streaming=True)

    def step(self) -> list[tuple[int, Sequence[int]]]:
        while (output := self._manager.get_result(timeout=1.0)) is None:
            if not self._manager.is_running():
                raise RuntimeError("transformers' generation thread has ended")
        if output.error is not None:
            raise RuntimeError(output.error)
        name = output.request_id
        new = output.generated_tokens[self._num_made[name] :]
        self._num_made[name] += len(new)
        return [(self._requests[name], new)]


if __name__ == "__main__":
    serve(ContinuousTransformers, ["torch", "transformers"])
