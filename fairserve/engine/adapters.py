"""LoRA adapters read through peft: its own configuration, its own matching of target modules, its own scales.

peft puts its layers into the model, loads the adapter's weights into them, and takes them out again; what they hold in
between is all that is served, and what they compute is what the served model must compute, too. An adapter that is more
than two thin matrices beside linears of the decoder is refused.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fairserve.engine import model_check
from fairserve.engine.lora import Adapters, Factors
from fairserve.errors import ModelError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""peft's own for the only adapter of a model."""
_SERVED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
)
"""Settings of peft's LoraConfig that may have any value."""
_UNUSED = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "init_lora_weights", "eva_config", "runtime_config", "megatron_core", "qalora_group_size"),
)
"""Those that change nothing in what a trained adapter computes; ``_read_config`` looks at two of them."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of training that leave the base's weights as they are."""


def read_adapters(
    model: Any, places: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> tuple[Adapters, dict[str, Tensor]]:
    """The adapters at ``places`` (by name: a local folder or a hub id) for a model that was checked, and by name what
    it must give with them: the logits of ``model_check``'s run with peft's own layers. The model stays as it is.

    Raises:
        ModelError: one is not found, does not fit the model, or is more than can be served.
    """
    factors, wanted = {}, {}
    for name, where in places.items():
        with adapted(model, name, where) as factors[name]:
            wanted[name] = model_check.serve_again(model, device, dtype)
    return Adapters(factors, device), wanted


def check_adapters(
    model: Any,
    adapters: Adapters,
    wanted: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float | None,
) -> None:
    """Does the model that is served compute the same with them? ``tolerance``: see ``model_check.require_equal``.

    Raises:
        ModelError: it does not.
    """
    for name, logits in wanted.items():
        try:
            got = model_check.serve_again(model, device, dtype, adapters=adapters, adapter=name)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(name, f"the model does not run with this LoRA adapter: {error}") from error
        complaint = "the LoRA adapter computes something else here than through peft"
        model_check.require_equal(logits, got, name, dtype, complaint, tolerance)


class _Unserved(Exception):
    """Why an adapter cannot be served."""


@contextmanager
def adapted(model: Any, name: str, where: str) -> Iterator[dict[str, Factors]]:
    """The adapter at ``where``, a local folder or a hub id, by the path of each linear that it adapts. Inside, peft's
    own layers stand in their place.

    Raises:
        ModelError: it is not found, does not fit the model, or is more than can be served.
    """
    try:
        wrapped, factors = _put_in(model, where)
    except _Unserved as error:
        raise ModelError(name, f"the LoRA adapter in {where!r} cannot be served: {error}") from error
    yield factors
    wrapped.unload()


def _put_in(model: Any, where: str) -> tuple[Any, dict[str, Factors]]:
    """peft's wrapping of the model, with the adapter in it."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(layer, BaseTunerLayer) for layer in model.modules()):
        raise _Unserved("the model itself comes with an adapter (adapter_config.json in its folder): merge that first")
    folder = _locate(where)
    config = _read_config(folder)
    _check_names(folder)
    head, device = model.get_output_embeddings(), str(model.get_input_embeddings().weight.device)
    try:
        with warnings.catch_warnings(action="ignore"):  # what peft warns of is looked at below
            wrapped: Any = PeftModel(model, config, _NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            read = wrapped.load_adapter(str(folder), _NAME, torch_device=device, low_cpu_mem_usage=True)
    except Exception as error:
        raise _Unserved(f"it does not fit this model: {' '.join(str(error).split())[:300]}") from error
    if read.missing_keys or read.unexpected_keys:
        example = (*read.missing_keys, *read.unexpected_keys)[0]
        raise _Unserved(
            f"it does not fit this model: {len(read.missing_keys)} weights are missing and {len(read.unexpected_keys)} "
            f"belong nowhere, such as {example}"
        )
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    return wrapped, {path: _factors(path, layer, head) for path, layer in layers}


def _locate(where: str) -> Path:
    """The folder that holds it, fetched from the hub where it is none."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1:
            raise _Unserved(f"there is no folder {folder}")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(where, allow_patterns=[_CONFIG, _WEIGHTS]))
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise _Unserved(f"it is no local folder, and the Hugging Face hub gave nothing: {said}") from error
    if not (folder / _CONFIG).is_file():
        raise _Unserved(f"there is no {_CONFIG}, so it is no adapter in peft's format")
    if not (folder / _WEIGHTS).is_file():
        raise _Unserved(f"there is no {_WEIGHTS}; no other format is read (adapter_model.bin is a pickle)")
    return folder


def _check_names(folder: Path) -> None:
    """Whatever else is in it peft would load over the base's own weights."""
    try:
        with safe_open(folder / _WEIGHTS, "pt") as held:
            names = held.keys()
    except Exception as error:
        raise _Unserved(f"its {_WEIGHTS} cannot be read: {error}") from error
    others = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise _Unserved(f"it holds more than LoRA's two matrices for each linear: {', '.join(sorted(others))[:300]}")


def _read_config(folder: Path) -> Any:
    from peft import LoraConfig, PeftConfig

    try:
        settings = json.loads((folder / _CONFIG).read_text())
        with warnings.catch_warnings(action="ignore"):  # of settings that it does not know
            config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _Unserved(f"peft cannot read its {_CONFIG}: {type(error).__name__}: {error}") from error
    if type(config) is not LoraConfig:
        raise _Unserved(f"its peft_type is {config.peft_type}, only LORA is served")
    known = {one.name: one for one in dataclasses.fields(LoraConfig)}
    odd = {key: value for key, value in settings.items() if key not in known and value}
    for key in known.keys() - {*_SERVED, *_UNUSED}:
        value = getattr(config, key)
        if value and value != known[key].default:
            odd[key] = value
    if odd:
        said = ", ".join(f"{key} = {value!r}" for key, value in sorted(odd.items()))
        raise _Unserved(f"its {_CONFIG} sets {said[:300]}; may be set: {', '.join(sorted(_SERVED))}")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise _Unserved(f"its task_type is {config.task_type}, only CAUSAL_LM is served")
    if config.init_lora_weights not in _STARTS:
        raise _Unserved(
            f"its training changed the base's weights (init_lora_weights = {config.init_lora_weights!r}); peft's "
            "save_pretrained converts it with path_initial_model_for_weight_conversion"
        )
    config.init_lora_weights, config.inference_mode = True, True
    return config


def _factors(path: str, layer: Any, head: nn.Module | None) -> Factors:
    from peft.tuners.lora import Linear

    base = layer.get_base_layer()
    if type(layer) is not Linear or type(base) not in (nn.Linear, Conv1D) or base is head:
        raise _Unserved(
            f"it adapts {path} ({type(base).__name__}); only linears between embedding and output head are served"
        )
    a, b = layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise _Unserved(f"its weights for {path} are not finite (NaN or infinity)")
    scaled, dtype = b.float() * layer.scaling[_NAME], base.weight.dtype
    return Factors(a.to(dtype).T.contiguous(), scaled.to(dtype).T.contiguous())
