"""One rank of a tensor parallel engine, as a process: `python -m tests.engine.one_rank RANK ADDRESS MODEL`.

Rank 0 prints what its engine made of some prompts, by request, as JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from fairserve.clock import VirtualClock
from fairserve.config import EngineConfig
from fairserve.engine import shards
from fairserve.engine.engine import follow, make_engine
from fairserve.engine.loading import load_model
from fairserve.engine.request import GenerateRequest, SamplingParams
from tests.engine.support import FifoQueue, Ledger

SIZE = 2
CONFIG = EngineConfig(tensor_parallel_size=SIZE, kv_cache_tokens=256, max_num_batched_tokens=24, max_num_seqs=4)
MAX_TOKENS = 12
PROMPTS = {f"r{i}": tuple(7 * j % 250 + 2 for j in range(length)) for i, length in enumerate((1, 9, 40, 30, 70))}


def main(number: int, address: str, model: str) -> None:
    rank = shards.Rank(number, SIZE, address)
    if number:
        follow(model, CONFIG, rank, num_threads=1)
        return
    torch.set_num_threads(1)
    shards.join(rank)
    engine = make_engine(
        load_model(model, CONFIG),
        CONFIG,
        reserve_output_tokens=None,
        queue=FifoQueue(),
        account=Ledger(),
        clock=VirtualClock(),
    )
    for name, prompt in PROMPTS.items():
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
        engine.add(GenerateRequest(name, "ann", prompt, sampling))
    made: dict[str, list[int]] = {name: [] for name in PROMPTS}
    while engine.has_work():
        for output in engine.step().outputs:
            made[output.request_id] += output.token_ids
            assert output.finish_reason != "error", output.error
        engine.check()
    engine.stop()
    print(json.dumps(made))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
