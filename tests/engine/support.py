"""What the engine's tests share: a plain queue, an exact account, tiny models and a driver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fairserve.clock import VirtualClock
from fairserve.config import EngineConfig
from fairserve.engine.engine import Engine, make_engine
from fairserve.engine.events import StepEvents
from fairserve.engine.loading import LoadedModel, prepare_model
from fairserve.engine.request import GenerateRequest, RequestOutput, SamplingParams

VOCABULARY = 101
EOS = 7


class FifoQueue:
    """Order of arrival; counters are whatever the test says."""

    def __init__(self, counters: dict[str, float] | None = None) -> None:
        self.requests: list[GenerateRequest] = []
        self.counters = counters or {}

    def push(self, request: GenerateRequest) -> None:
        self.requests.append(request)

    def push_front(self, request: GenerateRequest) -> None:
        self.requests.insert(0, request)

    def peek(self) -> GenerateRequest | None:
        return self.requests[0] if self.requests else None

    def pop(self) -> GenerateRequest:
        return self.requests.pop(0)

    def remove(self, request_id: str) -> GenerateRequest | None:
        for i, request in enumerate(self.requests):
            if request.request_id == request_id:
                return self.requests.pop(i)
        return None

    def standing(self, client: str) -> tuple[float, ...]:
        return (self.counters.get(client, 0.0),)

    def lead(self, ahead: str, behind: str) -> float:
        return self.counters.get(ahead, 0.0) - self.counters.get(behind, 0.0)

    def __len__(self) -> int:
        return len(self.requests)


@dataclass
class Ledger:
    """An account that refuses what must never happen, and remembers the rest."""

    num_input: dict[str, int] = field(default_factory=dict)
    num_output: dict[str, int] = field(default_factory=dict)
    num_cached: dict[str, int] = field(default_factory=dict)
    is_received: set[str] = field(default_factory=set)
    is_started: set[str] = field(default_factory=set)
    is_finished: set[str] = field(default_factory=set)

    def received(self, request: GenerateRequest) -> None:
        assert request.request_id not in self.is_received, "received twice"
        self.is_received.add(request.request_id)
        self.num_input[request.request_id] = self.num_output[request.request_id] = 0

    def started(self, request_id: str, num_input: int, num_cached: int) -> None:
        assert request_id in self.is_received - self.is_started - self.is_finished, "started twice or unknown"
        self.is_started.add(request_id)
        self.num_input[request_id] = num_input
        self.num_cached[request_id] = num_cached

    def output(self, request_id: str, num_tokens: int) -> None:
        assert request_id in self.is_started - self.is_finished
        self.num_output[request_id] += num_tokens

    def refund_input(self, request_id: str, num_tokens: int) -> None:
        assert request_id in self.is_started - self.is_finished
        assert 0 < num_tokens <= self.num_input[request_id]
        self.num_input[request_id] -= num_tokens

    def finished(self, request_id: str) -> None:
        assert request_id in self.is_received - self.is_finished, "finished twice or unknown"
        self.is_finished.add(request_id)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of a few thousand weights; the same weights every time."""
    torch.manual_seed(1)
    shape = {**_SHAPE, **changes}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 16, **shape})).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**{"sliding_window": 9, **shape})).eval()
    assert kind == "gpt2"
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def reference(model: Any, prompt: Sequence[int], max_tokens: int, eos: Sequence[int] = (EOS,)) -> list[int]:
    """Greedy tokens as transformers' generate makes them."""
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(eos), pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZER = byte_tokenizer()


class Driver:
    """An engine with its queue, its account and everything it said."""

    def __init__(self, engine: Engine, queue: FifoQueue, ledger: Ledger) -> None:
        self.engine = engine
        self.queue = queue
        self.ledger = ledger
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.num_preempted = 0

    def add(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.engine.add(request)

    def step(self) -> StepEvents:
        events = self.engine.step()
        self.engine.check()
        self.num_preempted += events.num_preempted
        for output in events.outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        return events

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.outputs[request_id])

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", "cpu_linear": "eager", "block_size": 4, "max_num_seqs": 8, **changes})


def drive(
    loaded: LoadedModel,
    counters: dict[str, float] | None = None,
    reserve_output_tokens: int | None = None,
    **changes: Any,
) -> Driver:
    queue, ledger = FifoQueue(counters), Ledger()
    engine = make_engine(
        loaded,
        config(**changes),
        reserve_output_tokens=reserve_output_tokens,
        queue=queue,
        account=ledger,
        clock=VirtualClock(),
    )
    return Driver(engine, queue, ledger)


def prepare(model: Any, cpu_linear: str = "eager", tokenizer: Any = None) -> LoadedModel:
    return prepare_model(model, config(cpu_linear=cpu_linear), tokenizer=tokenizer)


def request(request_id: str, prompt: Iterable[int], client: str = "a", **sampling: Any) -> GenerateRequest:
    params = replace(SamplingParams(temperature=0.0, max_tokens=8), **sampling)
    return GenerateRequest(request_id, client, tuple(prompt), params)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Tokens that are neither EOS nor special."""
    return tuple(10 + (i * 31 + seed * 17 + i * i * 7) % (VOCABULARY - 10) for i in range(length))
