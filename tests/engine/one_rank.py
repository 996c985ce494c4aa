"""One rank of a tensor parallel engine, as a process: `python -m tests.engine.one_rank RANK ADDRESS MODEL`.

Rank 0 prints what its engine made of some prompts, by request, as JSON: tokens, also under rules, and of the longest
prompt its tokens' log probabilities and its embedding.
"""

from __future__ import annotations

import json
import sys
from array import array
from typing import Any

import torch

from fairserve.clock import VirtualClock
from fairserve.config import EngineConfig
from fairserve.engine import shards
from fairserve.engine.engine import Engine, follow, make_engine
from fairserve.engine.loading import load_model
from fairserve.engine.request import GenerateRequest, Grammar, SamplingParams
from tests.engine.support import FifoQueue, Ledger

SIZE = 2
CONFIG = EngineConfig(tensor_parallel_size=SIZE, kv_cache_tokens=256, max_num_batched_tokens=24, max_num_seqs=4)
MAX_TOKENS = 12
READ = "r4"
PROMPTS = {f"r{i}": tuple(7 * j % 250 + 2 for j in range(length)) for i, length in enumerate((1, 9, 40, 30, 70))}
PLACE = '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}}}'
RULED = {
    "schema": SamplingParams(max_tokens=40, temperature=1.0, seed=1, grammar=Grammar("json_schema", PLACE)),
    "regex": SamplingParams(max_tokens=40, temperature=0.0, grammar=Grammar("regex", "[a-f]{3,9}(-[0-9]+){2}")),
    "choice": SamplingParams(max_tokens=40, temperature=1.0, seed=2, grammar=Grammar("choice", '["yes", "yesterday"]')),
    "bias": SamplingParams(max_tokens=12, temperature=0.8, seed=3, logit_bias=((40, 6.0), (41, -100.0)), logprobs=2),
    "long": SamplingParams(max_tokens=12, temperature=1.0, seed=4, min_tokens=10, logit_bias=((1, 100.0),)),
    "few": SamplingParams(max_tokens=12, temperature=1.0, seed=5, top_p=0.9, allowed_token_ids=(30, 31, 32, 33)),
    "without": SamplingParams(max_tokens=12, temperature=0.0, bad_words=((40,), (41, 42)), repetition_penalty=1.2),
}
"""Requests whose next tokens are ruled."""


def run_ruled(engine: Engine) -> dict[str, tuple[list[int], str]]:
    """Tokens and text of each."""
    for i, (name, sampling) in enumerate(RULED.items()):
        engine.add(GenerateRequest(name, "ann", PROMPTS[f"r{i % 3}"], sampling))
    made: dict[str, tuple[list[int], str]] = {name: ([], "") for name in RULED}
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.finish_reason != "error", output.error
            token_ids, text = made[output.request_id]
            made[output.request_id] = [*token_ids, *output.token_ids], text + output.text
        engine.check()
    return made


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
    alone = SamplingParams(max_tokens=0, prompt_logprobs=0)
    engine.add(GenerateRequest("scored", "ann", PROMPTS[READ], alone))
    engine.add(GenerateRequest("pooled", "ann", PROMPTS[READ], SamplingParams(max_tokens=0), pooling="mean"))
    made: dict[str, list[Any]] = {name: [] for name in (*PROMPTS, "scored", "pooled")}
    while engine.has_work():
        for output in engine.step().outputs:
            made[output.request_id] += output.token_ids
            made[output.request_id] += [one.logprob for one in output.logprobs]
            made[output.request_id] += array("f", output.embedding)
            assert output.finish_reason != "error", output.error
        engine.check()
    made |= {name: list(both) for name, both in run_ruled(engine).items()}
    engine.stop()
    print(json.dumps(made))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
