"""One model over several processes: tensor parallelism.

Each rank holds a part of every layer's heads and of its feed-forward, and the KV cache of its heads; transformers'
own plan for the architecture says how (``tp_plan``; Megatron-LM, arXiv 1909.08053). Rank 0 has the engine: what it
runs, it first tells the others, and all run the same model code in step, meeting in the all-reduces. Plans travel as
Python values over gloo, between processes of one replica; tensors over NCCL on GPUs, gloo on CPUs.

A rank that fails leaves the others out of step: then the whole replica is broken, and replaced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fairserve.engine.batching import Chunk
from fairserve.engine.runner import Rows, Runner
from fairserve.errors import ModelError

logger = logging.getLogger(__name__)

JOIN_S = 600.0
"""All ranks must have come together by then."""
IDLE = timedelta(days=365)
"""How long ranks wait for the next step. One that died is noticed at once: its connections close."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a replica. ``address``: host:port where rank 0 listens."""

    number: int
    size: int
    address: str


def join(rank: Rank) -> None:
    """Meet the other ranks; once in a process.

    Raises:
        ModelError: they did not come.
    """
    host, _, port = rank.address.rpartition(":")
    # transformers reads the first three; there is one rank in a process, and one device that it sees.
    os.environ |= {"RANK": str(rank.number), "WORLD_SIZE": str(rank.size), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=rank.number, world_size=rank.size, timeout=timedelta(seconds=JOIN_S))
    except (RuntimeError, ValueError) as error:
        raise ModelError("", f"the {rank.size} ranks of a replica did not come together: {error}") from error


def least(number: int) -> int:
    """The least that any rank names; asked by all of them."""
    answer = torch.tensor([number])
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return int(answer)


def is_lead() -> bool:
    """This process is rank 0 of several."""
    return dist.is_initialized() and dist.get_rank() == 0


class ShardedRunner(Runner):
    """Rank 0: tells the other ranks what it runs, and runs it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._group: Any = dist.new_group(backend="gloo", timeout=IDLE)
        self._is_broken = False

    def forward(self, chunks: Sequence[Chunk], num_decodes: int) -> Rows:
        return self._together("forward", super().forward, tuple(chunks), num_decodes)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        self._together("copy", super().copy, tuple(copies))

    def scrub(self, blocks: Sequence[int]) -> None:
        self._together("scrub", super().scrub, tuple(blocks))

    def release_memory(self) -> None:
        self._together("release_memory", super().release_memory)

    def is_sound(self) -> bool:
        return not self._is_broken and super().is_sound()

    def stop(self) -> None:
        """Let the other ranks end."""
        if not self._is_broken:
            self._together("stop", lambda: None)

    def _together(self, name: str, act: Callable[..., Any], *args: Any) -> Any:
        try:
            dist.broadcast_object_list([(name, args)], src=0, group=self._group)
            return act(*args)
        except Exception:
            self._is_broken = True  # the others may have done what failed here, or wait in the middle of it
            raise


def follow(runner: Runner) -> None:
    """Any other rank: run what rank 0 runs, until it says stop.

    Raises:
        RuntimeError: rank 0 is gone, or this rank failed.
    """
    group: Any = dist.new_group(backend="gloo", timeout=IDLE)
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=group)
        name, args = told[0]
        if name == "stop":
            return
        getattr(runner, name)(*args)
