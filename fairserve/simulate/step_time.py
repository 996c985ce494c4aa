"""How long one engine step takes, as a function of what it computes: the only hardware model of the simulator.

    step = PRESETS["a10g-llama2-7b"].seconds(num_decodes=32, decode_context_tokens=12_000, num_prefill_tokens=0)

The function is linear, so that it can be fitted to any engine (``fairserve profile``) and costs nothing to call. What
it leaves out:

- memory traffic and arithmetic are added; hardware overlaps them. Fitted coefficients absorb that in the range that was
  measured; :func:`roofline` does not;
- kernels that change with the shape: tiles, padding of a batch to its longest sequence, scattered KV blocks, CUDA
  graphs for some batch sizes only;
- what goes on beside the step: the replica's event loop, other processes, other replicas on the same memory bus,
  clocks that throttle. ``jitter`` stands for the small part of it;
- penalties, top_p and logprobs of single requests; loading, warm-up, swapping.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fairserve.config import NonNegativeFloat, Strict
from fairserve.errors import ConfigError
from fairserve.fairness.cost import CostFunction


class Origin(Strict):
    """Where the coefficients come from."""

    kind: Literal["measured", "fitted", "estimated"]
    """measured: by `fairserve profile`. fitted: to published runs. estimated: from a data sheet, never measured."""
    source: str = ""
    model: str = ""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Settings of the engine that was measured."""
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    num_samples: int = 0
    """Steps that the coefficients were fitted to."""
    num_held_out: int = 0
    """Further steps, not fitted to, that the errors below are about."""
    mean_error: float | None = None
    """Mean of |predicted - measured| / measured."""
    worst_error: float | None = None
    largest: dict[str, int] = Field(default_factory=dict)
    """The most that one measured step computed; beyond it the function extrapolates."""


