"""The common half of every driver: a process that holds one engine and runs what it is told, JSON lines in and out.

In: a ``Spec``, then a run for each line: ``{"concurrency": 8, "prompts": [[1, 2], ...], "num_output": 64}``. Out: one
line when the engine is ready (versions), then one for each run: for each request when it was sent and each of its
tokens with its time. Seconds are of one monotonic clock.

A peer's environment holds nothing of fairserve's: this file and the drivers import the standard library and their own
engine only.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Spec:
    """What an engine is built for."""

    model: str
    """Folder of the model in float32, or a GGUF file for llama.cpp."""
    threads: int
    max_requests: int
    """At a time."""
    max_length: int
    """Tokens of a prompt and its output."""
    max_step_tokens: int = 256
    """Tokens that one step may compute, where an engine has such a limit."""
    options: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    def add(self, request: int, prompt: Sequence[int], num_output: int) -> None:
        """Let it run: greedy, exactly ``num_output`` tokens, whatever they are."""
        ...

    def step(self) -> Iterable[tuple[int, Sequence[int]]]:
        """Wait for new tokens: (request, its new ones)."""
        ...


def serve(build: Callable[[Spec], Engine], packages: Sequence[str]) -> None:
    """Obey the lines on stdin until it ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = Spec(**json.loads(sys.stdin.readline()))
    engine = build(spec)
    _run(engine, [[7] * 16], concurrency=1, num_output=2)
    versions = {name: importlib.metadata.version(name) for name in packages}
    answers.write(json.dumps({"versions": {"python": platform.python_version(), **versions}}) + "\n")
    for line in sys.stdin:
        made = _run(engine, **json.loads(line))
        answers.write(json.dumps({"requests": made, "peak_rss_bytes": _peak_rss_bytes()}) + "\n")


def _run(
    engine: Engine, prompts: Sequence[Sequence[int]], concurrency: int, num_output: int
) -> list[dict[str, list[Any]]]:
    """Every prompt once, ``concurrency`` at a time: whoever ends makes room for the next."""
    made: list[dict[str, list[Any]]] = [{"sent_s": [], "token_s": [], "tokens": []} for _ in prompts]
    num_sent = num_done = 0
    while num_done < len(prompts):
        while num_sent < len(prompts) and num_sent - num_done < concurrency:
            made[num_sent]["sent_s"].append(time.monotonic())
            engine.add(num_sent, prompts[num_sent], num_output)
            num_sent += 1
        new = engine.step()
        now_s = time.monotonic()
        for request, tokens in new:
            mine = made[request]
            mine["tokens"] += tokens
            mine["token_s"] += [now_s] * len(tokens)
            if len(tokens) and len(mine["tokens"]) >= num_output:
                num_done += 1
    return made


def _peak_rss_bytes() -> int:
    """The most memory that this process has held. Linux only: elsewhere 0."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
