"""Which attention an engine gets, and how large its KV cache becomes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from fairserve.config import EngineConfig, FairServeArgs
from fairserve.engine.attention import KVAttention
from fairserve.engine.attention_sdpa import SdpaAttention
from fairserve.engine.loading import LoadedModel
from fairserve.engine.model_check import require_equal, serve_again
from fairserve.errors import ConfigError

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.25
"""CPU: part of the free memory that a KV cache of default size may grow into; several replicas share a machine."""


def choose_attention(loaded: LoadedModel, config: EngineConfig) -> type[KVAttention]:
    """The attention of this device.

    Raises:
        ConfigError: xformers was asked for and is not to be had.
    """
    if loaded.device.type != "cuda":
        if config.attention == "xformers":
            raise ConfigError("engine.attention 'xformers' needs a CUDA device; use 'auto' or 'sdpa'")
        return SdpaAttention
    if config.attention == "sdpa":
        return SdpaAttention
    try:
        from fairserve.engine.attention_xformers import XformersAttention
    except ImportError as error:
        reason: str | None = f"it does not import: {error}"
    else:
        reason = why_not(XformersAttention, loaded)
        if reason is None:
            return XformersAttention
    if config.attention == "xformers":
        raise ConfigError(f"engine.attention is 'xformers', but {reason}")
    logger.warning("attention through torch instead of xformers: %s", reason)
    return SdpaAttention


def why_not(attention: type[KVAttention], loaded: LoadedModel) -> str | None:
    """Why this attention cannot serve the model here, None when it computes what torch's own does."""
    try:
        wanted = serve_again(loaded.model, loaded.device, loaded.dtype)
        got = serve_again(loaded.model, loaded.device, loaded.dtype, attention)
        require_equal(wanted, got, "it", loaded.dtype, "it computes something else")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def kv_tokens(loaded: LoadedModel, config: EngineConfig, max_model_len: int) -> int:
    """Tokens the KV cache is made for."""
    if config.kv_cache_tokens is not None:
        return config.kv_cache_tokens
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        available = int(free - (1 - config.gpu_memory_fraction) * total)
        return min(available // loaded.kv_bytes_per_token, config.max_num_seqs * max_model_len)
    fits = int(_available_memory() * _MEMORY_SHARE) // loaded.kv_bytes_per_token
    return min(min(config.max_num_seqs, 8) * max_model_len, fits)


def _available_memory() -> int:
    """Bytes that this process could still take: what the machine has, and what its container may."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = 8 << 30
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else max(0, min(available, int(limit) - int(used)))
    except (OSError, ValueError):
        return available


def num_threads(args: FairServeArgs, whole: FairServeArgs | None = None) -> int:
    """Torch threads of one process on a CPU: the configured number, else its share of this machine's cores among the
    processes of all models of the ``whole`` service."""
    models = (whole, *whole.more_models) if whole is not None else (args,)
    num_processes = sum(one.num_replicas * one.engine.tensor_parallel_size for one in models)
    return args.engine.num_threads or max(1, len(os.sched_getaffinity(0)) // num_processes)


def uses_gpu(config: EngineConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()