TYPICAL_INPUT, TYPICAL_OUTPUT = 512, 128
"""Tokens of the requests by which models are priced."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Coefficients, all >= 0."""

    base_s: float
    """Every step: reading the weights, launching kernels, planning."""
    per_decode_s: float = 0.0
    """Each running request that gets its next token."""
    per_context_token_s: float = 0.0
    """Each token in the KV cache that a decode attends to."""
    prefill_base_s: float = 0.0
    """A step that computes prompt tokens, whatever else it does."""
    per_prefill_token_s: float = 0.0
    per_prefill_context_s: float = 0.0
    """Each pair of a prompt token and a token of its sequence at the end of the step: attention's quadratic part."""
    origin: Origin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in self.coefficients.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"a step time's {name} must be a number of seconds >= 0, not {value}")

    def seconds(
        self,
        num_decodes: int,
        decode_context_tokens: int,
        num_prefill_tokens: int,
        prefill_context_tokens: int = 0,
    ) -> float:
        """Seconds of one step; 0 for one that computes nothing.

        ``decode_context_tokens``: the sum, over the decodes, of the tokens that each has in the cache after the step
        (``Chunk.end``). ``prefill_context_tokens``: the sum, over the prompt chunks, of the chunk's tokens times the
        tokens that its sequence has in the cache after the step (``len(chunk.token_ids) * chunk.end``).
        """
        if num_prefill_tokens:
            return (
                self.base_s
                + self.per_decode_s * num_decodes
                + self.per_context_token_s * decode_context_tokens
                + self.prefill_base_s
                + self.per_prefill_token_s * num_prefill_tokens
                + self.per_prefill_context_s * prefill_context_tokens
            )
        if num_decodes:
            return self.base_s + self.per_decode_s * num_decodes + self.per_context_token_s * decode_context_tokens
        return 0.0

    def seconds_per_service(
        self, cost: CostFunction, num_seqs: int, num_input: int = TYPICAL_INPUT, num_output: int = TYPICAL_OUTPUT
    ) -> float:
        """Seconds of a replica whose ``num_seqs`` slots all run requests of this length, per unit of service: the steps
        that decode, shared by all, and each prompt's own part of its step."""
        decode_s = self.seconds(num_seqs, num_seqs * (num_input + num_output // 2), 0) * num_output / num_seqs
        prompt_s = (
            self.prefill_base_s + self.per_prefill_token_s * num_input + self.per_prefill_context_s * num_input**2
        )
        return (decode_s + prompt_s) / cost.service(num_input, num_output)

    @property
    def coefficients(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in COEFFICIENTS}

    @classmethod
    def load(cls, path: Path) -> StepTime:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: no such file, no JSON, an unknown or missing field, a negative time.
        """
        try:
            read = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the step time {path}: {error.strerror}") from error
        except ValidationError as error:
            mistakes = (
                ".".join(map(str, mistake["loc"])) + ": " + mistake["msg"].removeprefix("Value error, ")
                for mistake in error.errors(include_url=False, include_context=False, include_input=False)
            )
            text = "; ".join(line.removeprefix(": ") for line in mistakes)
            raise ConfigError(f"{path} is no step time: {text} (`fairserve profile` writes such files)") from None
        return cls(**read.step_time.model_dump(), origin=read.origin)

    def save(self, path: Path) -> None:
        """Write the coefficients, in seconds, and where they come from, as JSON."""
        file = _File(step_time=_Coefficients(**self.coefficients), origin=self.origin)
        path.write_text(file.model_dump_json(indent=2) + "\n")

    @classmethod
    def named(cls, word: str, folder: Path | None = None) -> StepTime:
        """A preset by its name, or a file by its path ending in .json (relative ones start at ``folder``).

        Raises:
            ConfigError: neither; the message lists the presets.
        """
        if word in PRESETS:
            return PRESETS[word]
        if word.endswith(".json"):
            return cls.load((folder or Path()) / word)
        known = ", ".join(PRESETS)
        raise ConfigError(f"unknown step time {word!r}: give the path of a .json file, or one of {known}")


COEFFICIENTS = tuple(one.name for one in fields(StepTime) if one.name != "origin")


class _Coefficients(Strict):
    base_s: NonNegativeFloat
    per_decode_s: NonNegativeFloat
    per_context_token_s: NonNegativeFloat
    prefill_base_s: NonNegativeFloat
    per_prefill_token_s: NonNegativeFloat
    per_prefill_context_s: NonNegativeFloat


class _File(Strict):
    step_time: _Coefficients
    origin: Origin | None = None


def jitter(rng: random.Random, spread: float) -> float:
    """A factor for a step's seconds, uniform in [1 - spread, 1 + spread]; the mean stays what it was."""
    return 1.0 + spread * (2.0 * rng.random() - 1.0)


@dataclass(frozen=True, slots=True)
class Device:
    """What a data sheet says of one accelerator."""

    name: str
    memory_bytes_per_s: float
    flops_per_s: float
    """Dense, in the type that the model computes in: half of what is advertised "with sparsity"."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder in numbers."""

    name: str
    num_params: float
    num_layers: int
    attention_size: int
    """Query heads times their dimension; the hidden size of most models."""
    kv_size: int
    """KV heads times their dimension."""
    bytes_per_value: float = 2.0

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.kv_size * self.bytes_per_value


def roofline(
    device: Device,
    model: ModelShape,
    *,
    memory_efficiency: float = 0.8,
    compute_efficiency: float = 0.6,
    overhead_s: float = 0.003,
) -> StepTime:
    """An estimate, NOT a measurement, of the step time of a model on a device that nobody has profiled.

    A step reads all weights and the KV cache of its decodes, does 2 operations per parameter and token and
    4 * layers * attention_size per pair of a token and its context, at the given fractions of the data sheet's rates,
    and spends ``overhead_s`` on the host. Memory time and arithmetic are added although they overlap: at worst, at the
    batch where both are equal, the estimate is twice too long. With the default fractions a replay of the seven runs
    that VTC published for Llama-2-13B on an A100 (section 5.4) lasts as long as they did within 7 %; other devices are
    assumed to reach the same fractions. An engine that launches its kernels one by one from Python, as fairserve's
    does, has an overhead several times the default: profile it.

    Raises:
        ConfigError: an efficiency outside (0, 1], a negative overhead, a device or model with a number not above 0.
    """
    for name, share in (("memory_efficiency", memory_efficiency), ("compute_efficiency", compute_efficiency)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} is a fraction of the data sheet's rate, in (0, 1], not {share}")
    if not overhead_s >= 0:
        raise ConfigError(f"overhead_s is a number of seconds >= 0, not {overhead_s}")
    numbers: Mapping[str, float] = {
        one.name: getattr(of, one.name) for of in (device, model) for one in fields(of) if one.name != "name"
    }
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}")
    bytes_per_s = device.memory_bytes_per_s * memory_efficiency
    flops_per_s = device.flops_per_s * compute_efficiency
    per_token_s = 2 * model.num_params / flops_per_s
    return StepTime(
        base_s=overhead_s + model.num_params * model.bytes_per_value / bytes_per_s,
        per_decode_s=per_token_s,
        per_context_token_s=model.kv_bytes_per_token / bytes_per_s,
        per_prefill_token_s=per_token_s,
        per_prefill_context_s=4 * model.num_layers * model.attention_size / flops_per_s,
        origin=Origin(
            kind="estimated",
            source=f"roofline of {device.name}: {memory_efficiency:.0%} of its memory rate, {compute_efficiency:.0%} "
            f"of its arithmetic, {overhead_s * 1e3:g} ms overhead; not measured",
            model=model.name,
        ),
    )


A100 = Device("NVIDIA A100 SXM 80 GB", 2.039e12, 312e12)
H200 = Device("NVIDIA H200 SXM", 4.8e12, 989e12)
LLAMA2_7B = ModelShape("Llama-2-7B", 6.738e9, 32, 4096, 4096)
LLAMA2_13B = ModelShape("Llama-2-13B", 13.016e9, 40, 5120, 5120)
LLAMA3_8B = ModelShape("Llama-3-8B", 8.030e9, 32, 4096, 1024)

PRESETS: Mapping[str, StepTime] = {
    "a10g-llama2-7b": StepTime(
        base_s=0.019,
        per_decode_s=0.245e-3,
        per_context_token_s=2.0e-6,
        prefill_base_s=0.017,  # 36 ms in all, in an engine whose steps either prefill or decode
        per_prefill_token_s=0.213e-3,
        origin=Origin(
            kind="fitted",
            source="to VTC's published runs on an A10G (Ying1123/VTC-artifact @192c2e2); too short for batches of "
            "one or two, where reading the weights alone takes 22 ms",
            model="Llama-2-7B",
        ),
    ),
    "a10g-slora-llama2-7b": StepTime(  # reading the weights takes 22 ms, launching S-LoRA's kernels some 30 ms
        base_s=0.0302,
        per_decode_s=0.172e-3,
        per_context_token_s=0.81e-6,
        prefill_base_s=0.0101,
        per_prefill_token_s=0.2315e-3,
        origin=Origin(
            kind="fitted",
            source="to the time from first to last token of every request of 17 published runs, mean batches of 10 "
            "to 49: the mean of each run comes out within 2.5 %, of one (increase) within 5.2 %",
            model="Llama-2-7B",
        ),
    ),
    "a100-llama2-7b": roofline(A100, LLAMA2_7B),
    "a100-llama2-13b": roofline(A100, LLAMA2_13B),
    "h200-llama3-8b": roofline(H200, LLAMA3_8B),
    "cpu-smollm2-135m": StepTime.load(Path(__file__).with_name("cpu-smollm2-135m.json")),
}
"""By name. The A100 and H200 ones are estimates, never measured; a profile of your own engine is better than any."""
