"""Find a model, load it, make it ready to serve. Every failure is a ModelError that says what was tried."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from fairserve.config import EMBEDDED_MODEL, EngineConfig
from fairserve.engine import cpu_linear, model_check
from fairserve.engine.adapters import check_adapters, read_adapters
from fairserve.engine.fused_decoder import FLOAT32, INT8, FusedDecoder, can_fuse
from fairserve.engine.lora import Adapters
from fairserve.errors import ModelError

logger = logging.getLogger(__name__)

_SIMPLER = {"packed": "eager", "fused": "packed", "int8": "fused"}
_INT8_TOLERANCE = 0.3
"""Of the largest logit: what is broken is off by more."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that was checked and computes through our attention."""

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: frozenset[int]
    max_context: int
    """Tokens that the model's positions reach."""
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    layers: dict[int, model_check.LayerShape]
    adapters: Adapters | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(shape.bytes_per_token(self.dtype) for shape in self.layers.values())


def load_model(model: str, config: EngineConfig) -> LoadedModel:
    """Load weights and tokenizer of the embedded model's name, a local folder or a hub id.

    Raises:
        ModelError: not found, no network, broken files, or an architecture that cannot be served correctly.
    """
    folder = _locate(model)
    device = _device(config, model)
    dtype: Any = config.dtype
    if dtype == "auto":
        dtype = "auto" if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, dtype)
    try:
        with _no_progress_bar():
            # Weights that are no safetensors are pickles: nothing that they hold may run.
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                weights_only=True,
                **_parts(model, config),
            )
    except ModelError:
        raise
    except Exception as error:
        raise _explain(model, folder, error) from error
    if config.tensor_parallel_size == 1:  # else each part is where it belongs
        loaded = loaded.to(device)
    return prepare_model(loaded, config, tokenizer=load_tokenizer(model, config), name=model)


def load_tokenizer(model: str, config: EngineConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone; cheap, no weights.

    Raises:
        ModelError: as :func:`load_model`.
    """
    folder = _locate(model)
    trust = config.trust_remote_code if config is not None else False
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:
        raise _explain(model, folder, error) from error
    return tokenizer


def prepare_model(
    model: Any, config: EngineConfig, *, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "model"
) -> LoadedModel:
    """Take a transformers causal LM: check it, give it our attention, pack its weights on a CPU. Changes it in place.

    Raises:
        ModelError: the model cannot be served correctly.
    """
    model.eval()
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    device, dtype = weight.device, weight.dtype
    layers = model_check.check_model(model, name, device, dtype)
    adapters, wanted = read_adapters(model, config.adapters, device, dtype) if config.adapters else (None, {})
    served = model
    if device.type == "cpu" and config.cpu_linear != "eager" and config.tensor_parallel_size == 1:
        served = _pack(model, config, name, device, dtype, adapters)
    if adapters is not None:
        adapters.attach(served)
        is_rounded = served is not model and config.cpu_linear == "int8"
        check_adapters(served, adapters, wanted, device, dtype, _INT8_TOLERANCE if is_rounded else None)
    return LoadedModel(
        model=served,
        tokenizer=tokenizer,
        eos_token_ids=frozenset(_eos(model, tokenizer)),
        max_context=_max_context(model),
        vocab_size=weight.shape[0],
        device=device,
        dtype=dtype,
        layers=layers,
        adapters=adapters,
    )


def _parts(model: str, config: EngineConfig) -> dict[str, Any]:
    """How the model is dealt out to the ranks of a replica (``shards.py``), for ``from_pretrained``."""
    if config.tensor_parallel_size == 1:
        return {}
    from transformers.distributed import DistributedConfig

    text = AutoConfig.from_pretrained(_locate(model), trust_remote_code=config.trust_remote_code).get_text_config()
    require_divisible(text, config.tensor_parallel_size, model)
    return {"distributed_config": DistributedConfig(tp_size=config.tensor_parallel_size)}


def _pack(
    model: Any,
    config: EngineConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    adapters: Adapters | None = None,
) -> Any:
    """The model with the fastest products of those that were asked for; ``model`` itself or what takes its place."""
    wanted = config.cpu_linear
    if not (cpu_linear.can_pack() and dtype in (torch.float32, torch.bfloat16)):
        if wanted != "auto":
            raise ModelError(name, f"cpu_linear {wanted!r} does not work for {dtype} with this torch: use 'eager'")
        logger.info("linears stay plain: no oneDNN-packed products for %s with this torch", dtype)
        return model
    if wanted == "auto":
        wanted = "fused" if can_fuse(model) else "packed"
    elif wanted != "packed" and not can_fuse(model):
        raise ModelError(name, f"cpu_linear {wanted!r} knows no {type(model).__name__} in {dtype}: use 'auto'")
    before = model_check.serve_again(model, device, dtype)
    if wanted == "packed":
        cpu_linear.pack(model)
    else:
        model = FusedDecoder(model, INT8 if wanted == "int8" else FLOAT32, adapters)
    after = model_check.serve_again(model, device, dtype)
    complaint = f"{wanted} weights compute something else; set cpu_linear to {_SIMPLER[wanted]!r}"
    model_check.require_equal(before, after, name, dtype, complaint, _INT8_TOLERANCE if wanted == "int8" else None)
    return model


def _locate(model: str) -> str:
    """What transformers is asked to load: a folder's path or a hub id."""
    if model == EMBEDDED_MODEL:
        from fairserve.engine.embedded import ensure_embedded

        return str(ensure_embedded(model))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(model, f"the folder {path} holds no config.json, so it is no transformers model")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(model, f"there is no folder {path}")
    return model


def _explain(model: str, folder: str, error: Exception) -> ModelError:
    """One readable reason instead of transformers' many."""
    text = " ".join(str(error).split())
    if folder != model or Path(folder).is_dir():
        return ModelError(model, f"the files in {folder} do not load: {text[:300]}")
    known = f"known without a network: {EMBEDDED_MODEL!r} or a local folder"
    if isinstance(error, OSError):
        return ModelError(
            model,
            f"it is no local folder, and the Hugging Face hub gave nothing under this name (no such model, no access, "
            f"or no network); {known}. The hub client said: {text[:300]}",
        )
    return ModelError(model, f"transformers cannot load it: {text[:300]}")


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bar belongs to a terminal, not to a replica's log."""
    if not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def _device(config: EngineConfig, model: str) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ModelError(model, "engine.device is 'cuda' but torch sees no GPU here")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def require_divisible(config: Any, size: int, name: str) -> None:
    """
    Raises:
        ModelError: the model's heads cannot be dealt out to so many ranks.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    possible = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
    if size not in possible:
        raise ModelError(
            name,
            f"engine.tensor_parallel_size {size} does not divide its {heads} heads and {kv_heads} KV heads; possible: "
            f"{', '.join(map(str, possible))}",
        )


def _eos(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Iterable[int]:
    """All tokens that end the text: generation_config first, it knows chat ends that the tokenizer does not."""
    generation = getattr(model, "generation_config", None)
    for owner in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return ()


def _max_context(model: Any) -> int:
    """Positions the model knows; never past the length at which rotary scaling would depend on the whole batch."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or 2048
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope"):
            original = scaling.get("original_max_position_embeddings")
            length = min(length, original or getattr(config, "original_max_position_embeddings", None) or length)
    return int(length)
