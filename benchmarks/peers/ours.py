"""fairserve's own engine, in process: no Ray, no HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.peers.driver import Spec, serve
from fairserve.clock import SystemClock
from fairserve.config import EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.engine import build_engine
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.cost import WeightedTokens
from fairserve.fairness.vtc import Vtc


class Ours:
    def __init__(self, spec: Spec) -> None:
        self._book: LocalBook[GenerateRequest] = LocalBook(Vtc(), WeightedTokens())
        config = EngineConfig(
            max_num_seqs=spec.max_requests,
            max_num_batched_tokens=spec.max_step_tokens,
            max_model_len=spec.max_length,
            kv_cache_tokens=spec.max_requests * spec.max_length,
            prefix_cache=False,  # runs repeat their prompts
            **spec.options,
        )
        self._engine = build_engine(
            spec.model,
            config,
            reserve_output_tokens=None,
            queue=self._book,
            account=self._book,
            num_threads=spec.threads,
            clock=SystemClock(),
        )
        self._num_added = 0
        self._requests: dict[str, int] = {}

    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        self._num_added += 1
        name = str(self._num_added)
        self._requests[name] = request
        self._engine.add(GenerateRequest(name, "client", tuple(prompt), sampling))

    def step(self) -> Iterator[tuple[int, Sequence[int]]]:
        events = self._engine.step()
        self._book.take_events()
        for output in events.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return ((self._requests[output.request_id], output.token_ids) for output in events.outputs)


if __name__ == "__main__":
    serve(Ours, ["fairserve", "torch", "transformers"])
