"""What ``model.generate`` makes of each prompt, and how far apart its two best logits were at each token.

Prompts of one length go together, so that nothing is padded.

Reads a ``Spec`` line and a line of prompts from stdin, writes one line: ``{"tokens": [[...]], "gaps": [[...]]}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.driver import Spec


def generate(model: Any, prompts: Sequence[list[int]], num_output: int) -> tuple[list[list[int]], list[list[float]]]:
    """For prompts of one length the tokens, greedy, and for each the best logit minus the second best."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_output,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack([logits.topk(2).values for logits in made.logits], dim=1)
    return made.sequences[:, ids.shape[1] :].tolist(), (best[:, :, 0] - best[:, :, 1]).tolist()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec, run = Spec(**json.loads(sys.stdin.readline())), json.loads(sys.stdin.readline())
    torch.set_num_threads(spec.threads)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompts: list[list[int]] = run["prompts"]
    tokens: dict[int, list[int]] = {}
    gaps: dict[int, list[float]] = {}
    for length in sorted(set(map(len, prompts))):
        which = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        made = generate(model, [prompts[i] for i in which], run["num_output"])
        tokens |= zip(which, made[0], strict=True)
        gaps |= zip(which, made[1], strict=True)
    everything = range(len(prompts))
    answer = {"tokens": [tokens[i] for i in everything], "gaps": [gaps[i] for i in everything]}
    answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
