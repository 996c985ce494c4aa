"""vLLM's offline engine on a CPU, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks.peers.driver import Spec, serve

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmCpu:
    def __init__(self, spec: Spec) -> None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
        import torch
        from vllm import EngineArgs, LLMEngine

        torch.set_num_threads(spec.threads)
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=spec.model,
                dtype="float32",
                max_model_len=spec.max_length,
                max_num_seqs=spec.max_requests,
                max_num_batched_tokens=spec.max_step_tokens,
                enable_prefix_caching=False,
                **spec.options,
            )
        )
        self._num_added = 0
        self._requests: dict[str, int] = {}
        self._num_made: dict[str, int] = {}

    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        from vllm import SamplingParams

        self._num_added += 1
        name = str(self._num_added)
        self._requests[name], self._num_made[name] = request, 0
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)

    def step(self) -> list[tuple[int, Sequence[int]]]:
        new: list[tuple[int, Sequence[int]]] = []
        for output in self._engine.step():
            name = output.request_id
            tokens = list(output.outputs[0].token_ids)[self._num_made[name] :]
            self._num_made[name] += len(tokens)
            new.append((self._requests[name], tokens))
        return new


if __name__ == "__main__":
    serve(VllmCpu, ["vllm-cpu", "torch", "transformers"])
