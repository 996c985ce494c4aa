"""What weights of 8 bits cost in quality: perplexity of a fixed text, and tokens that stay the same.

    python -m benchmarks.quality

The text below and the prompts were written for this. ``next`` is the share of the text's positions at which both would
go on with the same token; ``greedy`` the share of tokens that both generate alike for 32 prompts, each going its own
way after a first difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from fairserve.clock import SystemClock
from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.dispatch.replica_book import LocalBook
from fairserve.engine.attention import Attachment, Span, StepLayout, attach
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.engine import make_engine
from fairserve.engine.loading import LoadedModel, load_model
from fairserve.engine.request import GenerateRequest, SamplingParams
from fairserve.fairness.baselines import Fcfs
from fairserve.fairness.cost import WeightedTokens

TEXT = """
A harbour town wakes before the sun does. The first boats leave in the dark, and by the time the bakers open their
doors the quay is already loud with people who sell fish, mend nets and argue about the weather. Nobody there trusts the
forecast on the radio. They look at the colour of the sky behind the lighthouse, at how the gulls sit on the roofs, and
at the old woman in the house on the corner, who has been wrong only twice in forty years.

Water boils at a lower temperature on a mountain, because the air above it presses less. That is why an egg takes longer
to cook there, although the pot seems to boil as wildly as ever. The reverse is true of a pressure cooker: its lid holds
the steam back, the pressure rises, and with it the temperature at which water turns into steam. Beans that would need
two hours in an open pot are soft in thirty minutes.

When two people want the same thing, a rule is better than a quarrel. The simplest rule is that whoever comes first is
served first. It is easy to understand and hard to love, for whoever sends ten messengers stands in the queue ten times.
A second rule looks at what each has received so far and serves the one who has received the least. It needs somebody
who counts, and it needs an answer to the question of what a newcomer should be thought to have had. If he begins at
nothing, he may take everything until he has caught up; if he begins level with the others, he gets his share from now
on, and nobody is punished for having worked while he was away.

The library closed at six, but the light in the reading room stayed on. Somebody had forgotten a coat, a pair of glasses
and a book about bridges, open at the page that explains why an arch does not fall down: every stone would like to drop,
and each is held up by the two beside it, which would like to drop as well.
"""
SUBJECTS = ["the sea", "bread", "a bridge", "winter", "music", "a good friend", "the moon", "trains"]
TASKS = ["Explain {} to a child.", "Write a short story about {}.", "List three facts about {}.", "Why does {} matter?"]
MAX_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("out/quality.json"))
    args = parser.parse_args()
    found = {kind: _measure(args.model, kind) for kind in ("auto", "int8")}
    (logits, tokens), (other_logits, other_tokens) = found["auto"], found["int8"]
    pairs = [(a, b) for one, two in zip(tokens, other_tokens, strict=True) for a, b in zip(one, two, strict=True)]
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "text_tokens": len(logits[0]),
        "perplexity": {kind: round(_perplexity(*found[kind][0]), 3) for kind in found},
        "next": round((logits[1].argmax(-1) == other_logits[1].argmax(-1)).float().mean().item(), 4),
        "greedy": round(sum(a == b for a, b in pairs) / len(pairs), 4),
        "greedy_prompts_alike": sum(one == two for one, two in zip(tokens, other_tokens, strict=True)),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def _measure(model: str, cpu_linear: str) -> tuple[tuple[Tensor, Tensor], list[list[int]]]:
    """(Tokens of the text, logits of each that has a next one), and what is generated for each prompt."""
    num_prompts = len(TASKS) * len(SUBJECTS)
    settings: dict[str, Any] = {"device": "cpu", "cpu_linear": cpu_linear, "max_model_len": 512}
    settings |= {"max_num_seqs": num_prompts, "kv_cache_tokens": num_prompts * 128}
    config = EngineConfig(**settings)
    loaded = load_model(model, config)
    assert loaded.tokenizer is not None
    text = torch.tensor(loaded.tokenizer(TEXT.strip())["input_ids"])
    return (text, _logits(loaded, text)[:-1]), _generate(loaded, config)


@torch.inference_mode()
def _logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """[tokens, vocabulary], the text computed as one prompt."""
    num = len(tokens)
    cache = SdpaAttention(num, 16, loaded.dtype, loaded.device)
    for layer, shape in loaded.layers.items():
        cache.allocate(layer, shape.kv_heads, shape.key_dim, shape.value_dim)
    attach(loaded.model, Attachment(cache))
    places = torch.arange(num)
    cache.begin(StepLayout((), (Span(0, num, num, 0, ()),), places))
    output = loaded.model(
        input_ids=tokens.view(1, -1), position_ids=places.view(1, -1), use_cache=False, logits_to_keep=places
    )
    logits: Tensor = output.logits[0]
    return logits


def _perplexity(tokens: Tensor, logits: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, tokens[1:]).exp())


def _generate(loaded: LoadedModel, config: EngineConfig) -> list[list[int]]:
    book: LocalBook[GenerateRequest] = LocalBook(Fcfs(), WeightedTokens())
    engine = make_engine(loaded, config, reserve_output_tokens=None, queue=book, account=book, clock=SystemClock())
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    assert loaded.tokenizer is not None
    for i, (task, subject) in enumerate((task, subject) for task in TASKS for subject in SUBJECTS):
        chat = [{"role": "user", "content": task.format(subject)}]
        prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        engine.add(GenerateRequest(f"r{i}", "bench", tuple(prompt), sampling))
        tokens[f"r{i}"] = []
    while engine.has_work():
        for output in engine.step().outputs:
            tokens[output.request_id].extend(output.token_ids)
    return list(tokens.values())


if __name__ == "__main__":
    main()
